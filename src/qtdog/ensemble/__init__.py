"""Several trained members as one model: building, prediction, doubt, size and cost."""

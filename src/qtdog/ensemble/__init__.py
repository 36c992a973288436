"""Several trained members as one model: averaging, prediction, uncertainty, evaluation, size and cost."""

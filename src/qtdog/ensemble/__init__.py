"""Several trained members as one model: averaging, prediction, uncertainty, cascade, evaluation, size and cost."""

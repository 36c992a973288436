"""From a configuration to a finished run folder: the loop, its checkpoints, selection and the composition root."""

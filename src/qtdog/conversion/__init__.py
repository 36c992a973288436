"""From a float model to a quantized one and back: which layers, attach, enable, report, plain weights, save."""

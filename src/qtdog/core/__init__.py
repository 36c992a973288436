"""Values that cross rooms: errors, registry, random streams, files, quantized tensors, configuration."""

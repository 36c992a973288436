"""Domain-generalization methods, one per file: pure losses on per-domain outputs."""

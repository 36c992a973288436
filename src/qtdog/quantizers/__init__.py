"""Weight quantizers: pure functions on the grid, and the modules that learn it."""

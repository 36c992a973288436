"""What a notebook and the command line call: train, evaluate, predict, export, sweep, compare, analyze."""

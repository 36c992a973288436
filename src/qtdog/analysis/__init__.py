"""What can be asked of trained networks: flatness, curvature, and the choice of bits from both."""

"""Backbones as a featurizer and a linear head, and where their weights come from."""

"""Data sets of several domains: cards, splits, the decoded cache, augmentation, batches."""

"""Data sets of several domains: datasheets, splits, the decoded cache, augmentation, batches."""

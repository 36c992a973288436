"""The official division that some data sets come with (WILDS, Koh et al., ICML 2021)."""

from __future__ import annotations

PARTS = ("train", "id_val", "id_test", "val", "test")
"""Trained on; held out of the training domains for selection and for a report; unseen domains, for either."""

TRAIN, ID_VAL, ID_TEST, VAL, TEST = range(5)

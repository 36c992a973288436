"""What the weights of a timm model were trained on, read from the tag of their name."""

from __future__ import annotations

import re

# Parts of a tag that name a corpus. Where several are in one tag, they were trained on one after another.
CORPORA = {
    "in1k": "imagenet-1k",
    "in12k": "imagenet-12k",
    "in21k": "imagenet-21k",
    "in22k": "imagenet-22k",
    "ig1b": "instagram-1b",
    "yfcc100m": "yfcc-100m",
    "swag": "instagram-3.6b",
    "openai": "openai-400m pairs",
    "laion2b": "laion-2b pairs",
    "laion400m": "laion-400m pairs",
    "datacompxl": "datacomp-1b pairs",
    "datacomp1b": "datacomp-1b pairs",
    "dfn2b": "dfn-2b pairs",
    "dfn5b": "dfn-5b pairs",
    "400m": "metaclip-400m pairs",
    "2pt5b": "metaclip-2.5b pairs",
    "webli": "webli pairs",
    "lvd142m": "lvd-142m",
    "lvd1689m": "lvd-1689m",
    "inat21": "inaturalist-2021",
}


def corpora(tag: str) -> str:
    """Return the corpora that a tag names, in the order of training; "unnamed data" if it names none.

    "lc" in a tag says that only the classifier, which no featurizer keeps, was trained on the last one.

    Example:
        >>> corpora("fb_swsl_ig1b_ft_in1k"), corpora("swag_lc_in1k"), corpora("miil")
        ('instagram-1b, then imagenet-1k', 'instagram-3.6b', 'unnamed data')
    """
    parts = re.split(r"[_.]", tag)
    named = [CORPORA[part] for part in parts if part in CORPORA]
    if "lc" in parts and len(named) > 1:
        named.pop()
    return ", then ".join(named) or "unnamed data"

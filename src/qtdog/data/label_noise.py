"""Wrong labels as a study tool: a share of the source images get another class, seeded and nested."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from qtdog.core.random import numpy_stream


def with_wrong_labels(
    class_index: npt.NDArray[np.integer],
    pools: Mapping[str, npt.NDArray[np.int64]],
    share: float,
    *,
    n_classes: int,
    seed: int,
) -> npt.NDArray[np.int64]:
    """Return the labels, of which in each pool a share is replaced by another class, all others alike likely.

    That is symmetric label noise (Zhang et al., *Understanding deep learning requires rethinking generalization*, ICLR
    2017), but exactly round(share · n) labels of each pool are wrong, and each of them is. The same seed gives nested
    sets: what is wrong at 20 % is wrong in the same way at 40 %.

    Args:
        class_index: class of each image (n,); not changed.
        pools: name, part of the seed, to indices of images.
        share: of wrong labels, 0 to 1.
        n_classes: at least 2.
        seed: of all draws.

    Example:
        >>> labels, pools = np.zeros(10, dtype=np.int64), {"a": np.arange(8)}
        >>> wrong = with_wrong_labels(labels, pools, 0.25, n_classes=3, seed=0)
        >>> int((wrong != labels).sum()), wrong[8:].tolist()
        (2, [0, 0])
    """
    noisy = class_index.astype(np.int64)
    for name, pool in pools.items():
        stream = numpy_stream(seed, "label-noise", name)
        order, shift = stream.permutation(np.sort(pool)), stream.integers(1, n_classes, size=len(pool))
        n_wrong = round(share * len(pool))
        chosen = order[:n_wrong]
        noisy[chosen] = (noisy[chosen] + shift[:n_wrong]) % n_classes
    return noisy

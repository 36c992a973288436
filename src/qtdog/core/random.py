"""Named random streams.

Every random draw of a run comes from a stream that is named, never from shared global state: the stream for
(seed, "augment", step) is the same whatever was drawn before. A stream's position is therefore just the step, which is
what makes a resumed run bit-identical to an undisturbed one, in one process or several.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for the stream called `names` under `seed`.

    Example:
        >>> derive(0, "augment", 3) == derive(0, "augment", 3) != derive(0, "augment", 4)
        True
    """
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_stream(seed: int, *names: str | int) -> np.random.Generator:
    """Return a NumPy generator at the start of the named stream."""
    return np.random.Generator(np.random.Philox(derive(seed, *names)))


def torch_stream(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU torch generator at the start of the named stream."""
    return torch.Generator().manual_seed(derive(seed, *names))

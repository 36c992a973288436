"""Quantization after training: codes for the float network that selection or the averager chose."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, islice, zip_longest
from typing import Any

import numpy as np
from accelerate.utils import broadcast
from torch import Tensor

from qtdog.conversion.calibrate import calibrate_
from qtdog.core.progress import Progress
from qtdog.core.quantized import QuantizedTensor
from qtdog.core.random import numpy_stream
from qtdog.data.loader import Indices, eval_batches
from qtdog.quantizers.ptq import Fixed
from qtdog.training.parts import Parts

CALIBRATION_BATCH = 32


def quantize_after_training_(parts: Parts, check: Callable[[], None], progress: Progress) -> dict[str, Any]:
    """Give the network's quantizers their codes by the method that the configuration names; return the report.

    The images are training images of the sources, never held-out ones, never the target's. Every process does the same
    work and takes the codes of the first one in the end, so that none waits long and all have the same network.

    Args:
        parts: of a run whose quantizer works after training, with the chosen float network in evaluation mode.
        check: called often, equally often in every process; may raise to break off, the network still in float.
        progress: told (done, total) of the work.

    Returns:
        method, start of the step sizes, n_images, seconds, and the layers (`conversion.calibrate.LayerCalibration`).

    Raises:
        ConfigError, ModelError: as in `conversion.calibrate.calibrate_`.
    """
    how, started = parts.config.quantizer, time.perf_counter()
    n_wanted = 0 if how.name == "rtn" else how.calibration_images
    images = CalibrationImages(parts, calibration_indices(parts.batches.pools, n_wanted, parts.config.train.seed))
    layers = calibrate_(parts.network, how.name, images, damping=how.damping, check=check, progress=progress)
    if parts.accelerator.num_processes > 1:
        _take_codes_of_the_first_process_(parts)
    return {
        "method": how.name,
        "init": how.init,
        "n_images": len(images.indices),
        "seconds": round(time.perf_counter() - started, 2),
        "layers": [asdict(layer) for layer in layers],
    }


def calibration_indices(pools: Mapping[str, Indices], n: int, seed: int) -> Indices:
    """Return n images spread evenly over the domains, in an order that the seed decides; all, if there are fewer.

    A domain that runs out leaves its share to the others.

    Example:
        >>> pools = {"a": np.array([1, 2, 3]), "b": np.array([7])}
        >>> sorted(calibration_indices(pools, 9, seed=0).tolist())
        [1, 2, 3, 7]
    """
    orders = [numpy_stream(seed, "calibration", domain).permutation(pool) for domain, pool in pools.items()]
    turns = chain.from_iterable(zip_longest(*orders))
    return np.array(list(islice((index for index in turns if index is not None), n)), dtype=np.int64)


@dataclass(frozen=True)
class CalibrationImages:
    """Batches of images as the network sees them in evaluation, not augmented; can be gone through again.

    Attributes:
        parts: of the run.
        indices: of the images, in their order.
    """

    parts: Parts
    indices: Indices

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.indices) // CALIBRATION_BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield float32 (b, C, H, W) on the device."""
        source = self.parts.batches
        how = {"batch_size": CALIBRATION_BATCH, "mean": source.mean, "std": source.std}
        for images, _ in eval_batches(source.cache, self.indices, source.class_index, **how):
            yield images.to(self.parts.accelerator.device)


def _take_codes_of_the_first_process_(parts: Parts) -> None:
    assert parts.quantizer is not None
    for quantizer in parts.quantizer.layers.values():
        assert isinstance(quantizer, Fixed)
        codes, scale = broadcast((quantizer.codes.contiguous(), quantizer.scale))
        quantizer.set_(QuantizedTensor(codes, scale, quantizer.spec))

"""Before long work: what a training run will do, and about how long it will take on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from qtdog.api.display import duration_text
from qtdog.core.config import Config
from qtdog.core.errors import ModelError
from qtdog.data.dataset import DomainDataset
from qtdog.data.text import TextDomains
from qtdog.models.backbones import create_network
from qtdog.models.text_backbones import TEXT_BACKBONES
from qtdog.training.protocol import make_protocol
from qtdog.training.step_time import OVERHEAD, probe

BACKWARD = 2  # the backward pass takes about twice the forward pass: once for the inputs, once for the weights


@cache  # asked again for every size and run; it is an estimate even where a plug-in puts another network under a name
def training_flops(backbone: str, *, channels: int, size: int) -> float:
    """Return the floating-point operations of a forward and backward pass over one image or text.

    A multiplication and an addition count as two. Of a transformer for text, 2 operations per weight and token are
    assumed, its word table left out.

    Args:
        backbone: a name in `models.backbones.backbone_names()`.
        channels: of the images.
        size: height and width of the images in pixels, or tokens of a text.

    Raises:
        ModelError: the backbone is unknown, cannot take such images, or cannot be built without memory.

    Example:
        >>> round(training_flops("resnet50", channels=3, size=224) / 1e9, 1)
        24.5
    """
    with torch.device("meta"):
        network = create_network(
            backbone, n_classes=1, channels=channels, image_size=size, weights="none", freeze_bn=True, seed=0
        )
    if backbone in TEXT_BACKBONES:
        n_weights = sum(p.numel() for name, p in network.named_parameters() if "embeddings" not in name)
        return (1 + BACKWARD) * 2.0 * n_weights * size
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            network.eval()(torch.zeros(1, channels, size, size, device="meta"))
    except (RuntimeError, NotImplementedError) as error:
        raise ModelError(f"the arithmetic of '{backbone}' cannot be counted: {error}") from error
    return (1.0 + BACKWARD) * counter.get_total_flops()


CORE_FLOPS = (
    3e10  # that a core of a processor sustains in training, measured with ResNet-50; a guess within a factor of 2
)
SLOW_S = 6 * 3600.0  # a run that takes longer on a processor is warned of
MEASURED_STEP_S = 3.0  # a step that is guessed to take longer is not tried for a dry run
QUICK_PRESET = "small"


def device_type() -> str:
    """Return the type of the device that training takes on this machine, like "cuda" or "cpu"."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if device is None else device.type


def device_text() -> str:
    """Return where training will run, like "cpu (2 threads)" or "cuda (NVIDIA H100)"."""
    kind = device_type()
    if kind == "cuda":
        return f"cuda ({torch.cuda.get_device_name()})"
    n_threads = torch.get_num_threads()
    return f"cpu ({n_threads} thread{'s' * (n_threads > 1)})" if kind == "cpu" else kind


def images_per_step(config: Config, dataset: DomainDataset) -> int:
    """Return how many images (or texts) each update sees: a batch of every source domain."""
    return config.data.batch_size * len(make_protocol(config, dataset).sources)


def describe_run(config: Config, dataset: DomainDataset) -> str:
    """Return one line about a run: backbone, pixels, images per step, steps, device."""
    is_text = isinstance(dataset, TextDomains)
    size = (
        f"{config.data.max_tokens} tokens" if is_text else f"{config.data.image_size} × {config.data.image_size} pixels"
    )
    n_images, what = images_per_step(config, dataset), "texts" if is_text else "images"
    steps = f"{n_images} {what} per step, {config.train.steps:,} steps"
    return f"{config.model.backbone}, {size}, {steps}, {device_text()}"


def guess_step_s(config: Config, dataset: DomainDataset, *, cores: int | None = None) -> float | None:
    """Return about how many seconds a step takes on a processor, by the arithmetic of the network; None if not known.

    Args:
        config: of the run.
        dataset: its data.
        cores: of the processor; None for torch's number of threads.
    """
    size = config.data.max_tokens if isinstance(dataset, TextDomains) else config.data.image_size
    try:
        flops = training_flops(config.model.backbone, channels=dataset.card.channels, size=size)
    except ModelError:  # an error when the run begins
        return None
    return flops * images_per_step(config, dataset) / (CORE_FLOPS * (cores or torch.get_num_threads()))


def slow_warning(config: Config, dataset: DomainDataset, n_runs: int = 1, *, device: str | None = None) -> str | None:
    """Return a sentence for a run that would take very long on a processor, with the preset that takes minutes.

    Args:
        config: of the run.
        dataset: its data.
        n_runs: how many like it there are.
        device: type of the device; None for that of this machine.
    """
    if (device or device_type()) != "cpu":
        return None
    step_s = guess_step_s(config, dataset)
    if step_s is None or step_s * config.train.steps < SLOW_S:
        return None
    seconds, preset = step_s * config.train.steps, dataset.card.preset or QUICK_PRESET
    time = duration_text(seconds) + (f" each, {duration_text(n_runs * seconds)} in all" if n_runs > 1 else "")
    what = f"{config.model.backbone} at {config.data.image_size} pixels for {config.train.steps:,} steps"
    return f"{what} takes about {time} on this processor. A GPU takes hours; --preset {preset} takes minutes here"


@dataclass(frozen=True)
class Estimate:
    """How long runs will take.

    Attributes:
        step_s: seconds of one step.
        seconds: of all steps that are missing, with evaluations and start.
        source: how that is known.
    """

    step_s: float
    seconds: float
    source: str

    def __str__(self) -> str:
        return f"about {duration_text(self.seconds)} ({self.step_s:.2g} s per step, {self.source})"


def estimate_runs(
    configs: Sequence[Config],
    dataset: DomainDataset,
    *,
    done_steps: int = 0,
    measure: Callable[..., float] = probe,
) -> Estimate | None:
    """Return how long runs of one kind take here, by a few steps made now, or by arithmetic where a step takes long.

    Args:
        configs: of the runs that are missing, alike but for target and seed.
        dataset: their data.
        done_steps: steps of them that are done or shared, and do not count.
        measure: returns the seconds of a step.

    Returns:
        None if there is nothing to do.
    """
    if not configs:
        return None
    first = configs[0]
    guessed = guess_step_s(first, dataset) if device_type() == "cpu" else None
    if guessed is not None and guessed > MEASURED_STEP_S:
        step_s, source = guessed, "by the network's arithmetic"
    else:
        step_s, source = measure(first, dataset, threads=torch.get_num_threads()), "a few steps made just now"
    n_steps = sum(config.train.steps for config in configs) - done_steps
    return Estimate(step_s, max(0, n_steps) * step_s * OVERHEAD, source)

"""Before long work: how long a training run will take here, and the size and length that fit the time there is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from qtdog.api.display import duration_text, say
from qtdog.core.config import Config
from qtdog.core.config_io import Tree, load_preset, merge_trees
from qtdog.core.errors import ConfigError, ModelError
from qtdog.data.dataset import DomainDataset
from qtdog.data.text import TextDomains
from qtdog.models.backbones import create_network
from qtdog.models.text_backbones import TEXT_BACKBONES
from qtdog.training.averagers import AVERAGERS
from qtdog.training.protocol import DomainProtocol, make_protocol, source_domains
from qtdog.training.step_time import OVERHEAD, network_step_s, probe

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
    except RuntimeError as error:  # such as an operation that the meta device has not
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
    return config.data.batch_size * len(source_domains(config, dataset))


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


DEFAULT_S = 15 * 60.0
PRESET = "small"
SIZES = (224, 192, 160, 128, 96, 64)  # largest first
IMAGES_PER_STEP = 96  # with many sources each gives fewer
MIN_BATCH, MIN_STEPS, MAX_STEPS = 4, 100, 5000
PASSES = 20  # over the sources: enough, as in the study
N_EVALUATIONS = 10
MARGIN = 1.35  # rounding, augmentation, checkpoints, decoding, the start: time of a run over that of its bare steps
MEASURED_IMAGES = 16
CHOSEN = ("model.backbone", "data.image_size", "train.steps")
UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """How long `train` may take, in all.

    Attributes:
        seconds: for all runs together.
        asked: whether the user named it; without, a time is kept only where nothing says what to train.
        say: is called with a line about what was chosen.
        measure: returns the seconds of an update, as `training.step_time.network_step_s` does.
        device: type of the device, like "cpu"; None for that of this machine.
    """

    seconds: float = DEFAULT_S
    asked: bool = False
    say: Callable[[str], None] = say
    measure: Callable[..., float] = network_step_s
    device: str | None = None

    @property
    def on_processor(self) -> bool:
        """Whether no accelerator will train."""
        return (self.device or device_type()) == "cpu"


def parse_duration(text: str) -> float:
    """Return seconds.

    Raises:
        ConfigError: the text is no time above zero.

    Example:
        >>> parse_duration("20min"), parse_duration("1.5h"), parse_duration("1h30m")
        (1200.0, 5400.0, 5400.0)
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(min|s|m|h)", text.strip())
    if not parts or re.sub(r"\s", "", text) != "".join(number + unit for number, unit in parts):
        raise ConfigError(f"'{text}' is no length of time: write 90s, 20min, 2h or 1h30m")
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if seconds <= 0:
        raise ConfigError(f"'{text}' is no time to train in: write 20min, or 2h")
    return seconds


def budget_of(text: str | None, *, quiet: bool = False) -> Budget:
    """Return the budget that a user named, or the default one if `text` is None.

    Args:
        text: like "20min".
        quiet: say nothing of what is chosen.

    Raises:
        ConfigError: the text is no length of time.
    """
    tell = _silence if quiet else say
    return Budget(say=tell) if text is None else Budget(parse_duration(text), asked=True, say=tell)


def _silence(_: str) -> None:
    return None


def fits(budget: Budget, dataset: DomainDataset, given: Tree) -> bool:
    """Return whether sizes are chosen: a time was named, or nothing says what to train and a processor has to do it.

    Args:
        budget: of the request.
        dataset: its data; a data set with a preset of its own (digits) is small already.
        given: what the user said: presets, flags and assignments, merged.
    """
    if dataset.card.kind == "reviews":
        if budget.asked:
            raise ConfigError("--budget is for images; the length of a run on texts is --steps")
        return False
    if budget.asked:
        return True
    is_open = not any(_value(given, name) is not None for name in CHOSEN)
    return is_open and dataset.card.preset is None and budget.on_processor


def choose(
    budget: Budget,
    dataset: DomainDataset,
    build: Callable[[Tree], Config],
    given: Tree,
    *,
    members: int = 1,
) -> Tree:
    """Return the layer below what the user gave: on a processor the preset `small`, and sizes and a length that fit.

    A data set with a preset of its own (digits) keeps its network, size and batch; only the length is chosen.

    The largest image size is taken at which the sources can be passed over twenty times (300 to 5,000 steps); at that
    size, or the smallest, the run is as long as the time allows, up to twice that.

    Args:
        budget: the time.
        dataset: the data.
        build: makes the configuration of a layer with what the user gave on top.
        given: what the user gave, merged.
        members: runs for each target.

    Raises:
        ConfigError: what the user gave is wrong.
        ModelError: the backbone cannot be built at any size.
    """
    layer = _preset(budget, dataset)
    config = build(layer)
    protocol = _example(config, dataset)
    n_sources = max(1, len(protocol.sources))  # without any the run is refused later, with the reason
    if _value(given, "data.batch_size") is None and dataset.card.preset is None:
        batch = max(MIN_BATCH, min(config.data.batch_size, IMAGES_PER_STEP // n_sources))
        layer = merge_trees([layer, {"data": {"batch_size": batch}}])
        config = build(layer)
    per_step = config.data.batch_size * n_sources
    n_runs = members * (len(dataset.domains) if config.data.target == "all" else 1)
    available = budget.seconds / n_runs / MARGIN
    n_evaluated, n_trained = _numbers_of_images(protocol, config.data.test_mode)
    enough = max(3 * MIN_STEPS, min(MAX_STEPS, PASSES * n_trained // per_step))
    fixed = _value(given, "data.image_size") is not None or dataset.card.preset is not None
    size, image_s = _image_time(config, dataset, budget.measure, fixed=fixed)
    wanted_steps = _value(given, "train.steps")

    evaluated = (N_EVALUATIONS + 2) * n_evaluated / 3  # in images that are trained on; a forward pass is a third of it
    seconds = {size: image_s} if fixed else _scaled(config, dataset, size, image_s)

    def fitting(at: int) -> float:
        return (available / seconds[at] - evaluated) / per_step

    best = next((at for at in seconds if fitting(at) >= (wanted_steps or enough)), min(seconds))
    steps = wanted_steps or _rounded(max(MIN_STEPS, min(fitting(best), 2 * enough, MAX_STEPS)))
    every = max(1, steps // N_EVALUATIONS)
    layer = merge_trees([layer, {"data": {"image_size": best}, "train": {"steps": steps, "eval_every": every}}])
    layer = merge_trees([layer, _averaging(build(layer))])
    expected = n_runs * MARGIN * (steps * per_step + evaluated) * seconds[best]
    budget.say(_in_words(budget, build(layer), expected, n_runs, per_step * seconds[best]))
    return layer


def _preset(budget: Budget, dataset: DomainDataset) -> Tree:
    """Return what lies below sizes and length: `small` on a processor, unless the data set has a preset of its own."""
    return load_preset(PRESET) if budget.on_processor and dataset.card.preset is None else {}


def _averaging(config: Config) -> Tree:
    """Return where averaging begins in a run so short that the averager's own default is past the start step."""
    usual, start = AVERAGERS[config.averager.name].HYPERPARAMETERS.get("start"), config.start_step
    if usual is None or start is None or start >= int(usual.default):
        return {}
    return {"averager": {"params": {"start": config.averager.params.get("start", start)}}}


def taken_over(budget: Budget, dataset: DomainDataset, saved: Config) -> Tree:
    """Return the layer that chose what a run in the folder has, so that the same command finds it again."""
    chosen: Tree = {
        "data": {"image_size": saved.data.image_size, "batch_size": saved.data.batch_size},
        "train": {"steps": saved.train.steps, "eval_every": saved.train.eval_every},
    }
    return merge_trees([_preset(budget, dataset), chosen, _averaging(saved)])


def taken_over_text(folder: Path, saved: Config) -> str:
    """Return in words that sizes are those of a run that is there."""
    size = saved.data.image_size
    return f"{size} × {size} pixels and {saved.train.steps:,} steps, as chosen before for {folder}"


def _example(config: Config, dataset: DomainDataset) -> DomainProtocol:
    """Return the protocol of the first run; a target that there is not is refused later, with the nearest name."""
    target = dataset.domains[0] if config.data.target == "all" else config.data.target
    known = target if target in dataset.domains else "none"
    return make_protocol(config.model_copy(update={"data": config.data.model_copy(update={"target": known})}), dataset)


def _in_words(budget: Budget, config: Config, expected: float, n_runs: int, step_s: float) -> str:
    size = config.data.image_size
    what = f"{config.model.backbone}, {size} × {size} pixels, {config.data.batch_size} images per source"
    runs = f"{n_runs} runs of {config.train.steps:,} steps take" if n_runs > 1 else f"{config.train.steps:,} steps take"
    fit = "which fits" if expected <= 1.1 * budget.seconds else "which is the least and does not fit"
    text = (
        f"Chosen for {duration_text(budget.seconds)} on this machine ({step_s:.2g} s per step): {what}; {runs} about "
        f"{duration_text(expected)}, {fit}."
    )
    return text + ("" if budget.asked else " --budget 2h gives more time; --backbone, --image-size or --steps decide.")


def _numbers_of_images(protocol: DomainProtocol, test_mode: str) -> tuple[int, int]:
    """Return how many images each evaluation reads, and how many are trained on."""
    splits = protocol.splits
    evaluated = sum(len(part) for part in protocol.selection_sets().values())
    if test_mode == "in-domain":
        evaluated += sum(len(splits[domain].test) for domain in protocol.sources)
    elif protocol.target is not None:
        evaluated += len(splits[protocol.target].everything)
    return evaluated, sum(len(pool) for pool in protocol.train_pools().values())


def _image_time(
    config: Config, dataset: DomainDataset, measure: Callable[..., float], *, fixed: bool
) -> tuple[int, float]:
    """Return an image size that the backbone takes, and the seconds that training takes for each such image."""
    error: ModelError | None = None
    for size in [config.data.image_size, *(() if fixed else SIZES)]:
        try:
            seconds = measure(config, dataset, n_images=MEASURED_IMAGES, size=size)
        except ModelError as found:
            error = found
            continue
        return size, seconds / MEASURED_IMAGES
    assert error is not None
    raise error


def _scaled(config: Config, dataset: DomainDataset, measured: int, image_s: float) -> dict[int, float]:
    """Return the seconds that training takes for an image, by size, largest first: time goes with the arithmetic."""
    flops = {}
    for size in {*SIZES, measured}:
        try:
            flops[size] = training_flops(config.model.backbone, channels=dataset.card.channels, size=size)
        except ModelError:  # not a size of this backbone
            continue
    if measured not in flops:
        return {measured: image_s}
    return {size: image_s * flops[size] / flops[measured] for size in sorted(flops, reverse=True)}


def _value(tree: Mapping[str, Any], name: str) -> Any:
    section, _, key = name.partition(".")
    return tree.get(section, {}).get(key)


def _rounded(steps: float) -> int:
    """Return a number of steps with two digits, rounded down, so that a second measurement often gives it again.

    Example:
        >>> _rounded(1234.5), _rounded(87)
        (1200, 87)
    """
    unit = 10 ** max(0, len(str(int(steps))) - 2)
    return int(steps) // unit * unit

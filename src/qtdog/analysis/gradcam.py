"""Class-activation maps (Grad-CAM) of several runs on the same images, and whether they can be believed."""

from __future__ import annotations

import contextlib
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from torch import Tensor, nn
from torch.nn import functional

from qtdog.analysis.analyzed_run import AnalyzedRun, Images, domain_images
from qtdog.analysis.measurements import AnalysisResult, Measurements, escape_dollar, save_figure, write_result
from qtdog.core.errors import ConfigError, ModelError, extra
from qtdog.core.feature_maps import Stage
from qtdog.core.progress import Progress
from qtdog.core.random import numpy_stream
from qtdog.models.feature_layers import find_stages
from qtdog.models.network import Network

Maps = npt.NDArray[np.float32]


def heatmaps(network: Network, images: Tensor, classes: Sequence[int], *, stage: int = -1) -> Maps:
    """Return Grad-CAM heat maps (n, H, W) in [0, 1], each scaled to its own range.

    A map is ReLU(Σ_k w_k A_k), w_k the mean gradient of the class's logit with respect to channel k of a feature map,
    enlarged to the size of the image. Tokens of a transformer are put back in their places first, and those that belong
    to no place (class token, registers) left out.

    Source: Selvaraju et al., ICCV 2017, Eq. 1 and 2.

    Args:
        network: plain, in evaluation mode; its gradients are left as they are.
        images: prepared, (n, C, H, W), on the network's device.
        classes: of which class each map is (n,).
        stage: which feature map, as `models.feature_layers.find_stages` counts them; -1 for the last.

    Raises:
        ModelError: grad-cam is not installed, or the backbone has no feature maps.
        ConfigError: no such stage.
    """
    found = find_stages(network, (images.shape[1], images.shape[2], images.shape[3]))
    if not -len(found) <= stage < len(found):
        raise ConfigError(f"--stage {stage}: this backbone has {len(found)}, 0 to {len(found) - 1}, or -1 for the last")
    place = found[stage]
    cam_class, target_class = _grad_cam()
    layers = [_layer(network, place)]
    with _gradients_kept(network), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that it uses
        with cam_class(
            model=network, target_layers=layers, reshape_transform=lambda maps: as_images(maps, place)
        ) as cam:
            drawn = cam(input_tensor=images, targets=[target_class(int(label)) for label in classes])
    return np.asarray(drawn, dtype=np.float32)


def as_images(maps: Tensor, stage: Stage) -> Tensor:
    """Return a feature map as (n, C, H, W), whatever its layout.

    Raises:
        ModelError: tokens that make no square.

    Example:
        >>> as_images(torch.zeros(2, 5, 8), Stage("blocks.3", 8, axis=2, ndim=3)).shape  # a class token, then 2 × 2
        torch.Size([2, 8, 2, 2])
    """
    if stage.ndim == 4:
        return maps.movedim(stage.axis, 1)
    tokens = maps.movedim(stage.axis, 1)
    side = int(tokens.shape[2] ** 0.5)
    if side == 0:
        raise ModelError(f"the {tokens.shape[2]} tokens of '{stage.name}' belong to no positions in the image")
    return tokens[:, :, -side * side :].unflatten(2, (side, side))


def _layer(network: Network, stage: Stage) -> nn.Module:
    """Return the module whose output is mapped; of a transformer's block what goes into its attention.

    Behind its last block only the class token is read, so that the other tokens have no gradient there.
    """
    module = network.get_submodule(stage.name)
    inner = getattr(module, "norm1", None)
    return inner if stage.ndim == 3 and isinstance(inner, nn.Module) else module


def _grad_cam() -> tuple[Any, Any]:
    with extra("cam", "class-activation maps need grad-cam"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that it imports
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    return GradCAM, ClassifierOutputTarget


@contextlib.contextmanager
def _gradients_kept(network: nn.Module) -> Iterator[None]:
    """Put the parameters' gradients back, which grad-cam clears and fills."""
    before = [parameter.grad for parameter in network.parameters()]
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, grad in zip(network.parameters(), before, strict=True):
            parameter.grad = grad


Predict = Callable[[Tensor], Tensor]
BLUR_FRAC = 8  # the blurred image is averaged over an eighth of its side


@dataclass(frozen=True)
class Faithfulness:
    """Areas under two curves, in [0, 1].

    Attributes:
        deletion: mean probability of the class while the hottest pixels are taken away; low is faithful.
        insertion: while they are put into a blurred image; high is faithful.
    """

    deletion: float
    insertion: float


@torch.no_grad()
def faithfulness(predict: Predict, image: Tensor, heat: Tensor, label: int, *, n_steps: int = 16) -> Faithfulness:
    """Return deletion and insertion scores of one heat map.

    Taken away means replaced by 0, the mean color of a normalized image. The curves have `n_steps` + 1 points, from
    none to all of the pixels, in the order of the map, ties in the order of the pixels; the area is by the trapezoid
    rule.

    Source: Petsiuk et al., RISE, BMVC 2018, section 3.3.

    Args:
        predict: prepared images (n, C, H, W) → logits.
        image: prepared, (C, H, W).
        heat: the map, (H, W); only its order counts.
        label: the class of the map.
        n_steps: in how many portions the pixels go.

    Example:
        >>> image = torch.zeros(1, 4, 4)
        >>> image[0, 0, 0] = 1.0
        >>> sees = lambda images: torch.stack([images[:, 0, 0, 0] * 20 - 10, images[:, 0, 0, 0] * 0], 1)
        >>> found = faithfulness(sees, image, image[0], 0)  # the map points at the one pixel that counts
        >>> round(found.deletion, 2), round(found.insertion, 2)
        (0.03, 0.98)
    """
    order = heat.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    cuts = torch.linspace(0, len(order), n_steps + 1, device=order.device).round()
    taken = (rank[None] < cuts[:, None]).reshape(-1, 1, *heat.shape)
    deleted = torch.where(taken, torch.zeros_like(image), image)
    inserted = torch.where(taken, image, blurred(image))
    return Faithfulness(_area(predict, deleted, label), _area(predict, inserted, label))


def _area(predict: Predict, images: Tensor, label: int) -> float:
    curve = predict(images).double().softmax(1)[:, label]
    return ((curve[1:] + curve[:-1]) / 2).mean().item()


def blurred(image: Tensor) -> Tensor:
    """Return an image (C, H, W) averaged over squares of an eighth of its side: colors without shapes.

    Example:
        >>> blurred(torch.ones(3, 8, 8)).shape
        torch.Size([3, 8, 8])
    """
    half = max(1, image.shape[-1] // BLUR_FRAC // 2)
    padded = functional.pad(image[None], (half,) * 4, mode="replicate")
    return functional.avg_pool2d(padded, 2 * half + 1, stride=1)[0]


INCHES = 1.7


def draw_cam(
    pixels: Tensor, names: Sequence[str], maps: Mapping[str, Maps], answers: Mapping[str, Sequence[str]], folder: Path
) -> list[str]:
    """Draw the images, the maps of each run over them and what it predicts; return the names of the files.

    Args:
        pixels: uint8 (n, H, W, C).
        names: the true class of each image.
        maps: of each run by its label, (n, H, W) in [0, 1].
        answers: of each run by its label: the predicted class of each image, in words.
        folder: where to.
    """
    n_rows, n_columns = len(names), 1 + len(maps)
    size = (INCHES * n_columns + 0.6, (INCHES + 0.2) * n_rows + 0.4)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for row, (image, name) in enumerate(zip(pixels.numpy(), names, strict=True)):
        show_image(axes[row][0], image)
        axes[row][0].set_ylabel(escape_dollar(name), fontsize=8)
        for axis, (label, found) in zip(axes[row][1:], maps.items(), strict=True):
            show_image(axis, image)
            axis.imshow(found[row], cmap="inferno", alpha=0.55, vmin=0, vmax=1)
            axis.set_xlabel(escape_dollar(answers[label][row]), fontsize=7)
            if row == 0:
                axis.set_title(escape_dollar(label), fontsize=8, wrap=True)
    axes[0][0].set_title("image and its class", fontsize=8)
    scale = ScalarMappable(Normalize(0, 1), "inferno")
    figure.colorbar(scale, ax=axes, label="evidence for the true class", shrink=0.6, alpha=0.55)
    return save_figure(figure, folder, "cam")


def show_image(axis: Axes, image: np.ndarray) -> None:
    """Show a uint8 image (H, W, C), grey or in color, without ticks."""
    axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
    axis.set_xticks([])
    axis.set_yticks([])


SCORES = ("probability", "deletion", "insertion", "random_deletion", "random_insertion")


@dataclass(frozen=True)
class CamPlan:
    """Which maps are made.

    Attributes:
        domain: of the images; None for the target.
        n_images: that are scored.
        n_shown: that are drawn, the first of them.
        stage: which feature map.
        seed: of the images, and of the random maps that the scores are compared with.
    """

    domain: str | None = None
    n_images: int = 32
    n_shown: int = 6
    stage: int = -1
    seed: int = 0


def measure_cam(
    runs: Sequence[AnalyzedRun],
    plan: CamPlan,
    folder: Path,
    *,
    progress: Progress = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Map the true class of the same images for every run, score the maps, draw some; return what `analysis.json` says.

    Every map is compared with a random order of the pixels: a map that is no better points nowhere.

    Args:
        runs: runs of one data set and image size.
        plan: which maps.
        folder: where points, table and figure go.
        progress: reports images.
        check: called before each image; may raise to break off.

    Raises:
        ConfigError: the runs see different images, have no such domain, or no such stage.
        ModelError: grad-cam is not installed, or a backbone has no feature maps.
        RunError: the folder holds points of other settings, or cannot be written.
    """
    for run in runs:
        if run.model.info.preprocessing.max_tokens:
            raise ModelError(f"{run.folder.path} reads text: it has no feature maps to show")
    domain = _domain(runs, plan)
    images = domain_images(runs[0], domain, plan.n_images, plan.seed)
    if any(domain_images(run, domain, plan.n_images, plan.seed).keys != images.keys for run in runs):
        raise ConfigError("these runs hold back different images; compare runs of one target and one --trial")
    settings = {"domain": domain, "n_images": plan.n_images, "stage": plan.stage, "seed": plan.seed}
    points = Measurements(folder, ("run", "image"), SCORES, settings)
    for s, run in enumerate(runs):
        for i, key in enumerate(images.keys):
            if (run.id, key) not in points:
                check()
                points.add_((run.id, key), _scores(run, images, i, plan))
            if progress is not None:
                progress(s * len(images.keys) + i + 1, len(runs) * len(images.keys))
    shown = min(plan.n_shown, len(images.keys))
    maps = {run.label: _maps(run, images, range(shown), plan) for run in runs}
    names = [runs[0].dataset.classes[label] for label in images.labels[:shown]]
    answers = {run.label: _answers(run, images, range(shown)) for run in runs}
    result = AnalysisResult(
        kind="cam",
        title=f"Class-activation maps on {domain}",
        settings=settings,
        runs=[run.to_json() for run in runs],
        numbers=[_numbers(run, points, images) for run in runs],
        figures=draw_cam(images.pixels[:shown], names, maps, answers, folder),
        notes=(
            "Maps of the true class. deletion: low is faithful; insertion: high is faithful.",
            "random_*: the same scores when pixels go in random order; ± of a mean is over the images.",
        ),
    )
    return write_result(folder, result)


def _domain(runs: Sequence[AnalyzedRun], plan: CamPlan) -> str:
    first = runs[0]
    domain = plan.domain or first.target
    if domain is None or any(domain not in run.domains for run in runs):
        known = ", ".join(first.domains)
        raise ConfigError(f"--domain must be one that every run knows ({known}); runs without a target need it")
    if len({run.config.data.image_size for run in runs}) > 1:
        raise ConfigError("these runs see images of different sizes; compare maps of one --image-size")
    if len({run.target == domain for run in runs}) > 1:
        raise ConfigError(f"'{domain}' is the target of some of these runs and a source of others")
    return domain


def _prepared(run: AnalyzedRun, images: Images, places: Sequence[int]) -> Tensor:
    device = next(run.model.network.parameters()).device
    return run.model.prepare(images.pixels[list(places)]).to(device)


def _maps(run: AnalyzedRun, images: Images, places: Sequence[int], plan: CamPlan) -> Maps:
    labels = images.labels[list(places)].tolist()
    prepared = _prepared(run, images, places)
    return heatmaps(run.model.network, prepared, labels, stage=plan.stage)


@torch.no_grad()
def _answers(run: AnalyzedRun, images: Images, places: Sequence[int]) -> list[str]:
    best = [found.cpu() for found in run.model(_prepared(run, images, places)).softmax(1).max(1)]
    classes = run.dataset.classes
    return [f"predicted {classes[label]} ({100 * p:.0f} %)" for p, label in zip(*map(Tensor.tolist, best), strict=True)]


def _scores(run: AnalyzedRun, images: Images, i: int, plan: CamPlan) -> list[float]:
    image, label = _prepared(run, images, [i])[0], int(images.labels[i])
    with torch.no_grad():
        probability = run.model(image[None]).softmax(1)[0, label].item()
    heat = torch.from_numpy(_maps(run, images, [i], plan)[0]).to(image.device)
    blind = numpy_stream(plan.seed, "random map", images.keys[i]).random(tuple(heat.shape), dtype=np.float32)
    found = faithfulness(run.model, image, heat, label)
    control = faithfulness(run.model, image, torch.from_numpy(blind).to(image.device), label)
    return [probability, *_pair(found), *_pair(control)]


def _pair(scores: Faithfulness) -> tuple[float, float]:
    return scores.deletion, scores.insertion


def _numbers(run: AnalyzedRun, points: Measurements, images: Images) -> dict[str, Any]:
    rows = [row for row in points.of(run=run.id) if row["image"] in images.keys]
    numbers: dict[str, Any] = {"run": run.label, "n_images": len(rows)}
    for name in SCORES:
        values = [float(row[name]) for row in rows]
        numbers[name] = statistics.fmean(values)
        numbers[f"{name}_error"] = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return numbers

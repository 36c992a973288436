"""Class-activation maps of several runs on the same images of the target, and whether they can be believed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtdog.analysis.cam import Maps, heatmaps
from qtdog.analysis.cam_figure import draw_cam
from qtdog.analysis.faithfulness import Faithfulness, faithfulness
from qtdog.analysis.outcome import Outcome, write_outcome
from qtdog.analysis.points import Points
from qtdog.analysis.subject import Images, Subject, domain_images
from qtdog.core.errors import ConfigError, ModelError
from qtdog.core.progress import Progress
from qtdog.core.random import numpy_stream

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
    subjects: Sequence[Subject],
    plan: CamPlan,
    folder: Path,
    *,
    progress: Progress = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Map the true class of the same images for every run, score the maps, draw some; return what `analysis.json` says.

    Every map is compared with a random order of the pixels: a map that is no better points nowhere.

    Args:
        subjects: runs of one data set and image size.
        plan: which maps.
        folder: where points, table and figure go.
        progress: is told of images.
        check: called before each image; may raise to break off.

    Raises:
        ConfigError: the runs see different images, have no such domain, or no such stage.
        ModelError: grad-cam is not installed, or a backbone has no feature maps.
        RunError: the folder holds points of other settings, or cannot be written.
    """
    for subject in subjects:
        if subject.model.info.preprocessing.max_tokens:
            raise ModelError(f"{subject.folder.path} reads text: it has no feature maps to show")
    domain = _domain(subjects, plan)
    images = domain_images(subjects[0], domain, plan.n_images, plan.seed)
    if any(domain_images(subject, domain, plan.n_images, plan.seed).keys != images.keys for subject in subjects):
        raise ConfigError("these runs hold back different images; compare runs of one target and one --trial")
    settings = {"domain": domain, "n_images": plan.n_images, "stage": plan.stage, "seed": plan.seed}
    points = Points(folder, ("run", "image"), SCORES, settings)
    for s, subject in enumerate(subjects):
        for i, key in enumerate(images.keys):
            if (subject.id, key) not in points:
                check()
                points.add_((subject.id, key), _scores(subject, images, i, plan))
            if progress is not None:
                progress(s * len(images.keys) + i + 1, len(subjects) * len(images.keys))
    shown = min(plan.n_shown, len(images.keys))
    maps = {subject.label: _maps(subject, images, range(shown), plan) for subject in subjects}
    names = [subjects[0].dataset.classes[label] for label in images.labels[:shown]]
    outcome = Outcome(
        kind="cam",
        title=f"Class-activation maps on {domain}",
        settings=settings,
        runs=[subject.to_json() for subject in subjects],
        numbers=[_numbers(subject, points, images) for subject in subjects],
        figures=draw_cam(images.pixels[:shown], names, maps, folder),
        notes=(
            "Maps of the true class. deletion: low is faithful; insertion: high is faithful.",
            "random_*: the same scores when pixels go in random order; ± of a mean is over the images.",
        ),
    )
    return write_outcome(folder, outcome)


def _domain(subjects: Sequence[Subject], plan: CamPlan) -> str:
    first = subjects[0]
    domain = plan.domain or first.target
    if domain is None or any(domain not in subject.domains for subject in subjects):
        known = ", ".join(first.domains)
        raise ConfigError(f"--domain must be one that every run knows ({known}); runs without a target need it")
    if len({subject.config.data.image_size for subject in subjects}) > 1:
        raise ConfigError("these runs see images of different sizes; compare maps of one --image-size")
    if len({subject.target == domain for subject in subjects}) > 1:
        raise ConfigError(f"'{domain}' is the target of some of these runs and a source of others")
    return domain


def _prepared(subject: Subject, images: Images, places: Sequence[int]) -> Tensor:
    device = next(subject.model.network.parameters()).device
    return subject.model.prepare(images.pixels[list(places)]).to(device)


def _maps(subject: Subject, images: Images, places: Sequence[int], plan: CamPlan) -> Maps:
    labels = images.labels[list(places)].tolist()
    prepared = _prepared(subject, images, places)
    return heatmaps(subject.model.network, prepared, labels, stage=plan.stage)


def _scores(subject: Subject, images: Images, i: int, plan: CamPlan) -> list[float]:
    image, label = _prepared(subject, images, [i])[0], int(images.labels[i])
    with torch.no_grad():
        probability = subject.model(image[None]).softmax(1)[0, label].item()
    heat = torch.from_numpy(_maps(subject, images, [i], plan)[0]).to(image.device)
    blind = numpy_stream(plan.seed, "random map", images.keys[i]).random(tuple(heat.shape), dtype=np.float32)
    found = faithfulness(subject.model, image, heat, label)
    control = faithfulness(subject.model, image, torch.from_numpy(blind).to(image.device), label)
    return [probability, *_pair(found), *_pair(control)]


def _pair(scores: Faithfulness) -> tuple[float, float]:
    return scores.deletion, scores.insertion


def _numbers(subject: Subject, points: Points, images: Images) -> dict[str, Any]:
    rows = [row for row in points.of(run=subject.id) if row["image"] in images.keys]
    numbers: dict[str, Any] = {"run": subject.label, "n_images": len(rows)}
    for name in SCORES:
        values = [float(row[name]) for row in rows]
        numbers[name] = statistics.fmean(values)
        numbers[f"{name}_error"] = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return numbers

"""`qtdog distill`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qtdog.cli.flags import (
    AsJson,
    Assignments,
    Bits,
    Data,
    LearningRate,
    Presets,
    Resume,
    RunFolderOrNone,
    Steps,
    panel,
)

TARGET = "The unseen domain. Default: the one that the teacher held out."


def distill(
    teacher: Annotated[Path, typer.Argument(help="The model.safetensors of an ensemble, or of one model.")],
    *,
    data: Data = None,
    target: Annotated[str | None, panel("Problem", TARGET)] = None,
    preset: Presets = None,
    assign: Assignments = None,
    backbone: Annotated[str | None, panel("Method", "Of the student. Default: the teacher's.")] = None,
    weight: Annotated[float | None, panel("Method", "Of the teacher's answers against the labels.")] = None,
    temperature: Annotated[float | None, panel("Method", "Softens the answers of both.")] = None,
    quantizer: Annotated[str | None, panel("Method", "Of the student.")] = None,
    bits: Bits = None,
    steps: Steps = None,
    lr: LearningRate = None,
    seed: Annotated[int | None, panel("Training", "Of the student.")] = None,
    out: RunFolderOrNone = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Train one small student to the answers of an ensemble, on the source images alone.

    The student costs one model's memory and time, and keeps part of what the ensemble gains. Backbone, image size and
    unseen domain are the teacher's unless given. A teacher that was trained on the unseen domain is refused.

    Examples:
      qtdog distill runs/eoq/ensemble/model.safetensors --data photos/ --preset pacs-lite --out runs/student

      qtdog distill ensemble.safetensors --data photos/ --bits 5 --set objective.teacher_temperature=4
    """
    given = dict(locals())
    from qtdog.api.experiment import FLAGS, Request, make_plan
    from qtdog.cli.progress import CountingBar
    from qtdog.cli.train import announce, run_all, show
    from qtdog.ensemble.model import load_any

    info = load_any(teacher).info
    flags = {name: given[name] for name in FLAGS if name in given}
    flags["target"] = target or info.target_domain or "none"
    flags["backbone"] = backbone or info.backbone
    flags["image_size"] = info.preprocessing.image_size
    own = _assignments(teacher, weight, temperature)
    request = Request(flags, preset or (), [*own, *(assign or ())], out=out, resume=resume)
    dataset, plan = make_plan(request, CountingBar("reading images"))
    announce(dataset)
    results = run_all(dataset, plan, resume=resume)
    if as_json:
        from qtdog.cli.console import print_json

        print_json(results[0])
    else:
        show(results)


def _assignments(teacher: Path, weight: float | None, temperature: float | None) -> list[str]:
    path = str(teacher.resolve())
    values: dict[str, Any] = {"teacher": path, "teacher_weight": weight, "teacher_temperature": temperature}
    # JSON is YAML in which a path with a colon or a quote stays one text
    return [f"objective.{name}={json.dumps(value)}" for name, value in values.items() if value is not None]

"""`qtdog ensemble`, and what an ensemble costs."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtdog.cli.options import JsonOutput

if TYPE_CHECKING:
    from qtdog.ensemble.model import EnsembleModel, Member
    from qtdog.ensemble.scoring import EvaluationSet
    from qtdog.training.load_model import LoadedModel

KIND = (
    "eoq, eoa or ensemble keep all members; diwa and soup average them into one model. Default: what the members are."
)
OUT = "Folder or .safetensors file to write; result.json goes beside the file."
DATA = "Where the images are now, if not where the members' configuration says."
PICK = "Which members diwa and soup average: all, or greedily those that help on validation images of the sources."
REFIT = "Where a soup's step sizes start: with the least squared error, or as in the members' configuration."


class Pick(StrEnum):
    """Which members take part in an average."""

    UNIFORM = "uniform"
    GREEDY = "greedy"


class Refit(StrEnum):
    """Where the step sizes of a soup start."""

    INIT = "init"
    MSE = "mse"


def ensemble(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", metavar="RUN...")],
    *,
    out: Annotated[Path, typer.Option("--output", "-o", help=OUT)],
    kind: Annotated[str | None, typer.Option(help=KIND)] = None,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    pick: Annotated[Pick, typer.Option(help=PICK)] = Pick.UNIFORM,
    refit: Annotated[Refit, typer.Option(help=REFIT)] = Refit.MSE,
    tune: Annotated[int, typer.Option(min=0, help="Updates of a soup on the source domains afterwards.")] = 0,
    as_json: JsonOutput = False,
) -> None:
    """Make one model file of several finished runs, and measure it on their target and validation images.

    Examples:
      qtdog ensemble runs/five/c-seed* -o runs/five-eoq

      qtdog ensemble runs/float/c-seed* --kind diwa --pick greedy -o runs/diwa

      qtdog ensemble runs/five/c-seed* --kind soup --tune 300 -o runs/soup
    """
    from qtdog.cli.console import print_json
    from qtdog.ensemble.assemble import EnsembleSpec, assemble
    from qtdog.ensemble.model import check_alike, fitting_kind, read_member
    from qtdog.ensemble.weight_averaging import Recipe

    members = [read_member(run) for run in runs]
    check_alike(members)
    name = kind or fitting_kind(members)
    file = out if out.suffix == ".safetensors" else out / "model.safetensors"
    spec = EnsembleSpec(name, file, Recipe(pick.value, refit.value, tune))
    result = assemble(members, spec, find_evaluation_set(members, data))
    if as_json:
        print_json(result)
    else:
        _show(members, result, spec.file)


def find_evaluation_set(members: Sequence[Member], data: str | None) -> EvaluationSet | None:
    """Return the images to measure on: those in `data`, else where the members' configuration says if they are there.

    Raises:
        DataError: `data` is given and cannot be used, or its images are not those that the members were trained on.
    """
    from qtdog.cli.console import CountingBar, warn
    from qtdog.core.errors import DataError
    from qtdog.data.open import open_readable, recorded_source
    from qtdog.ensemble.model import share_splits
    from qtdog.ensemble.scoring import open_evaluation_set

    config = members[0].config
    try:
        progress, skip = CountingBar("decoding images"), config.data.skip_unreadable
        source = data or config.data.source
        with recorded_source(source, is_recorded=not data):
            dataset = open_readable(source, skip_unreadable=skip, min_domains=1, progress=progress)
        return open_evaluation_set(config, dataset, same_splits=share_splits(members), progress=progress)
    except DataError as error:
        if data is not None:
            raise
        warn(f"nothing is measured, because the images are not there: {error} Give --data")
        return None


def _show(members: Sequence[Member], result: dict[str, Any], file: Path) -> None:
    from qtdog.cli.console import out, print_table
    from qtdog.report.tables import cost_table
    from qtdog.runs.finished import KINDS, method_name

    runs = [{**member.result, "training_steps": member.config.train.steps} for member in members]
    first = method_name(members[0].config.model_dump())
    title = f"{KINDS[result['kind']].title} of {len(members)}"
    headers, rows = cost_table({f"{first}: mean of {len(members)}": runs, title: [result]})
    print_table(headers, rows, title="accuracy (%) on the whole unseen domain, and what it costs")
    if result["no_source_score"]:
        out.print(f"No score on the sources: {result['no_source_score']}.", soft_wrap=True)
    out.print(f"model  {file}", highlight=False, soft_wrap=True, markup=False)
    report = file.with_name("result.json")
    out.print(f"report {report} (by domain, each member)", highlight=False, soft_wrap=True, markup=False)


def ensemble_cost(path: Path, model: LoadedModel | EnsembleModel) -> dict[str, Any]:
    """Return kind, size and cost of an ensemble (`size`, `training_steps`, …, `inference_passes`); {} for one model."""
    from dataclasses import asdict

    from qtdog.ensemble.model import EnsembleModel
    from qtdog.packing.sizes import ensemble_sizes

    if not isinstance(model, EnsembleModel):
        return {}
    return {
        "kind": model.info.kind,
        "n_members": len(model.members),
        "size": asdict(ensemble_sizes(path)),
        "training_steps": model.info.training_steps,
        "training_runs": model.info.training_runs,
        "inference_passes": len(model.members),
    }


def show_cost(path: Path, model: LoadedModel | EnsembleModel) -> None:
    """Print to standard error what an ensemble costs beside one model; nothing for one model."""
    from qtdog.cli.console import err
    from qtdog.report.tables import cost_line

    found = ensemble_cost(path, model)
    if found:
        text = f"{found['kind']} of {found['n_members']} members: {cost_line(found['size'], found)}"
        err.print(text, highlight=False, markup=False, soft_wrap=True)

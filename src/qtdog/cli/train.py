"""`qtdog train`, `qtdog distill` and `qtdog dart`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtdog.cli.options import (
    LOG,
    OUT,
    AsJson,
    Assignments,
    Averager,
    Backbone,
    BatchSize,
    Bits,
    Data,
    ImageSize,
    LearningRate,
    Objective,
    Presets,
    Quantizer,
    Resume,
    RunFolderOrNone,
    Seed,
    StepRule,
    Steps,
    Trial,
    Weights,
    panel,
)

if TYPE_CHECKING:
    from qtdog.api.experiment import Planned
    from qtdog.core.config import Config


START = "First quantized step. Default: 40 % of the steps."
SKIP = "Leave out images that cannot be read; skipped.json in the run folder names them."
TARGET = "Unseen domain; 'all' for each in turn; 'none' to train on every domain (the model you deploy). Default none."
MEMBERS = "Train this many models, seeds SEED, SEED+1, …, and make one ensemble file of them."
ACCUMULATE = "Parts of a batch that are computed one after another, for less memory. Default 1."
ABSTAIN = "Share of the validation images that the stored threshold of confidence does not answer. Default 0.1."
SPLITS = "Whether all members hold out the same images for selection, or --trial counts up with the seed. Default same."
FORK_AT = "Train the float steps up to the start of quantization (or to STEP) once, for all members."


DRY = "Show the runs, the effective configuration and an estimate of the time; train nothing and write nothing."


BUDGET = (
    "Choose image size and number of steps so that everything takes about this long here, like 20min or 2h. Default: "
    "15min on a processor where no backbone, size or number of steps is given."
)


class Splits(StrEnum):
    """Which images the members of an ensemble hold out."""

    SAME = "same"
    DIFFERENT = "different"


def train(
    *,
    data: Data = None,
    target: Annotated[str | None, panel("Data", TARGET)] = None,
    trial: Trial = None,
    skip_unreadable: Annotated[bool | None, panel("Data", SKIP, "--skip-unreadable", show_default=False)] = None,
    image_size: ImageSize = None,
    preset: Presets = None,
    assign: Assignments = None,
    backbone: Backbone = None,
    weights: Weights = None,
    objective: Objective = None,
    step_rule: StepRule = None,
    averager: Averager = None,
    quantizer: Quantizer = None,
    bits: Bits = None,
    start_step: Annotated[int | None, panel("Method", START)] = None,
    steps: Steps = None,
    budget: Annotated[str | None, panel("Training", BUDGET, metavar="TIME")] = None,
    batch_size: BatchSize = None,
    accumulate: Annotated[int | None, panel("Training", ACCUMULATE, min=1)] = None,
    lr: LearningRate = None,
    seed: Seed = None,
    abstain: Annotated[float | None, panel("Training", ABSTAIN, min=0, max=0.99)] = None,
    members: Annotated[int, panel("Training", MEMBERS, min=1, max=100)] = 1,
    member_splits: Annotated[Splits, panel("Training", SPLITS)] = Splits.SAME,
    fork_at: Annotated[str | None, panel("Training", FORK_AT, metavar="start|STEP")] = None,
    out: RunFolderOrNone = None,
    log: Annotated[list[str] | None, panel("Run", LOG, metavar="LOGGER")] = None,
    resume: Resume = False,
    dry: Annotated[bool, panel("Run", DRY, "--dry-run")] = False,
    as_json: AsJson = False,
) -> None:
    """Train, select and save one small model; measure it on a domain that it never saw.

    Examples:
      qtdog train                                                     (embedded digits, trains on all domains)

      qtdog train --data photos/ --target hospital_c --budget 20min   (size and length that fit; default 15min on a CPU)

      qtdog train --data photos/ --target all -o runs/photos      (each domain unseen in turn, one table)

      qtdog train --data photos/ --target c --members 5 --fork-at start -o runs/five     (an ensemble of five)

      qtdog train --resume -o runs/photos-c                       (after a crash, or Ctrl-C)
    """
    given = dict(locals())
    from qtdog.api import experiment
    from qtdog.api.budget import budget_of
    from qtdog.cli.console import CountingBar, print_json

    flags = {name: given[name] for name in experiment.FLAGS}
    if abstain is not None:
        assign = [*(assign or ()), f"train.abstain={abstain}"]
    if accumulate is not None:
        assign = [*(assign or ()), f"train.accumulate={accumulate}"]
    wanted = experiment.Members(members, member_splits.value, fork_at)
    request = experiment.Request(flags, preset or (), assign or (), wanted, out, resume, budget=budget_of(budget))
    request = experiment.with_saved_members(request)
    dataset, plan = experiment.make_plan(request, CountingBar("reading images"))
    announce(dataset)
    if dry:
        dry_run(dataset, plan, as_json=as_json)
        return
    if out is not None and len(plan) > 1:
        experiment.keep_request(out, plan, request.members)
    results = train_shown(dataset, plan, resume=resume, loggers=log or ())
    ensembles = join_shown(dataset, plan, out) if request.members.number > 1 else []
    if out is not None and len(plan) > 1:
        experiment.keep_table(out, results, ensembles)
    if as_json:
        single = results[0] if len(results) == 1 else results
        print_json({"runs": results, "ensembles": ensembles} if ensembles else single)
    else:
        show(results, ensembles)


def dry_run(dataset: Any, plan: Sequence[Planned], *, as_json: bool) -> None:
    """Print what would be trained and where, with which configuration, and about how long it takes here."""
    from qtdog.api.budget import describe_run, estimate_runs, slow_warning
    from qtdog.cli.console import out, print_json, print_table, warn
    from qtdog.core.config_io import to_yaml

    first = plan[0].config
    runs = [
        {"target": one.config.data.target, "seed": one.config.train.seed, "state": _state(one)}
        | {"folder": str(one.folder.path)}
        for one in plan
    ]
    missing = [one.config for one, row in zip(plan, runs, strict=True) if row["state"] != "finished"]
    shared = sum(one.fork_point.step for one in plan if one.fork_point) * (len(plan) - 1) // len(plan)
    estimate = estimate_runs(missing, dataset, done_steps=shared)
    if as_json:
        cost = None if estimate is None else {"seconds": estimate.seconds, "step_s": estimate.step_s}
        print_json({"runs": runs, "config": first.model_dump(mode="json"), "estimate": cost})
        return
    out.print(to_yaml(first), highlight=False, markup=False, soft_wrap=True, end="")
    print_table(["unseen", "seed", "state", "folder"], [[str(value) for value in row.values()] for row in runs])
    out.print(describe_run(first, dataset), highlight=False, markup=False, soft_wrap=True)
    text = "nothing to train" if estimate is None else f"{len(missing)} to train: {estimate}"
    out.print(text, highlight=False, markup=False, soft_wrap=True)
    warning = slow_warning(first, dataset, len(missing)) if missing else None
    if warning:
        warn(warning)


def _state(planned: Planned) -> str:
    """Return what is in the folder of a planned run."""
    from qtdog.core.config import config_hash

    saved = planned.folder.read_config()
    if saved is None:
        return "new"
    if config_hash(saved) != config_hash(planned.config):
        return "other run there"
    return "unfinished" if planned.folder.read_result() is None else "finished"


def announce(dataset: Any) -> None:
    """Say which data set was recognized, and what differs from its dataset card."""
    from qtdog.cli.console import err, warn
    from qtdog.data.cards import check_counts

    n_domains, n_classes = len(dataset.domains), len(dataset.classes)
    what = "texts" if dataset.card.kind == "reviews" else "images"
    text = f"{dataset.card.title} — {len(dataset):,} {what}, {n_domains} domains, {n_classes} classes"
    err.print(text, highlight=False, soft_wrap=True)
    passed = dataset.passed_over
    if passed and passed.summary():
        err.print(passed.summary(), highlight=False, soft_wrap=True)
    for warning in [*check_counts(dataset), *dataset.notes, *(passed.problems() if passed else ())]:
        warn(warning)
    warn_skipped(dataset)


def warn_skipped(dataset: Any) -> None:
    """Say how many images are left out because they cannot be read; nothing if none is."""
    from qtdog.cli.console import warn

    if dataset.skipped:
        warn(f"{len(dataset.skipped):,} unreadable images are left out, such as {dataset.skipped[0][1]}")


def shown_progress() -> Any:
    """Return how runs report to somebody at a terminal: bars and warnings on standard error."""
    from qtdog.cli.console import CountingBar, TrainingBar, warn
    from qtdog.training.run import RunCallbacks

    return RunCallbacks(TrainingBar(), CountingBar("decoding images"), warn, CountingBar("quantizing after training"))


def train_shown(
    dataset: Any, plan: Sequence[Any], *, resume: bool, loggers: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Make every planned run with progress on standard error (`api.experiment.train_runs`)."""
    from qtdog.api.experiment import train_runs
    from qtdog.cli.console import SPEAKS

    return train_runs(dataset, plan, shown_progress(), resume=resume, loggers=loggers if SPEAKS else ())


def join_shown(dataset: Any, plan: Sequence[Any], out: Path | None) -> list[dict[str, Any]]:
    """Make the ensemble of each target (`api.experiment.join_targets`); of several processes the first one does."""
    from qtdog.api.experiment import join_targets
    from qtdog.cli.console import SPEAKS

    return join_targets(dataset, plan, out, shown_progress()) if SPEAKS else []


def show(results: Sequence[dict[str, Any]], ensembles: Sequence[dict[str, Any]] = ()) -> None:
    """Print the table of finished runs, and where their files are."""
    from qtdog.api.experiment import result_table
    from qtdog.cli.console import out, print_table

    title = "accuracy (%) on the whole unseen domain, checkpoint by source validation"
    first = results[0]
    if first["selection"] != "source":
        title = f"accuracy (%) on the whole unseen domain, checkpoint by '{first['selection']}'"
    if first["test_mode"] == "in-domain":
        title = "accuracy (%) on the last 20 % of each source domain (in-domain)"
    headers, rows = result_table(results, ensembles)
    print_table(headers, rows, title=title)
    if ensembles and ensembles[0]["no_source_score"]:
        out.print(f"No score of the ensemble on the sources: {ensembles[0]['no_source_score']}.", soft_wrap=True)
    if first["test_accuracy"] is None:
        out.print("No domain was held out, so nothing says how well it transfers; --target all measures that.")
    _show_mistakes(ensembles or results)
    for result in [*results, *ensembles]:
        for line in _where_to_look(result):
            out.print(line, highlight=False, soft_wrap=True)


def _show_mistakes(results: Sequence[Mapping[str, Any]]) -> None:
    """Show how sure each accuracy is, of a single run also those of the sources, and the classes it errs most in."""
    from qtdog.cli.console import print_table
    from qtdog.cli.predict import show_worst_classes
    from qtdog.report.tables import percent
    from qtdog.runs.statistics import percent_range, share_interval

    test, source = {}, {}
    for result in results:
        test |= result.get("classes", {}).get("test", {})
    if len(results) == 1:
        source = results[0].get("classes", {}).get("source", {})
    unseen = "in-domain" if results[0].get("test_mode") == "in-domain" else "unseen"
    rows = []
    for role, domains in ((unseen, test), ("validation images", source)):
        for domain, classes in domains.items():
            right, n = (sum(one[key] for one in classes) for key in ("right", "n"))
            if not n:
                continue
            rows.append([domain, role, percent(right / n), percent_range(share_interval(right / n, n)), f"{n:,}"])
    if rows:
        print_table(["domain", "role", "accuracy (%)", "95 % interval", "images"], rows)
        show_worst_classes(test or source)


def _where_to_look(result: dict[str, Any]) -> list[str]:
    from qtdog.report.tables import percent

    folder, each = result["folder"], "member" if "members" in result else "layer"
    kept = f" ({result['kept']})" if "kept" in result else ""
    lines = [
        f"model  {folder}/model.safetensors{kept}",
        f"report {folder}/result.json (accuracies, sizes, each {each})",
    ]
    if "after_training" in result:
        before = result["after_training"]["float"]
        source, test = percent(before["source_accuracy"]), percent(before["test_accuracy"])
        lines.append(f"       in float, before quantization: source {source}, test {test}")
    return lines + _what_is_answered(result.get("calibration", {}))


def _what_is_answered(calibration: Mapping[str, Any]) -> list[str]:
    """Return in words what the threshold of confidence answers and errs; nothing in a result from before it was."""
    threshold = calibration.get("accept_threshold")
    if threshold is None:
        return []
    parts = []
    for part, images in (("source", "of the validation images"), ("test", "of the test images")):
        found = calibration.get(part, {}).get("accept")
        if found is not None:
            parts.append(f"{found['coverage']:.1%} {images} answered, {found['error']:.1%} of them wrong")
    return [f"       probability ≥ {threshold:.3f}: {'; '.join(parts)}"]


TEACHER = (
    "Model file of an ensemble or of one model, or the folder that it is in; or a backbone: a name of 'qtdog list "
    "backbones', or torchvision/NAME."
)
STUDENT_WEIGHT = "Weight of the teacher's answers; the labels have the rest. Default 0.9."
STUDENT_TEMPERATURE = "Temperature that softens the answers of both. Default 2."
STUDENT_QUANTIZER = "Quantizer of the student, or 'none' for a float one. Default lsq."
DISTILL_TARGET = "The unseen domain. Default: the one that the teacher held out."


def distill(
    teacher: Annotated[str | None, typer.Argument(help=TEACHER, metavar="[TEACHER]")] = None,
    *,
    named: Annotated[str | None, typer.Option("--teacher", help="The same as TEACHER.", metavar="NAME_OR_FILE")] = None,
    data: Data = None,
    target: Annotated[str | None, panel("Data", DISTILL_TARGET)] = None,
    preset: Presets = None,
    assign: Assignments = None,
    backbone: Annotated[str | None, panel("Method", "Backbone of the student. Default: the teacher's.")] = None,
    weight: Annotated[float | None, panel("Method", STUDENT_WEIGHT)] = None,
    temperature: Annotated[float | None, panel("Method", STUDENT_TEMPERATURE)] = None,
    quantizer: Annotated[str | None, panel("Method", STUDENT_QUANTIZER)] = None,
    bits: Bits = None,
    steps: Steps = None,
    lr: LearningRate = None,
    seed: Annotated[int | None, panel("Training", "Seed of the student. Default 0.")] = None,
    out: RunFolderOrNone = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Train one small student on the answers of an ensemble, or of a pretrained backbone, for the source images alone.

    The student costs one model's memory and time, and keeps part of what the ensemble gains. Backbone, image size and
    unseen domain are the teacher's unless given. A teacher that was trained on the unseen domain is refused.

    Examples:
      qtdog distill runs/five/c-eoq --data photos/ --preset pacs-lite -o runs/student

      qtdog distill ensemble.safetensors --data photos/ --bits 5 --set objective.teacher_temperature=4

      qtdog distill --teacher tf_efficientnet_lite2 --data photos/ --target c --set objective.teacher_mode=cosine
    """
    given = dict(locals())
    from qtdog.api.experiment import FLAGS, Request, make_plan
    from qtdog.cli.console import CountingBar
    from qtdog.core.errors import ConfigError
    from qtdog.ensemble.model import load
    from qtdog.runs.find import find_model
    from qtdog.training.protocol import is_backbone

    if (named is None) == (teacher is None):
        raise ConfigError("give one teacher: TEACHER, or --teacher NAME_OR_FILE, which means the same")
    named = named or str(teacher)
    flags = {name: given[name] for name in FLAGS if name in given}
    if not Path(named).exists() and is_backbone(named):
        own = _assignments(named, weight, temperature)
    else:
        model = find_model(Path(named))
        info = load(model).info
        flags["target"] = target or info.target_domain or "none"
        flags["backbone"] = backbone or info.backbone
        flags["image_size"] = info.preprocessing.image_size
        own = _assignments(str(model.resolve()), weight, temperature)
    request = Request(flags, preset or (), [*own, *(assign or ())], out=out, resume=resume)
    dataset, plan = make_plan(request, CountingBar("reading images"))
    announce(dataset)
    results = train_shown(dataset, plan, resume=resume)
    if as_json:
        from qtdog.cli.console import print_json

        print_json(results[0])
    else:
        show(results)


def _assignments(teacher: str, weight: float | None, temperature: float | None) -> list[str]:
    values: dict[str, Any] = {"teacher": teacher, "teacher_weight": weight, "teacher_temperature": temperature}
    # JSON is YAML in which a path with a colon or a quote stays one text
    return [f"objective.{name}={json.dumps(value)}" for name, value in values.items() if value is not None]


DART_TARGET = "Unseen domain; 'none' to train on every domain. Default none."
BRANCH = (
    "A branch, by what is its own: 'data.augment=none', or several values with ';' between them. Give it once for each "
    "branch. Default: a branch for each source domain, which gets half of its batches (data.focus)."
)
BRANCH_STEPS = "Number of updates of each branch. Default 5000, or what the data set's preset says."
MERGE = "Number of steps between merges. Default: a tenth of the steps."


def dart(
    *,
    data: Data = None,
    target: Annotated[str | None, panel("Data", DART_TARGET)] = None,
    preset: Presets = None,
    assign: Assignments = None,
    branch: Annotated[list[str] | None, panel("Method", BRANCH, metavar="KEY=VALUE[;…]")] = None,
    merge_every: Annotated[int | None, panel("Method", MERGE, min=1)] = None,
    quantizer: Quantizer = None,
    bits: Bits = None,
    steps: Annotated[
        int | None,
        panel("Training", BRANCH_STEPS),
    ] = None,
    lr: LearningRate = None,
    seed: Annotated[int | None, panel("Training", "Seed of the first branch. Default 0.")] = None,
    out: Annotated[Path, panel("Run", OUT, "--output", "-o")],
    resume: Annotated[bool, panel("Run", "Continue with what is in the folder.", "--resume")] = False,
    as_json: AsJson = False,
) -> None:
    """Train branches side by side, average their weights every so often, and save one network (DART, CVPR 2023).

    The branches begin alike and differ in what they see: by default each gets half of its batches from a source domain
    of its own. It costs as many times the training as there are branches, and all of them lie in memory at once; one
    model is saved.

    Examples:
      qtdog dart --data photos/ --target c --preset pacs-lite -o runs/dart

      qtdog dart --data photos/ --target c --branch data.augment=none --branch objective.name=coral -o runs/two
    """
    given = dict(locals())
    from qtdog.api.experiment import FLAGS, Request, make_plan
    from qtdog.cli.console import CountingBar, TrainingBar, print_json, warn
    from qtdog.core.errors import ConfigError
    from qtdog.runs.finished import method_name
    from qtdog.training.dart import dart as train_branches
    from qtdog.training.protocol import source_domains
    from qtdog.training.run import RunCallbacks

    flags = {name: given[name] for name in FLAGS if name in given}
    dataset, plan = make_plan(Request(flags, preset or (), assign or (), out=out), CountingBar("reading images"))
    if len(plan) > 1:
        raise ConfigError("dart takes one --target at a time")
    config = plan[0].config
    configs = _branches(config, source_domains(config, dataset), branch or ())
    announce(dataset)
    callbacks = RunCallbacks(TrainingBar(), CountingBar("decoding images"), warn)
    every = merge_every or max(1, config.train.steps // 10)
    result = train_branches(configs, dataset, out, merge_every=every, resume=resume, callbacks=callbacks)
    about = {"method": f"{method_name(config.model_dump())}, dart", "folder": str(out)}
    result |= about | {"training_steps": config.train.steps * len(configs)}
    print_json(result) if as_json else show([result])


def _branches(config: Config, sources: Sequence[str], texts: Sequence[str]) -> list[Config]:
    """Return the configuration of each branch: one start, seeds counted up, and what is its own."""
    from qtdog.core.config_io import build_config, parse_assignment

    own: list[list[dict[str, Any]]] = [[parse_assignment(one) for one in text.split(";")] for text in texts]
    own = own or [[{"data": {"focus": source}}] for source in sources]
    configs = []
    for number, changes in enumerate(own):
        common = {"train": {"seed": config.train.seed + number}, "model": {"init_seed": config.init_seed}}
        configs.append(build_config([config.model_dump(), common, *changes]))
    return configs

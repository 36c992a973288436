"""`qtdog.train` and what it returns: results that show themselves, with numbers, table, curves and model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from qtdog.api.budget import budget_of
from qtdog.api.display import as_frame, python_progress
from qtdog.api.experiment import (
    Members,
    Request,
    join_targets,
    keep_request,
    keep_table,
    make_plan,
    train_runs,
    with_saved_members,
)
from qtdog.api.python_words import in_python
from qtdog.api.trained_model import TrainedModel, load
from qtdog.core.config import Config
from qtdog.core.config_io import Tree
from qtdog.core.errors import Interrupted, RunError
from qtdog.core.progress import RunCallback
from qtdog.data.dataset import DomainDataset
from qtdog.runs.finished import method_name
from qtdog.runs.folder import RunFolder
from qtdog.runs.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGINT_CODE = 130
ShowsProgress = bool | RunCallback | Callable[[int, int, float], None]


class RunResult:
    """One finished run or ensemble.

    Args:
        result: its `result.json`, with `folder` and `method`.
    """

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.result = dict(result)
        self.folder = Path(self.result["folder"])

    @classmethod
    def read(cls, folder: str | Path) -> RunResult:
        """Return the result in a run folder.

        Raises:
            RunError: there is no finished run.
        """
        run = RunFolder(Path(folder))
        result = run.read_result()
        if result is None:
            raise RunError(f"there is no finished run in {folder}")
        config = run.read_config()
        method = result.get("kind", "ensemble") if config is None else method_name(config.model_dump())
        return cls({"method": method} | result | {"folder": str(folder)})

    @property
    def method(self) -> str:
        """A short name of what was trained."""
        return self.result["method"]

    @property
    def target(self) -> str | None:
        """The unseen domain; None if every domain was trained on."""
        return self.result["target_domain"]

    @property
    def accuracy(self) -> float | None:
        """Accuracy on the whole unseen domain, as a fraction; None if all were trained on (`source_accuracy`)."""
        return self.result["test_accuracy"]

    @property
    def source_accuracy(self) -> float | None:
        """Mean accuracy on the validation images of the sources, as a fraction, at the checkpoint that is kept."""
        return self.result["source_accuracy"]

    @property
    def is_ensemble(self) -> bool:
        """Whether this is an ensemble of runs."""
        return "members" in self.result

    @cached_property
    def config(self) -> Config:
        """The effective configuration (RunError for an ensemble, which has none of its own)."""
        config = RunFolder(self.folder).read_config()
        if config is None:
            raise RunError(f"{self.folder} has no configuration: ask its members")
        return config

    @cached_property
    def records(self) -> list[Record]:
        """All evaluations on the way; none for an ensemble."""
        return [] if self.is_ensemble else RunFolder(self.folder).read_metrics()

    @cached_property
    def model(self) -> TrainedModel:
        """The model that was kept, on the CPU."""
        return load(self.folder)

    def rows(self) -> list[dict[str, Any]]:
        """Return a dictionary for each evaluation: step, training loss, accuracy of sources and unseen domain."""
        return [
            {"step": record.seen.step, "train_loss": record.train_loss}
            | {"source_accuracy": record.seen.source_accuracy, "accuracy": record.test_accuracy}
            for record in self.records
        ]

    def table(self) -> Any:
        """Return the evaluations as a pandas DataFrame, or as dictionaries where pandas is not installed."""
        return as_frame(self.rows())

    def summary(self) -> dict[str, Any]:
        """Return the result in one row; accuracies as fractions."""
        size = self.result.get("size", {})
        about = {"method": self.method, "target": self.target, "accuracy": self.accuracy}
        return about | {"source_accuracy": self.source_accuracy, "bytes": size.get("bytes"), "folder": str(self.folder)}

    def plot(self, path: str | Path | None = None) -> Figure:
        """Return a figure of the accuracies over the steps, also written to `path` if that is given."""
        return _plot([self], path)

    def __repr__(self) -> str:
        return f"RunResult({_in_words(self)}: {self.folder})"

    def _repr_html_(self) -> str | None:
        return as_frame([self.summary()], html=True)


class RunResults(Sequence[RunResult]):
    """The results of several runs: one for each target and member, and of the ensembles made of them.

    Args:
        runs: in the order of training.
        ensembles: one for each target; none without members.
    """

    def __init__(self, runs: Sequence[RunResult], ensembles: Sequence[RunResult] = ()) -> None:
        self.runs, self.ensembles = tuple(runs), tuple(ensembles)

    @overload
    def __getitem__(self, index: int) -> RunResult: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RunResult]: ...
    def __getitem__(self, index: int | slice) -> RunResult | Sequence[RunResult]:
        return self.runs[index]

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[RunResult]:
        return iter(self.runs)

    @property
    def accuracy(self) -> float | None:
        """Mean accuracy on the unseen domains, of the ensembles if there are any; None without an unseen domain."""
        models = self.ensembles or self.runs
        found = [run.accuracy for run in models if run.accuracy is not None]
        return sum(found) / len(found) if len(found) == len(models) else None

    @property
    def model(self) -> TrainedModel:
        """The model of the one ensemble (RunError if there are several to choose from)."""
        models = self.ensembles or self.runs
        if len(models) != 1:
            raise RunError(f"there are {len(models)} models, one for each target or member: take one, like [0].model")
        return models[0].model

    def rows(self) -> list[dict[str, Any]]:
        """Return a dictionary for each run, then for each ensemble."""
        return [run.summary() for run in (*self.runs, *self.ensembles)]

    def table(self) -> Any:
        """Return the rows as a pandas DataFrame, or as they are where pandas is not installed."""
        return as_frame(self.rows())

    def plot(self, path: str | Path | None = None) -> Figure:
        """Return a figure of the accuracies over the steps, a panel per target; also written to `path` if given."""
        return _plot(self.runs, path)

    def __repr__(self) -> str:
        lines = [_in_words(run) for run in (*self.runs, *self.ensembles)]
        return "\n".join([f"RunResults of {len(self.runs)} runs:", *(f"  {line}" for line in lines)])

    def _repr_html_(self) -> str | None:
        return as_frame(self.rows(), html=True)


def _in_words(run: RunResult) -> str:
    if run.accuracy is None:
        source = run.source_accuracy
        return f"{run.method}, no unseen domain" + ("" if source is None else f", source accuracy {100 * source:.1f} %")
    return f"{run.method}, unseen domain {run.target}: accuracy {100 * run.accuracy:.1f} %"


def _plot(runs: Sequence[RunResult], path: str | Path | None) -> Figure:
    from qtdog.report.charts import Curve, curves_figure

    several = len({(run.method, run.target) for run in runs}) < len(runs)
    curves = [
        Curve(
            f"{run.method}, seed {run.config.train.seed}" if several else run.method,
            run.target or "none",
            run.records,
            run.config.start_step,
        )
        for run in runs
        if not run.is_ensemble
    ]
    if not curves:
        raise RunError("an ensemble has no steps to plot: plot its members")
    figure = curves_figure(curves)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    return figure


@in_python
def train(
    data: str | Path | DomainDataset | None = None,
    target: str | None = None,
    *,
    preset: str | Sequence[str] = (),
    config: Config | None = None,
    out: str | Path | None = None,
    budget: str | None = None,
    members: int = 1,
    member_splits: str = "same",
    fork_at: str | int | None = None,
    resume: bool = False,
    progress: ShowsProgress = True,
    log: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    **options: Any,
) -> RunResult | RunResults:
    """Train, select and keep one small model; measure it on a domain that it never saw.

    Args:
        data: a data set's name, a folder ROOT/DOMAIN/CLASS/image, a list, or a `qtdog.Dataset`. Default: the
            embedded rotated digits.
        target: the unseen domain; "all" for each in turn; None or "none" to train on every domain.
        preset: names (`qtdog list presets`) or YAML files; later ones win.
        config: a whole configuration below all other options, instead of the defaults.
        out: the run folder, or the folder of run folders if there are several. Default: `runs/HASH`.
        budget: choose image size and number of steps so that everything takes about this long here, like "20min".
            Default: 15 minutes on a processor where no backbone, size or number of steps is given.
        members: train so many models, seeds counted up, and make one ensemble of those of each target.
        member_splits: "same" validation images for all members, or "different".
        fork_at: train the float steps up to "start" (of quantization) or to a step once, for all members.
        resume: go on with unfinished runs in `out`; without other options their saved configuration is used.
        progress: True for bars, False for silence, a `RunCallback`, or a function f(step, steps, loss).
        log: "tensorboard", "wandb", "mlflow".
        plugins: Python files that register members (`qtdog.register`); they are run.
        options: names of the configuration (`qtdog list options`): `steps=2000`, `bits=4`, `lr=1e-4`,
            `train={"eval_every": 100}`.

    Returns:
        the result; several for several targets or members. A finished run of the same configuration is not trained
        again.

    Raises:
        ConfigError: an option that there is not, with the nearest one, or a value out of range.
        DataError, ModelError, RunError: the text says what to do.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written first, and `resume=True` goes on from it.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> result = train(target="75", preset="lsq-sma", steps=4, batch_size=2, out=folder, progress=False)
        >>> result.method, result.target, result.rows()[-1]["step"]
        ('erm + sma + lsq 7 bit', '75', 4)
    """
    source = None if data is None or isinstance(data, DomainDataset) else str(data)
    dataset = data if isinstance(data, DomainDataset) else None
    presets: list[str | Tree] = [preset] if isinstance(preset, str) else list(preset)
    if config is not None:
        presets.insert(0, config.model_dump(mode="json"))
    folder = None if out is None else Path(out)
    wanted = Members(members, member_splits, None if fork_at is None else str(fork_at))
    flags = {"data": source, "target": target} | options
    allowed = budget_of(budget, quiet=progress is False)
    request = with_saved_members(Request(flags, presets, (), wanted, folder, resume, dataset, plugins, allowed))
    callbacks = python_progress(progress)
    dataset, plan = make_plan(request, callbacks.progress)
    if folder is not None and len(plan) > 1:
        keep_request(folder, plan, request.members)
    try:
        results = train_runs(dataset, plan, callbacks, resume=resume, loggers=log)
        ensembles = join_targets(dataset, plan, folder, callbacks) if request.members.number > 1 else []
    except Interrupted as error:
        if error.exit_code != SIGINT_CODE:
            raise
        raise KeyboardInterrupt(str(error)) from error
    if folder is not None and len(plan) > 1:
        keep_table(folder, results, ensembles)
    runs = [RunResult(result) for result in results]
    if len(runs) == 1:
        return runs[0]
    return RunResults(runs, [RunResult(cast(Mapping[str, Any], result)) for result in ensembles])

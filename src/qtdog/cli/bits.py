"""`qtdog bits`."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from qtdog.cli.options import (
    AsJson,
    Assignments,
    Averager,
    Backbone,
    BatchSize,
    Data,
    ImageSize,
    LearningRate,
    Objective,
    Presets,
    Seed,
    StepRule,
    Trial,
    Weights,
    panel,
)

if TYPE_CHECKING:
    from qtdog.analysis.bit_plan import BitPlan, Candidate, Choice
    from qtdog.analysis.bit_search import LayerChoice
    from qtdog.data.dataset import DomainDataset


def choice_table(choice: Choice) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows, a row per candidate; the recommended one has a star.

    Example:
        >>> from qtdog.analysis.bit_plan import BitTrial, choose
        >>> measured = [("a", 0.5), ("b", 0.7)]
        >>> trials = [BitTrial(4, domain, accuracy, 0.25, 0.1, 1.0, 2000) for domain, accuracy in measured]
        >>> choice_table(choose(trials))[1]
        [['4 *', '50.0', '70.0', '60.0 ± 10.0', '0.0 ± 0.0', '0.25 ± 0.07', '0.002 MB']]
    """
    headers = ["bits", *choice.candidates[0].accuracies, "mean", "behind best", "flatness", "file"]
    return headers, [_row(candidate, choice) for candidate in choice.candidates]


def _row(candidate: Candidate, choice: Choice) -> list[str]:
    from qtdog.report.tables import percent

    name = f"{candidate.bits} *" if candidate.bits == choice.bits else str(candidate.bits)
    accuracies = [percent(accuracy) for accuracy in candidate.accuracies.values()]
    if candidate.accuracy is None:
        return [name, *accuracies, "failed", "–", "–", "–"]
    return [
        name,
        *accuracies,
        f"{percent(candidate.accuracy)} ± {percent(candidate.standard_error)}",
        f"{percent(candidate.behind)} ± {percent(candidate.behind_error)}",
        f"{candidate.flatness:.3g} ± {candidate.flatness_error:.1g}",
        f"{(candidate.n_bytes or 0) / 1e6:.3g} MB",
    ]


def layer_table(choice: LayerChoice) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows, a row per layer."""
    rows = [
        [
            " = ".join(layer.names),
            f"{layer.curvature.n_weights:,}",
            f"{layer.curvature.mean:.2e} ± {layer.curvature.standard_error / layer.curvature.n_weights:.0e}",
            f"{choice.cost_of(bits, layer):.2e}",
            str(bits),
        ]
        for layer, bits in zip(choice.layers, choice.bits, strict=True)
    ]
    return ["layer", "weights", "mean curvature", "expected cost", "bits"], rows


def train_line(given: Mapping[str, Any], presets: Sequence[str], choice: int | Mapping[str, int]) -> str:
    """Return the command that uses the choice.

    Args:
        given: the options of `qtdog bits`.
        presets: names or files, in order.
        choice: the number of bits, or those of each layer, which the last preset holds.

    Example:
        >>> train_line({"data": "my photos", "lr": None, "assign": ["train.seed=1"]}, ["pacs-lite"], 6)
        "qtdog train --data 'my photos' --preset pacs-lite --set train.seed=1 --bits 6"
    """
    from qtdog.api.experiment import FLAGS

    words = ["qtdog", "train"]
    for name in FLAGS:
        if given.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", str(given[name])]
    words += [word for name in presets for word in ("--preset", name)]
    # --set wins over everything, and must not win over the choice
    replaced = "quantizer.bits=" if isinstance(choice, int) else "quantizer.layer_bits="
    assigned = [text for text in given["assign"] or () if not text.startswith(replaced)]
    words += [word for text in assigned for word in ("--set", text)]
    return shlex.join(words + (["--bits", str(choice)] if isinstance(choice, int) else []))


TARGET = "The domain that the model is for: none of its images is opened; 'none' if every domain is a source."
START = "First quantized step; the float steps before it are shared by all candidates. Default: 40 % of the steps."
BRIEF = "Quantized steps of each candidate. Default: a quarter of those of the whole run."
GAMMA = "Radius of the flatness. Default: 5 % of the length of the float weights."
SHIFT = (
    "Score candidates on validation images of their own sources under this corruption (noise, blur, weather, "
    "digital, jpeg, a member of one of these, or 'all'), all five severities, instead of on the source left out. May "
    "be given several times."
)
BUDGET = "Bits per weight on average, for --mode mixed."
DIRECTIONS = "Number of random directions of the flatness."
VECTORS = "Number of random vectors of the curvature (--mode mixed)."
MODE = "Choose one bit-width for the network (uniform) or one per layer (mixed)."
QUANTIZER = "Quantizer with a grid that trains (see 'qtdog list quantizers'). Default lsq."
STEPS = "Number of updates of the run that the bits are for. Default 5000, or what the data set's preset says."
OUT = "Folder of all runs; the same command with the same folder goes on. Default: runs/bits-<hash>."
LAYER_BITS = "layer_bits.yaml"


class Mode(StrEnum):
    """One number of bits for the network, or one for each layer."""

    UNIFORM = "uniform"
    MIXED = "mixed"


def bits(
    *,
    mode: Annotated[Mode, panel("Choice", MODE)] = Mode.UNIFORM,
    candidates: Annotated[str, panel("Choice", "Bit-widths that are tried, separated by commas.")] = "8,7,6,5,4",
    brief_steps: Annotated[int | None, panel("Choice", BRIEF)] = None,
    gamma: Annotated[float | None, panel("Choice", GAMMA)] = None,
    directions: Annotated[int, panel("Choice", DIRECTIONS, "--num-directions")] = 20,
    budget: Annotated[float | None, panel("Choice", BUDGET)] = None,
    shift: Annotated[list[str] | None, panel("Choice", SHIFT)] = None,
    vectors: Annotated[int, panel("Choice", VECTORS, "--num-vectors", min=2)] = 20,
    data: Data = None,
    target: Annotated[str | None, panel("Data", TARGET)] = None,
    trial: Trial = None,
    image_size: ImageSize = None,
    preset: Presets = None,
    assign: Assignments = None,
    backbone: Backbone = None,
    weights: Weights = None,
    objective: Objective = None,
    step_rule: StepRule = None,
    averager: Averager = None,
    quantizer: Annotated[str | None, panel("Method", QUANTIZER)] = None,
    start_step: Annotated[int | None, panel("Method", START)] = None,
    steps: Annotated[int | None, panel("Training", STEPS)] = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    seed: Seed = None,
    out: Annotated[Path | None, panel("Run", OUT, "--output", "-o")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose the bits for a target from the sources alone.

    Each source domain is left out in turn: the float steps are trained once, every candidate goes on from there for
    some steps, and is scored on the domain left out. Of the candidates within one standard error of the best, the one
    with the fewest bits is recommended. --mode mixed chooses bits for each layer under a budget instead.

    The cost is sources × (start steps + candidates × brief steps) updates; it is shown before the work begins.

    Examples:
      qtdog bits --data photos/ --target hospital_c --preset pacs-lite

      qtdog bits --data photos/ --target hospital_c --candidates 8,6,4 --brief-steps 100

      qtdog bits --data photos/ --target hospital_c --shift noise

      qtdog bits --data photos/ --target hospital_c --mode mixed --budget 5.5
    """
    given = dict(locals())
    from qtdog.cli.console import print_json
    from qtdog.core.config_io import is_method_preset
    from qtdog.core.errors import ConfigError

    if (mode is Mode.MIXED) != (budget is not None):
        raise ConfigError("--mode mixed needs --budget BITS, the average bits per weight, and only that mode takes it")
    if mode is Mode.MIXED and shift:
        raise ConfigError("--shift scores trained candidates, and --mode mixed trains none; leave one of them out")
    dataset, plan = _plan(given)
    folder = out or Path("runs") / f"bits-{plan.key}"
    with _goes_on(folder):
        report = _uniform(plan, folder) if budget is None else _mixed(plan, budget, vectors, folder)
    presets = [*(preset or ()), *([] if budget is None else [str(folder / LAYER_BITS)])]
    if budget is not None and dataset.card.preset and all(map(is_method_preset, preset or ())):
        presets.insert(0, dataset.card.preset)  # the file of bits would take the place of the data set's own
    report |= {"folder": str(folder), "use": train_line(given, presets, report["choice"])}
    _keep(folder, report)
    if as_json:
        print_json(report)
    else:
        _show_use(report)


def _plan(given: Mapping[str, Any]) -> tuple[DomainDataset, BitPlan]:
    """Return the whole data set and the plan on its sources; no image of the target is opened."""
    from qtdog.analysis.bit_plan import BitPlan, parse_candidates, without_target
    from qtdog.api.experiment import FLAGS, Request, configure
    from qtdog.cli.console import CountingBar
    from qtdog.cli.train import announce
    from qtdog.data.corruptions import corruption_names
    from qtdog.data.open import without_unreadable
    from qtdog.training.protocol import resolve

    flags = {name: given[name] for name in FLAGS if name in given}
    dataset, config = configure(Request(flags, given["preset"] or (), given["assign"] or ()))
    sources = without_target(dataset, config.data.target)
    if config.data.skip_unreadable:
        sources = without_unreadable(sources, CountingBar("reading images"))
    config = config.model_copy(update={"data": config.data.model_copy(update={"target": "none"})})
    announce(sources)
    plan = BitPlan(
        config=resolve(config, sources, CountingBar("reading images")),
        sources=sources,
        candidates=parse_candidates(given["candidates"]),
        brief_steps=given["brief_steps"],
        gamma=given["gamma"],
        n_directions=given["directions"],
        shift=tuple(corruption_names(given["shift"] or ())),
    )
    return dataset, plan


def _uniform(plan: BitPlan, folder: Path) -> dict[str, Any]:
    from qtdog.analysis.bit_plan import choose
    from qtdog.analysis.bit_search import BitTrials
    from qtdog.cli.console import CountingBar, err

    n_sources, n_candidates = len(plan.sources.domains), len(plan.candidates)
    err.print(
        f"{plan.n_steps:,} steps: {n_sources} sources × ({plan.start:,} + {n_candidates} candidates × "
        f"{plan.steps_each:,}); a whole run has {plan.config.train.steps:,}",
        highlight=False,
    )
    say = _Counter(n_sources * (1 + n_candidates))
    trials = BitTrials(plan, folder, _callbacks(), say, CountingBar("flatness")).run()
    choice = choose(trials)
    headers, rows = choice_table(choice)
    scored = "all images of the source left out"
    if plan.shift:
        scored = f"validation images of the other sources under {', '.join(plan.shift)} (mean over five severities)"
    radii = sorted(trial.gamma for trial in trials if trial.gamma is not None)
    return {
        "mode": "uniform",
        "choice": choice.bits,
        "best_bits": choice.best,
        "candidates": [asdict(candidate) | {"eligible": candidate.eligible} for candidate in choice.candidates],
        "trials": [asdict(trial) for trial in trials],
        "n_steps": plan.n_steps,
        "verdict": f"{choice.bits} bits (*): the fewest within one standard error of the best, {choice.best} bits",
        "table": {"headers": headers, "rows": rows},
        "shift": list(plan.shift),
        "title": f"accuracy (%) on {scored}, after {plan.start:,} + {plan.steps_each:,} "
        f"steps; flatness: rise of the loss at radius {_span(radii)}, small is flat",
    }


def _mixed(plan: BitPlan, budget: float, n_vectors: int, folder: Path) -> dict[str, Any]:
    from qtdog.analysis.bit_search import choose_layer_bits, uniform_candidate
    from qtdog.cli.console import SPEAKS, CountingBar, err
    from qtdog.core.files import write_atomic

    err.print(f"{plan.start:,} float steps on all sources, then the curvature of each layer", highlight=False)
    bar = CountingBar("curvature")
    choice = choose_layer_bits(plan, budget, folder, n_vectors=n_vectors, callbacks=_callbacks(), progress=bar)
    if SPEAKS:
        write_atomic(folder / LAYER_BITS, choice.to_yaml())
    headers, rows = layer_table(choice)
    same = uniform_candidate(plan.candidates, budget)
    return {
        "mode": "mixed",
        "choice": choice.layer_bits(),
        "budget": budget,
        "average_bits": choice.average_bits,
        "cost": choice.cost,
        "uniform_bits": same,
        "uniform_cost": choice.uniform_cost(same),
        "layers": [asdict(layer) | {"bits": b} for layer, b in zip(choice.layers, choice.bits, strict=True)],
        "table": {"headers": headers, "rows": rows},
        "title": "curvature of the float network on training images of the sources, and the bits chosen from it",
        "verdict": f"{choice.average_bits:.2f} bits per weight; expected cost {choice.cost:.3g}, with {same} bits for "
        f"every layer {choice.uniform_cost(same):.3g}",
    }


class _Counter:
    """Prints what begins, with its number among all that is to be done."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0

    def __call__(self, text: str) -> None:
        from qtdog.cli.console import err

        self._done += 1
        err.print(f"{self._done}/{self._total}  {text}", highlight=False, markup=False)


def _callbacks() -> Any:
    from qtdog.cli.console import CountingBar, TrainingBar, warn
    from qtdog.training.run import RunCallbacks

    return RunCallbacks(TrainingBar(), CountingBar("decoding images"), warn)


@contextlib.contextmanager
def _goes_on(folder: Path) -> Iterator[None]:
    """Say of an interruption how to go on."""
    from qtdog.core.errors import Interrupted

    try:
        yield
    except Interrupted as error:
        again = Interrupted(f"stopped; what is done is kept in {folder}, and the same command goes on from there")
        again.exit_code = error.exit_code
        raise again from error


def _span(values: Sequence[float]) -> str:
    low, high = (f"{value:.3g}" for value in (values[0], values[-1]))
    return low if low == high else f"{low} to {high}"


def _keep(folder: Path, report: Mapping[str, Any]) -> None:
    from qtdog.cli.console import SPEAKS
    from qtdog.core.files import write_atomic
    from qtdog.report.render import markdown

    if SPEAKS:
        write_atomic(folder / "choice.json", json.dumps(report, indent=1) + "\n")
        table = markdown(report["table"]["headers"], report["table"]["rows"])
        text = f"{report['title']}\n\n{table}\n\n{report['verdict']}\n\n```bash\n{report['use']}\n```\n"
        write_atomic(folder / "choice.md", text)


def _show_use(report: Mapping[str, Any]) -> None:
    from qtdog.cli.console import out, print_table

    print_table(report["table"]["headers"], report["table"]["rows"], title=report["title"])
    for text in (report["verdict"], f"kept in {report['folder']}; to use it:", f"  {report['use']}"):
        out.print(text, highlight=False, markup=False, soft_wrap=True)

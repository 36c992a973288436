"""DomainBed's `results.jsonl`, so that its runs and ours stand in one table.

Each line is one evaluation: `step`, `args` (`dataset`, `algorithm`, `test_envs`, `trial_seed`, `hparams_seed`, `seed`,
`holdout_fraction`, `uda_holdout_fraction`) and, for every domain i in the order of its folder names, `env{i}_in_acc` on
the 80 % split, `env{i}_out_acc` on the 20 % split and, with unlabeled images, `env{i}_uda_acc` on the share of the 80 %
that they were taken from. Source: Gulrajani and Lopez-Paz, ICLR 2021, and the code published with it.

The code of SWAD (Cha et al., NeurIPS 2021) and of MIRO (Cha et al., ECCV 2022) writes a file of the same name with
`env{i}_in` and `env{i}_out`, and names the unseen domain in `args.real_test_envs`. Its lines are of the raw weights:
the average of SWAD is not in the file.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtdog.core.config import START_FRAC
from qtdog.core.errors import RunError
from qtdog.runs.finished import Cost, FinishedRun
from qtdog.runs.record import Record, Score, SourceRecord
from qtdog.runs.statistics import replicate

MAX_DOMAINBED_BYTES = 512 * 1024**2
# folder names in the order in which DomainBed numbers them
DOMAINS = {
    "pacs": ("art_painting", "cartoon", "photo", "sketch"),
    "vlcs": ("Caltech101", "LabelMe", "SUN09", "VOC2007"),
    "officehome": ("Art", "Clipart", "Product", "Real World"),
    "terraincognita": ("location_100", "location_38", "location_43", "location_46"),
    "domainnet": ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
    "rotatedmnist": ("0", "15", "30", "45", "60", "75"),
    "coloredmnist": ("+90%", "+80%", "-90%"),
}

Line = Mapping[str, Any]
Setting = tuple[str, str, int, int]
Lines = dict[int, Line]  # by step

INCOMPLETE = "lines of results.jsonl that are blank or cut off"
SWAD = "lines of SWAD's code, of the raw weights: its average is not in results.jsonl"
MANY_UNSEEN = "lines with three unseen domains or more"


def plain(name: str) -> str:
    """Return the name of a data set as it is compared: lower case, letters and digits only.

    Example:
        >>> plain("OfficeHome") == plain("office-home")
        True
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())


@dataclass
class DomainBedRuns:
    """What a `results.jsonl` holds.

    Attributes:
        runs: with one unseen domain each.
        left_out: reason → number of lines.
    """

    runs: list[FinishedRun] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def read_domainbed(*files: Path) -> DomainBedRuns:
    """Return the runs in files of one sweep.

    Runs with two unseen domains are no rows of a table: they say how good a setting is when a source domain is left out
    too (`FinishedRun.left_out`).

    Raises:
        RunError: a file is not one that DomainBed writes; the text names the line.
    """
    found = DomainBedRuns()
    singles: dict[tuple[Setting, int, int], tuple[Path, Lines]] = {}
    doubles: dict[tuple[Setting, frozenset[int]], Lines] = {}
    for path in files:
        for number, line in _lines(path, found.left_out):
            try:
                setting, envs = _setting(line), [int(env) for env in _test_envs(line)]
                if len(envs) == 1:
                    key = (setting, envs[0], int(line["args"]["seed"]))
                    singles.setdefault(key, (path, {}))[1][int(line["step"])] = line
                elif len(envs) == 2:
                    doubles.setdefault((setting, frozenset(envs)), {})[int(line["step"])] = line
                else:
                    found.left_out[MANY_UNSEEN] += 1
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
                raise RunError(f"{path}, line {number}, is no evaluation of DomainBed ({error!r})") from error
    for (setting, target, _), (path, lines) in singles.items():
        try:
            found.runs.append(_run(path, setting, target, lines, doubles))
        except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
            raise RunError(f"{path} is no file of DomainBed's evaluations ({error!r})") from error
    return found


def _lines(path: Path, left_out: Counter[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and content of each line; blank ones, a last one that was cut off, and SWAD's are counted."""
    if path.stat().st_size > MAX_DOMAINBED_BYTES:
        raise RunError(
            f"{path} has {path.stat().st_size:,} bytes, more than {MAX_DOMAINBED_BYTES:,} are not read. Split it"
        )
    texts = path.read_text(errors="replace").split("\n")
    unfinished = texts.pop()  # what follows the last line end: nothing, or a line that was cut off or lacks its end
    every: list[str] = [*texts, unfinished] if unfinished else texts
    for number, text in enumerate(every, 1):
        if not text.strip():
            left_out[INCOMPLETE] += 1
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            if number > len(texts) and number > 1:
                left_out[INCOMPLETE] += 1
                continue
            raise RunError(f"{path}, line {number}, is no evaluation of DomainBed ({error!r})") from error
        if isinstance(line, dict) and isinstance(line.get("hparams"), dict) and line["hparams"].get("swad"):
            left_out[SWAD] += 1
            continue
        yield number, line


def _test_envs(line: Line) -> Sequence[Any]:
    args = line["args"]
    return args["real_test_envs"] if "real_test_envs" in args else args["test_envs"]


def _setting(line: Line) -> Setting:
    args = line["args"]
    # SWAD's and MIRO's code has no seed of a search
    hparams = int(args["hparams_seed"]) if "real_test_envs" not in args else int(args.get("hparams_seed", 0))
    return str(args["dataset"]), str(args["algorithm"]), int(args["trial_seed"]), hparams


def _run(
    path: Path,
    setting: Setting,
    target: int,
    lines: Lines,
    doubles: Mapping[tuple[Setting, frozenset[int]], Lines],
) -> FinishedRun:
    dataset, algorithm, trial, _ = setting
    ordered = [lines[step] for step in sorted(lines)]
    n = _n_domains(ordered[0])
    names = domain_names(dataset, n)
    args = ordered[0]["args"]
    steps = int(args.get("steps") or int(ordered[-1]["step"]) + 1)
    others = {env: doubles.get((setting, frozenset((target, env))), {}) for env in range(n) if env != target}
    return FinishedRun(
        kind="domainbed",
        path=path,
        dataset=dataset,
        content="",
        target=names[target],
        replicate=replicate([(trial, int(args["seed"]))]),
        method=algorithm,
        settings={},
        selection="",
        saved=None,
        records=tuple(_record(line, names, target) for line in ordered),
        start_step=None,
        select_from=-1,
        mean_from=int(START_FRAC * steps),
        cost=Cost({}, 1, steps, 1),
        target_20={int(line["step"]): _accuracy(line, target, "out") for line in ordered},
        left_out=_left_out(lines, others),
    )


def _left_out(lines: Lines, others: Mapping[int, Lines]) -> dict[int, float]:
    """Return by step the mean accuracy of each other domain on its 80 % split, when it was unseen beside the target."""
    steps = [step for step in sorted(lines) if all(step in run for run in others.values())]
    return {
        step: math.fsum(_accuracy(run[step], env, "in") for env, run in others.items()) / len(others) for step in steps
    }


def _n_domains(line: Line) -> int:
    n = 0
    while f"env{n}_out_acc" in line or f"env{n}_out" in line:
        n += 1
    if n < 2:
        raise ValueError("fewer than two domains have an env*_out_acc")
    return n


def domain_names(dataset: str, n: int) -> tuple[str, ...]:
    """Return the names of a data set's `n` domains: of their folders if it is known, else `env0`, `env1`, ….

    Example:
        >>> domain_names("PACS", 4)[0], domain_names("Mine", 2)
        ('art_painting', ('env0', 'env1'))
    """
    known = DOMAINS.get(plain(dataset), ())
    return known if len(known) == n else tuple(f"env{i}" for i in range(n))


def _record(line: Line, names: tuple[str, ...], target: int) -> Record:
    """Return an evaluation; the whole target is put together from its splits by their shares."""
    source = {name: Score(_accuracy(line, i, "out"), math.nan, 0) for i, name in enumerate(names) if i != target}
    inner, outer = _accuracy(line, target, "in"), _accuracy(line, target, "out")
    held_out = float(line["args"].get("holdout_fraction", 0.2))
    unlabeled = float(line["args"].get("uda_holdout_fraction") or 0.0) if f"env{target}_uda_acc" in line else 0.0
    labeled = (1 - unlabeled) * inner + (unlabeled * _accuracy(line, target, "uda") if unlabeled else 0.0)
    whole = (1 - held_out) * labeled + held_out * outer
    test, test_in = ({names[target]: Score(value, math.nan, 0)} for value in (whole, inner))
    loss = line.get("loss")
    seen = SourceRecord(int(line["step"]), True, source)
    return Record(seen, test, test_in, float(loss) if isinstance(loss, int | float) else None)


def _accuracy(line: Line, domain: int, part: str) -> float:
    """Return the accuracy of a domain's split, by DomainBed's name or by that of SWAD's and MIRO's code."""
    key = f"env{domain}_{part}_acc"
    value = float(line[key] if key in line or f"env{domain}_{part}" not in line else line[f"env{domain}_{part}"])
    if not 0 <= value <= 1:
        raise ValueError(f"{key} is {value}, and an accuracy lies between 0 and 1")
    return value

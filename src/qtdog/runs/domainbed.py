"""DomainBed's `results.jsonl`, so that its runs and ours stand in one table.

Each line is one evaluation: `step`, `args` (`dataset`, `algorithm`, `test_envs`, `trial_seed`, `hparams_seed`, `seed`,
`holdout_fraction`) and, for every domain i in the order of its folder names, `env{i}_in_acc` on the 80 % split and
`env{i}_out_acc` on the 20 % split. Source: Gulrajani and Lopez-Paz, ICLR 2021, and the code published with it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtdog.core.config import START_FRAC
from qtdog.core.errors import RunError
from qtdog.runs.finished import Cost, FinishedRun
from qtdog.runs.record import Record, Score, SourceRecord

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
Key = tuple[str, str, int, int, int, int]


def plain(name: str) -> str:
    """Return the name of a data set as it is compared: lower case, letters and digits only.

    Example:
        >>> plain("OfficeHome") == plain("office-home")
        True
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_domainbed(path: Path) -> list[FinishedRun]:
    """Return the runs in a `results.jsonl`; of those with several unseen domains at once none.

    Raises:
        RunError: the file is not one that DomainBed writes; the text names the line.
    """
    if path.stat().st_size > MAX_DOMAINBED_BYTES:
        raise RunError(
            f"{path} has {path.stat().st_size:,} bytes, more than {MAX_DOMAINBED_BYTES:,} are not read. Split it"
        )
    runs: dict[Key, dict[int, Line]] = {}
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            if len(line["args"]["test_envs"]) == 1:
                runs.setdefault(_key(line), {})[int(line["step"])] = line
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(f"{path}, line {number}, is no evaluation of DomainBed ({error!r})") from error
    try:
        return [_entry(path, [run[step] for step in sorted(run)]) for run in runs.values()]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(f"{path} is no file of DomainBed's evaluations ({error!r})") from error


def _key(line: Line) -> Key:
    args = line["args"]
    numbers = (int(args[name]) for name in ("trial_seed", "hparams_seed", "seed"))
    trial, hparams, seed = numbers
    return str(args["dataset"]), str(args["algorithm"]), int(args["test_envs"][0]), trial, hparams, seed


def _entry(path: Path, lines: list[Line]) -> FinishedRun:
    args = lines[0]["args"]
    names = domain_names(args["dataset"], _n_domains(lines[0]))
    target = args["test_envs"][0]
    last = int(lines[-1]["step"])
    steps = int(args.get("steps") or last + 1)
    return FinishedRun(
        kind="domainbed",
        path=path,
        dataset=str(args["dataset"]),
        content="",
        target=names[target],
        trial=int(args["trial_seed"]),
        seed=int(args["seed"]),
        method=str(args["algorithm"]),
        settings={},
        selection="",
        shipped=None,
        records=tuple(_record(line, names, target) for line in lines),
        start_step=None,
        mean_from=int(START_FRAC * steps),
        cost=Cost({}, 1, steps, 1),
    )


def _n_domains(line: Line) -> int:
    n = 0
    while f"env{n}_out_acc" in line:
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
    """Return an evaluation; the whole target is put together from its two splits by their shares."""
    inner = [_accuracy(line, f"env{i}_in_acc") for i in range(len(names))]
    outer = [_accuracy(line, f"env{i}_out_acc") for i in range(len(names))]
    source = {name: Score(outer[i], math.nan, 0) for i, name in enumerate(names) if i != target}
    held = float(line["args"].get("holdout_fraction", 0.2))
    whole = (1 - held) * inner[target] + held * outer[target]
    test, test_in = ({names[target]: Score(value, math.nan, 0)} for value in (whole, inner[target]))
    loss = line.get("loss")
    seen = SourceRecord(int(line["step"]), True, source)
    return Record(seen, test, test_in, float(loss) if isinstance(loss, int | float) else None)


def _accuracy(line: Line, key: str) -> float:
    value = float(line[key])
    if not 0 <= value <= 1:
        raise ValueError(f"{key} is {value}, and an accuracy lies between 0 and 1")
    return value

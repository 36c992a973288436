"""Random folders and lists of images: train or refuse, and the counts of verify, train and eval add up to the files.

    python tests/stress/folders.py [--trees 10000] [--first 0] [--only-open]

Each tree has random names (Unicode forms, words that mean something elsewhere, bytes that are no UTF-8), suffixes,
contents (sound, cut off, empty, text), links (to files, to folders, back up, to nowhere), pipes, folders that programs
leave behind, and labels. What must come of it is known from a walk of its own. `pytest` runs a few of them.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qtdog.core.config_io import build_config, load_preset
from qtdog.core.errors import ConfigError, DataError
from qtdog.data.dataset import DomainDataset
from qtdog.data.open import open_dataset, open_readable
from qtdog.data.scan import BEGINNINGS, IMAGE_SUFFIXES, JUNK_FILES, JUNK_FOLDERS
from qtdog.data.splits import training_obstacles
from qtdog.data.verify import Report, verify
from qtdog.ensemble.model import load
from qtdog.ensemble.scoring import score_domains
from qtdog.runs.folder import RunFolder
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run

PLAIN = ("a", "b", "north", "south", "cat", "dog", "NO", "2024-12-01", "0", "1", "010", "x y", "1e3", "ü")
ODD = (
    *(
        "none",
        "all",
        "None",
        "nan",
        "-1",
        "train",
        "test",
        "caf\u00e9",
        "cafe\u0301",
        "0.0",
        "Cat",
        "CAT ",
        "a,b",
        "a;b",
    ),
    *("@eaDir", "__MACOSX", "#recycle", ".hidden", "..x", "line\nbreak", "tab\tstop", "*", "[1]", "$HOME", "-x", "~"),
    *("\U0001f600", "n" * 255, "con", "b\udcff", "a.png", "\u202eright"),
)
SUFFIXES = (".png", ".jpg", ".JPG", ".jpeg", ".jfif", ".jpe", ".bmp", ".gif", ".webp", ".tif", "")
OTHER_SUFFIXES = (".txt", ".npy", ".csv", ".svg", ".mp4", ".json", ".tmp")


def encoded(color: int, kind: str) -> bytes:
    """Return a small image as the content of a file."""
    pixels = np.random.default_rng(color).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


SOUND = tuple(encoded(color, kind) for color in range(40) for kind in ("PNG", "JPEG"))
BROKEN = (b"", b"no image", SOUND[0][:60], SOUND[1][:40], b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n")
IS_SOUND = frozenset(SOUND)


@dataclass
class Case:
    """What lies on the disk.

    Attributes:
        source: what follows `--data`.
        n_sound: images at their place that can be read.
        n_broken: images at their place that cannot.
        n_other: files that are no images of it; None for a list.
        must_refuse: why it must be refused, if that is known; "" if it may be opened.
    """

    source: str
    n_sound: int = 0
    n_broken: int = 0
    n_other: int | None = None
    must_refuse: str = ""


def make_case(root: Path, seed: int) -> Case:
    """Write a random folder or list below `root` and return what is known of it."""
    rng = random.Random(seed)
    root = root / "data"
    root.mkdir()
    return make_list(root, rng) if rng.random() < 0.3 else make_folder(root, rng)


def names(rng: random.Random, most: int, odd: float) -> list[str]:
    """Return a few different names, each with some probability an odd one."""
    found = [rng.choice(ODD) if rng.random() < odd else rng.choice(PLAIN) for _ in range(rng.randint(1, most))]
    return list(dict.fromkeys(found))


def make_folder(root: Path, rng: random.Random) -> Case:
    """Write DOMAIN/CLASS/image with whatever else lies in folders."""
    odd = rng.choice((0, 0, 0.1, 0.5))
    clean = rng.random() < 0.4
    classes = names(rng, 4, odd)
    for domain in names(rng, 4, odd):
        for label in classes if rng.random() < 0.8 else names(rng, 4, odd):
            place = make_dir(root / domain / label)
            for i in range(rng.choice((0, 1, 3, 5, 6, 7)) if not clean else 6):
                write_file(place, f"{i}", rng, 0 if clean else 0.1)
    for _ in range(0 if clean else rng.randint(0, 5)):
        rng.choice(LITTER)(rng.choice(folders_below(root)), rng)
    n_sound, n_broken, n_other = count(root, str(root))
    return Case(str(root), n_sound, n_broken, n_other)


def make_dir(path: Path) -> Path:
    """Make a folder unless its name is one that no folder can have; then one of another name."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        path = path.parent.parent / "plain" / "other"
        path.mkdir(parents=True, exist_ok=True)
    return path


def folders_below(root: Path) -> list[Path]:
    """Return all folders, links not followed."""
    return [Path(top) for top, _, _ in os.walk(root)]


def write_file(place: Path, stem: str, rng: random.Random, odd: float) -> None:
    """Write a file that is an image, mostly."""
    name, content = stem + rng.choice(SUFFIXES), rng.choice(SOUND)
    if rng.random() < odd:
        name = stem + rng.choice((*OTHER_SUFFIXES, ".png"))
        content = rng.choice(BROKEN)
    elif rng.random() < odd:
        name = rng.choice((f".{name}", f"{stem} \u00e9.png", f"{stem}\udcfe.png", "Thumbs.db", "n" * 250 + ".png"))
    with_contextless(lambda: (place / name).write_bytes(content))


def with_contextless(act: Callable[[], Any]) -> None:
    """Do something that a file system may refuse (a name that is too long, one that is there)."""
    try:
        act()
    except OSError:
        return


def link_to_nowhere(place: Path, rng: random.Random) -> None:
    """A link that leads nowhere, named like an image or not."""
    name = rng.choice(("gone.png", "gone", "gone.txt"))
    with_contextless(lambda: (place / name).symlink_to("/nowhere/at/all"))


def link_to_folder(place: Path, rng: random.Random) -> None:
    """A link to a folder beside it, or back up."""
    others = [path for path in folders_below(place.parent) if path != place]
    target = rng.choice([*others, place.parent, place])
    with_contextless(lambda: (place / f"link{rng.randint(0, 3)}").symlink_to(target))


def link_to_file(place: Path, rng: random.Random) -> None:
    """A link to, or another name of, a file in the folder."""
    files = [path for path in place.iterdir() if path.is_file()]
    if files:
        target = rng.choice(files)
        name = place / f"again{rng.choice(SUFFIXES)}"
        act = (lambda: os.link(target, name)) if rng.random() < 0.5 else (lambda: name.symlink_to(target))
        with_contextless(act)


def pipe(place: Path, rng: random.Random) -> None:
    """A pipe that nobody writes to."""
    with_contextless(lambda: os.mkfifo(place / rng.choice(("pipe.png", "pipe"))))


def thumbnails(place: Path, rng: random.Random) -> None:
    """What a NAS, a Mac or a notebook leaves."""
    folder = place / rng.choice(
        ("@eaDir", "__MACOSX", ".thumbnails", ".ipynb_checkpoints", "System Volume Information")
    )
    with_contextless(lambda: folder.mkdir())
    if folder.is_dir():
        write_file(folder, "thumb", rng, 0)


def stray(place: Path, rng: random.Random) -> None:
    """Files at any level."""
    for i in range(rng.randint(1, 3)):
        write_file(place, f"stray{i}", rng, 0.5)


def empty_folder(place: Path, rng: random.Random) -> None:
    """A folder without anything."""
    with_contextless(lambda: (place / f"empty{rng.randint(0, 2)}.png").mkdir())


LITTER = (link_to_nowhere, link_to_folder, link_to_file, pipe, thumbnails, stray, stray, empty_folder)


def count(root: Path, top: str, depth: int = 0) -> tuple[int, int, int]:
    """Return how many sound images, broken images and other files lie below a folder, by a walk of its own."""
    found = Counter[str]()
    for name in os.listdir(top):
        path = f"{top}/{name}"
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            up = os.path.realpath(path)
            loops = os.path.islink(path) and (os.path.realpath(top) + "/").startswith(up.rstrip("/") + "/")
            if name.lower() not in JUNK_FOLDERS and not loops:
                parts = count(root, path, depth + 1)
                found.update(dict(zip(("sound", "broken", "other"), parts, strict=True)))
        elif name.lower() not in JUNK_FILES or not os.path.isfile(path):
            found[kind_of(path, name, depth)] += 1
    return found["sound"], found["broken"], found["other"]


def kind_of(path: str, name: str, depth: int) -> str:
    """Return whether a file is a sound or broken image at its place, or another file."""
    is_file, is_gone = os.path.isfile(path), not os.path.exists(path)
    content = Path(path).read_bytes() if is_file else b""
    named = name.lower().endswith(IMAGE_SUFFIXES)
    looks = is_file and "." not in name and content.startswith(BEGINNINGS)
    if depth < 2 or not (is_file or is_gone) or not (named or looks):
        return "other"
    return "sound" if content in IS_SOUND else "broken"


LABEL_ODDITIES = ("nan", "", "None", "-1", "NULL", "  ", "0.0", "a|b", "-0", "\u00a0")
REFUSED_LABELS = ("nan", "", "None", "-1", "NULL", "  ", "\u00a0")


def make_list(root: Path, rng: random.Random) -> Case:
    """Write a list (.csv or .jsonl) with its images, and with a defect now and then."""
    domains, classes = names(rng, 4, 0), names(rng, 4, 0)
    rows, reasons, n_broken = [], [], 0
    for i, (domain, label) in enumerate(
        [(d, c) for d in domains for c in classes for _ in range(rng.choice((1, 5, 6)))]
    ):
        key = rng.choice((f"{i}.png", f"sub/{i}.jpg", f"{i}", f"{i}.data", f"caf\u00e9/{i}.png"))
        (root / key).parent.mkdir(exist_ok=True)
        broken = rng.random() < 0.02
        n_broken += broken
        (root / key).write_bytes(rng.choice(BROKEN) if broken else rng.choice(SOUND))
        rows.append({"path": key, "label": label, "domain": domain})
    if rng.random() < 0.4:
        spoil(rows, reasons, rng)
    path = root / rng.choice(("list.csv", "list.jsonl"))
    write_list(path, rows)
    return Case(str(path), len(rows) - n_broken, n_broken, None, "; ".join(reasons))


def spoil(rows: list[dict[str, str]], reasons: list[str], rng: random.Random) -> None:
    """Put a defect into a list."""
    row = rng.choice(rows)
    match rng.randint(0, 4):
        case 0:
            row["label"] = rng.choice(LABEL_ODDITIES)
            reasons += ["label"] if row["label"] in REFUSED_LABELS else []
        case 1:
            row["domain"] = rng.choice((*REFUSED_LABELS, "none", "all"))
            reasons.append("domain")
        case 2:
            row["path"] = rng.choice(("gone.png", "../up.png", "/etc/hosts", "sub", "a\\b.png", ""))
            reasons.append("path")
        case 3:
            rows.append(dict(row))
            reasons.append("twice")
        case 4:
            rows.append(row | {"label": "another"})
            reasons.append("two classes")


def write_list(path: Path, rows: list[dict[str, str]]) -> None:
    """Write the rows as the suffix says."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".csv":
            writer = csv.DictWriter(stream, ["path", "label", "domain"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            stream.writelines(json.dumps(row) + "\n" for row in rows)


SHORT = {
    "data": {"image_size": 8, "batch_size": 2, "workers": 0, "augment": "domainbed"},
    "model": {"backbone": "digits_cnn", "weights": "none"},
    "train": {"steps": 1, "eval_every": 1},
    "quantizer": {"name": "none"},
}


@dataclass
class Outcome:
    """What came of a case: `refused`, `opened` or `trained`, and the sentence of a refusal."""

    kind: str
    text: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def check_case(case: Case, folder: Path, rng: random.Random, *, trains: bool = True) -> Outcome:
    """Open, verify, train and evaluate what a case says; every count must be the one that is known.

    Raises:
        AssertionError: a count is another one, or two verdicts contradict each other.
        Exception: anything but a refusal of the program's own.
    """
    try:
        dataset = open_dataset(case.source, min_domains=1)
    except DataError as error:
        return Outcome("refused", said(error))
    assert not case.must_refuse, f"opened although: {case.must_refuse}"
    n = case.n_sound + case.n_broken
    assert len(dataset) == n, f"{len(dataset)} images instead of {n}"
    assert dataset.counts().sum() == n
    if case.n_other is not None:
        assert dataset.passed_over is not None
        assert dataset.passed_over.n_files == case.n_other, f"{dataset.passed_over} instead of {case.n_other}"
    report = verify(dataset)
    assert (report.n_images, len(report.unreadable)) == (n, case.n_broken), report.unreadable
    return train_and_evaluate(case, report, dataset, folder, rng) if trains else Outcome("opened")


def said(error: Exception) -> str:
    """Return the sentence of a refusal, which must be there and hold no trace."""
    text = str(error)
    assert text.strip(), f"{type(error).__name__} says nothing"
    assert "Traceback" not in text
    text.encode()  # can be written to a log
    return text


def train_and_evaluate(case: Case, report: Report, dataset: DomainDataset, folder: Path, rng: random.Random) -> Outcome:
    """Train with and without the broken images, whatever verify says of it, and score what came out."""
    skips = rng.random() < 0.7
    target = rng.choice([*dataset.domains, "none"]) if len(dataset.domains) > 1 else "none"
    layers = {"data": {"source": case.source, "target": target, "skip_unreadable": skips}}
    config = build_config([load_preset("digits"), SHORT, layers])
    lacking = report.obstacles or report.missing_classes or report.empty_classes
    sound = not lacking and not (report.unreadable and not skips)
    try:
        used = open_readable(case.source, skip_unreadable=skips, min_domains=1)
        if skips and case.n_broken:
            sound = sound and not training_obstacles(used) and not used.missing_classes()
        result = run(
            resolve(config, used), used, RunFolder(folder / "run"), callbacks=RunCallbacks(warn=lambda _: None)
        )
    except (DataError, ConfigError) as error:
        return refused(sound, error)
    assert sound, f"verify says that it cannot be trained on, and train did: {report.text()}"
    assert (len(used), result["n_skipped"]) == (n_used := n_of(case, skips), case.n_broken if skips else 0)
    scores = score_domains(load(folder / "run" / "model.safetensors"), used)
    assert sum(score["n"] for score in scores.values()) == n_used, scores
    if target != "none":
        assert scores[target]["n"] == int(used.counts()[used.domains.index(target)].sum())
    return Outcome("trained")


def refused(sound: bool, error: Exception) -> Outcome:
    """Return the outcome of a refusal, which verify must have foreseen."""
    assert not sound, f"verify finds nothing that keeps it from being trained on, and train says: {error}"
    return Outcome("refused", said(error))


def n_of(case: Case, skips: bool) -> int:
    """Return how many images are used."""
    return case.n_sound if skips else case.n_sound + case.n_broken


def run_seed(seed: int, *, trains: bool = True) -> Outcome:
    """Make one case in a folder of its own and check it."""
    with tempfile.TemporaryDirectory(prefix="qtdog-folders-") as place:
        case = make_case(Path(place), seed)
        try:
            return check_case(case, Path(place), random.Random(seed), trains=trains)
        except Exception as error:
            error.add_note(f"seed {seed}: {case}")
            raise


def main() -> None:
    """Run many seeds; print what failed and how many trained or were refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trees", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--only-open", action="store_true", help="open and verify only")
    options = parser.parse_args()
    kinds, failed, start = Counter[str](), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["QTDOG_CACHE"] = cache
        for done, seed in enumerate(range(options.first, options.first + options.trees), start=1):
            try:
                kinds[run_seed(seed, trains=not options.only_open).kind] += 1
            except Exception as error:
                failed.append(seed)
                print(f"FAILED {seed}: {type(error).__name__}: {str(error)[:600]!r}", flush=True)
            if done % 200 == 0:
                shutil.rmtree(cache, ignore_errors=True)
                print(f"{done} trees, {dict(kinds)}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{options.trees} trees: {dict(kinds)}; {len(failed)} failed {failed[:50]}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

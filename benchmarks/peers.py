"""Whole training runs beside DomainBed's loop: the same images, splits, network, steps and evaluations.

    python benchmarks/peers.py [--data ../shared/data/pacs] [--steps 10] [--batch 16 32] [--json FILE]

The work is ERM with ResNet-18 (random weights, batch norm that keeps its statistics, Adam at 5e-5), one domain unseen.
Every trial is a process of its own, ours and theirs in turns. Theirs does what a user of DomainBed gets: a data loader
without end for each source domain, whose workers decode and augment image by image with torchvision; one batch of each,
joined; the held-out images of the sources and all of the unseen domain measured one after another. Ours is
`qtdog.train` as it is, with its decoded images made before (their time is printed).

A step is the time from one update to the next, without the first one and those behind an evaluation; `other` is what a
process does beside steps and evaluations (imports, start, the last checks), and `long` what a run of 5,000 steps with
an evaluation every 300 would take by these figures. Processor time and memory are those of the whole tree of processes;
memory that they share counts once (PSS, every second).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import models, transforms

BACKBONE, LR, HOLDOUT_FRAC = "resnet18.tv_in1k", 5e-5, 0.2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDES = ("ours", "theirs")
EVAL_BATCH = 64
LONG_STEPS, LONG_EVALUATIONS = 5000, 17


def work_of(folder: Path, options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Return what both sides do, as JSON: pools of images to train on, sets of images to measure, and the options."""
    from qtdog.data.image_folder import open_folder
    from qtdog.data.splits import make_splits

    dataset = open_folder(folder)
    target = options.target or dataset.domains[0]
    splits = make_splits(dataset, frac=HOLDOUT_FRAC)

    def listed(indices: Any) -> list[tuple[str, int]]:
        return [(str(dataset.path(i)), int(dataset.class_index[i])) for i in indices.tolist()]

    sources = dataset.sources(target)
    return {
        "folder": str(folder),
        "target": target,
        "backbone": BACKBONE,
        "n_classes": len(dataset.classes),
        "train": {domain: listed(splits[domain].train) for domain in sources},
        "measure": {domain: listed(splits[domain].heldout) for domain in sources}
        | {target: listed(splits[target].everything)},
        "steps": options.steps,
        "eval_every": options.eval_every or options.steps,
        "batch": batch,
        "image_size": options.image_size,
        "workers": options.workers,
        "threads": options.threads,
    }


def fingerprint(images: Sequence[Sequence[Any]]) -> str:
    """Return a hash of a set of images and their classes, in any order."""
    return hashlib.sha256(json.dumps(sorted([str(path), int(label)] for path, label in images)).encode()).hexdigest()


def transform_of(size: int, *, augmented: bool) -> Any:
    """Return DomainBed's transform of a PIL image, for training or for evaluation."""
    if augmented:
        change: list[Any] = [
            transforms.RandomResizedCrop(size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
        ]
    else:
        change = [transforms.Resize((size, size))]
    return transforms.Compose([*change, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


class Images(Dataset[Any]):
    """Images that are opened and transformed one by one."""

    def __init__(self, images: Sequence[Any], transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        path, label = self.images[i]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


class WithoutEnd(Sampler[list[int]]):
    """Batches of positions, drawn with replacement, for ever."""

    def __init__(self, n: int, batch: int) -> None:
        self.n, self.batch = n, batch

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield torch.randint(self.n, (self.batch,)).tolist()


class Classifier(nn.Module):
    """ResNet-18 and a linear layer; batch norm keeps its statistics."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.featurizer = models.resnet18()
        self.classifier = nn.Linear(self.featurizer.fc.in_features, n_classes)
        cast(Any, self.featurizer).fc = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, n_classes)."""
        return self.classifier(self.featurizer(images))

    def train(self, mode: bool = True) -> Classifier:
        """Set the mode of all but batch norm."""
        super().train(mode)
        for module in self.featurizer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def theirs(work: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train as DomainBed does."""
    torch.manual_seed(0)
    network = Classifier(work["n_classes"]).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    augmented = transform_of(work["image_size"], augmented=True)
    streams = [
        iter(
            DataLoader(
                Images(pool, augmented),
                batch_sampler=WithoutEnd(len(pool), work["batch"]),
                num_workers=work["workers"],
            )
        )
        for pool in work["train"].values()
    ]
    clock, n_seen, scores = Clock(), 0, {}
    for step in range(1, work["steps"] + 1):
        images, labels = (torch.cat(parts) for parts in zip(*(next(stream) for stream in streams), strict=True))
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        n_seen += len(labels)
        clock.step()
        if step % work["eval_every"] == 0 or step == work["steps"]:
            scores = {domain: accuracy(network, pairs, work) for domain, pairs in work["measure"].items()}
            clock.evaluation()
    torch.save(network.state_dict(), out / "model.pkl")
    pools = {domain: fingerprint(pool) for domain, pool in work["train"].items()}
    n_measured = {domain: len(images) for domain, images in work["measure"].items()}
    return clock.times() | {"scores": scores, "n_measured": n_measured, "n_seen": n_seen, "pools": pools}


def accuracy(network: nn.Module, images: Sequence[Any], work: dict[str, Any]) -> float:
    """Return the accuracy of a network on images that are opened one by one."""
    files = Images(images, transform_of(work["image_size"], augmented=False))
    right = 0
    network.eval()
    with torch.no_grad():
        for inputs, labels in DataLoader(files, batch_size=EVAL_BATCH, num_workers=work["workers"]):
            right += int((network(inputs).argmax(1) == labels).sum())
    network.train()
    return right / len(images)


class Clock:
    """When each update and each evaluation was done."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.evaluations: list[float] = []
        self.begun = self.last = time.perf_counter()
        self.fresh = False  # whether the step that comes follows a step

    def step(self) -> None:
        """An update is done."""
        now = time.perf_counter()
        if self.fresh:
            self.steps.append(now - self.last)
        self.last, self.fresh = now, True

    def evaluation(self) -> None:
        """An evaluation is done."""
        now = time.perf_counter()
        self.evaluations.append(now - self.last)
        self.last, self.fresh = now, False

    def times(self) -> dict[str, Any]:
        """Return the seconds of steps that follow a step, and of evaluations."""
        return {"step_s": self.steps, "eval_s": self.evaluations}


def ours(work: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train through the public interface."""
    import qtdog
    from qtdog.core.progress import RunCallback

    class Follower(RunCallback):
        def __init__(self) -> None:
            self.clock, self.n_seen, self.record = Clock(), 0, None

        def on_step(self, step: int, loss: float, n_images: int) -> None:
            self.clock.step()
            self.n_seen += n_images

        def on_record(self, record: Any) -> None:
            self.clock.evaluation()
            self.record = record

    follower = Follower()
    result = qtdog.train(
        work["folder"],
        work["target"],
        out=out / "run",
        backbone=work["backbone"],
        weights="none",
        quantizer="none",
        augment="domainbed",
        steps=work["steps"],
        batch_size=work["batch"],
        image_size=work["image_size"],
        lr=LR,
        train={"eval_every": work["eval_every"], "selection": "last"},
        progress=follower,
    )
    record = cast(Any, follower.record)
    scores = record.seen.source | record.test
    return follower.clock.times() | {
        "scores": {domain: score.accuracy for domain, score in scores.items()},
        "n_measured": {domain: score.n for domain, score in scores.items()},
        "n_seen": follower.n_seen,
        "pools": pools_of(cast(Any, result).config, Path(work["folder"])),
    }


def pools_of(config: Any, folder: Path) -> dict[str, str]:
    """Return the fingerprints of the images that a finished run trained on, as its configuration says."""
    from qtdog.data.image_folder import open_folder
    from qtdog.training.protocol import make_protocol

    dataset = open_folder(folder)
    pools = make_protocol(config, dataset).train_pools()
    return {
        domain: fingerprint([(dataset.path(i), dataset.class_index[i]) for i in pool]) for domain, pool in pools.items()
    }


def apart(side: str, work: dict[str, Any], place: Path, interval_s: float = 1.0) -> dict[str, Any]:
    """Run one side in a process of its own; return what it says, with its wall and processor time and its memory."""
    shutil.rmtree(place / side, ignore_errors=True)
    (place / side).mkdir(parents=True)
    (place / side / "work.json").write_text(json.dumps(work))
    environment = os.environ | {"OMP_NUM_THREADS": str(work["threads"]), "QTDOG_CACHE": str(place / "cache")}
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, "--do", side, str(place / side)], env=environment)
    watched, peak_mb, looked_s = psutil.Process(process.pid), 0.0, 0.0
    try:
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            if time.perf_counter() - looked_s >= interval_s:
                peak_mb, looked_s = max(peak_mb, tree_mb(watched)), time.perf_counter()
            time.sleep(0.02)
    except BaseException:
        process.kill()
        raise
    wall_s = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{side} ended with {process.returncode}")
    result = json.loads((place / side / "result.json").read_text())
    step_s, eval_s = statistics.median(result["step_s"]), statistics.median(result["eval_s"])
    other_s = wall_s - work["steps"] * step_s - sum(result["eval_s"])
    times = {"other_s": other_s, "long_s": other_s + LONG_STEPS * step_s + LONG_EVALUATIONS * eval_s}
    return result | times | {"wall_s": wall_s, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": peak_mb}


def tree_mb(process: psutil.Process) -> float:
    """Return the memory of a process and all below it, MB; what they share counts once."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += cast(Any, one.memory_full_info()).pss
    except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
        pass  # one ended meanwhile
    return total / 1e6


def check_same_work(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Refuse a comparison of different work."""
    for key in ("n_seen", "n_measured", "pools"):
        if ours[key] != theirs[key]:
            raise SystemExit(f"the two sides did different work: {key} is {ours[key]} and {theirs[key]}")


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def compare(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return quartiles of both sides and of the ratio theirs / ours of each round."""
    rows: dict[str, Any] = {}
    for key in ("step_s", "eval_s", "other_s", "wall_s", "long_s", "cpu_s", "peak_mb"):
        per_round = {side: [value_of(trials[side][key]) for trials in rounds] for side in SIDES}
        each = {side: [one for trials in rounds for one in as_list(trials[side][key])] for side in SIDES}
        ratios = [b / a for a, b in zip(per_round["ours"], per_round["theirs"], strict=True) if a]
        rows[key] = {side: [round(q, 4) for q in quartiles(each[side])] for side in SIDES}
        rows[key]["ratio"] = [round(q, 3) for q in quartiles(ratios)] if ratios else None
    return rows


def as_list(value: Any) -> list[float]:
    """Return a number or some as a list."""
    return value if isinstance(value, list) else [value]


def value_of(value: Any) -> float:
    """Return a number, or the median of some."""
    return statistics.median(value) if isinstance(value, list) else value


def copy_images(data: Path, place: Path, every: int) -> Path:
    """Copy every so many-th image of each class and return the folder."""
    for label in sorted(path for path in data.glob("*/*") if path.is_dir()):
        target = place / label.relative_to(data)
        target.mkdir(parents=True)
        for image in sorted(label.iterdir())[::every]:
            shutil.copy(image, target)
    return place


def measure(options: argparse.Namespace, place: Path, interval_s: float = 1.0) -> dict[str, Any]:
    """Return the comparison for each batch size."""
    from qtdog.data.decoded_cache import open_cache
    from qtdog.data.image_folder import open_folder

    folder = copy_images(options.data, place / "images", options.every)
    begun = time.perf_counter()
    open_cache(open_folder(folder), options.image_size, folder=place / "cache")
    results: dict[str, Any] = {"cache_built_in_s": round(time.perf_counter() - begun, 2)}
    works = {batch: work_of(folder, options, batch) for batch in options.batch}
    rounds: dict[int, list[dict[str, dict[str, Any]]]] = {batch: [] for batch in options.batch}
    for turn in range(options.repeat):
        for batch, work in works.items():
            order = SIDES if turn % 2 == 0 else SIDES[::-1]
            trials = {side: apart(side, work, place / "trials", interval_s) for side in order}
            shutil.rmtree(place / "trials" / "theirs")
            check_same_work(trials["ours"], trials["theirs"])
            rounds[batch].append(trials)
            steps = {side: value_of(trials[side]["step_s"]) for side in SIDES}
            told = f"ours {steps['ours']:.2f} s, theirs {steps['theirs']:.2f} s"
            print(f"round {turn + 1}, {batch} images per domain, an update: {told}", file=sys.stderr, flush=True)
    first = next(iter(works.values()))
    results["n_train"] = {domain: len(pool) for domain, pool in first["train"].items()}
    results["n_measured"] = {domain: len(images) for domain, images in first["measure"].items()}
    return results | {"batches": {batch: compare(trials) for batch, trials in rounds.items()}}


def report(results: dict[str, Any]) -> None:
    """Print a table."""
    print(f"decoded images made once in {results['cache_built_in_s']} s")
    for batch, rows in results["batches"].items():
        print(f"{batch} images per domain: median (quartiles)")
        for key, row in rows.items():
            cells = [f"{side} {row[side][1]:9.2f} ({row[side][0]:.2f} - {row[side][2]:.2f})" for side in SIDES]
            ratio = row["ratio"]
            print(f"  {key:8} {cells[0]:36} {cells[1]:36} theirs / ours", end=" ")
            print("" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f} - {ratio[2]:.2f})")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/pacs"), help="folder ROOT/DOMAIN/CLASS/image")
    parser.add_argument("--every", type=int, default=6, help="take each so many-th image of a class; default 6")
    parser.add_argument("--target", default="", help="unseen domain; default the first")
    parser.add_argument("--steps", type=int, default=10, help="updates of each trial; default 10")
    parser.add_argument("--eval-every", type=int, default=0, help="steps between evaluations; default at the end only")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32], help="images per domain; default 16 and 32")
    parser.add_argument("--image-size", type=int, default=224, help="pixels; default 224")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; default 3")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on both sides; default 2")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="worker processes of each of their data loaders; DomainBed starts 8, torch advises one a core; default 2",
    )
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--do", nargs=2, metavar=("SIDE", "PLACE"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    """Measure and print, or be one side."""
    options = arguments()
    if options.do:
        side, place = options.do[0], Path(options.do[1])
        work = json.loads((place / "work.json").read_text())
        torch.set_num_threads(work["threads"])
        result = {"ours": ours, "theirs": theirs}[side](work, place)
        (place / "result.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as place:
        results = measure(options, Path(place))
    report(results)
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        options.json.write_text(json.dumps(results | {"machine": machine, "options": asked}, indent=1) + "\n")


if __name__ == "__main__":
    main()

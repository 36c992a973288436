"""Start-up time and memory of a data set of very many tiny images.

    python benchmarks/many_images.py [--images 500000] [--place FOLDER] [--json FILE]
    python benchmarks/many_images.py --first-step ../shared/data/pacs

Makes a folder of that many files (hard links to a few hundred tiny PNG images) and measures, each in a process of its
own: the first start, which reads and hashes every file; a later start; building the decoded cache and the resident
memory while batches are drawn from it; and start and cache again after a hundred files were added. The folder is
removed at the end.

With `--first-step` the time from the start of the program to its first update is measured instead, with the images of a
folder decoded before, in the user's cache: ResNet-18 at 64 pixels, 8 images per domain, three times.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

DOMAINS, CLASSES, LINKS = 5, 10, 2000
SIZE, BATCH, STEPS = 8, 32, (50, 400)


def make_images(root: Path, n: int) -> None:
    """Write n tiny images; a file has at most `LINKS` names, because file systems limit them."""
    rng = np.random.default_rng(0)
    per_class = n // (DOMAINS * CLASSES)
    source: Path | None = None
    for i in range(per_class * DOMAINS * CLASSES):
        folder = root / f"domain{i % DOMAINS}" / f"class{i // DOMAINS % CLASSES}"
        path = folder / f"{i:07d}.png"
        if source is None or i % LINKS == 0:
            folder.mkdir(parents=True, exist_ok=True)
            source = path
            path.write_bytes(tiny(rng))
        else:
            if i < DOMAINS * CLASSES:
                folder.mkdir(parents=True, exist_ok=True)
            os.link(source, path)


def tiny(rng: np.random.Generator) -> bytes:
    """Return a PNG file of 8 x 8 random pixels."""
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def start(root: Path, cache: Path) -> dict[str, Any]:
    """Open the folder and get its content hash, as every run does first; return seconds and memory."""
    from qtdog.data.decoded_cache import content_sha256
    from qtdog.data.image_folder import open_folder

    begun, cpu_begun = time.perf_counter(), time.process_time()
    dataset = open_folder(root)
    opened = time.perf_counter()
    content = content_sha256(dataset, folder=cache)
    done, cpu_s = time.perf_counter(), time.process_time()
    seconds = {"open_s": round(opened - begun, 2), "content_s": round(done - opened, 2)}
    seconds |= {"start_s": round(done - begun, 2), "cpu_s": round(cpu_s - cpu_begun, 2)}
    return seconds | {"content": content, "rss_mb": rss_mb(), "n": len(dataset)}


def draw(root: Path, cache: Path) -> dict[str, Any]:
    """Draw batches from the decoded cache and return the resident memory early and late."""
    from qtdog.data.decoded_cache import open_cache
    from qtdog.data.image_folder import open_folder
    from qtdog.data.loader import TrainBatches

    dataset = open_folder(root)
    begun = time.perf_counter()
    decoded = open_cache(dataset, SIZE, folder=cache)
    build_s = time.perf_counter() - begun
    pools = {domain: dataset.indices(domain) for domain in dataset.domains}
    how: dict[str, Any] = {"augment": "none", "mean": (0.5,), "std": (0.5,)}
    batches = TrainBatches(decoded, dataset.class_index, pools, batch_size=BATCH, seed=0, **how)
    memory = {}
    for step in range(STEPS[-1] + 1):
        batches.batch(step)
        if step in STEPS:
            memory[f"rss_mb_at_step_{step}"] = rss_mb()
    return {"cache_s": round(build_s, 2)} | memory


def rss_mb() -> float:
    """Return the resident memory of this process."""
    return round(psutil.Process().memory_info().rss / 1e6, 1)


def train(root: Path, cache: Path) -> dict[str, Any]:
    """Train one update, with the user's cache; return the seconds at which what was done, and the processor time."""
    del cache
    times: dict[str, float] = {}

    def reached(name: str) -> None:
        times[name] = round(time.time() - psutil.Process().create_time(), 2)
        times[f"{name}_cpu"] = round(time.process_time(), 2)

    import qtdog
    import qtdog.cli.main  # what the command imports
    from qtdog.core.progress import RunCallback

    class Follower(RunCallback):
        def on_start(self, config: Any, step: int) -> None:
            reached("ready_s")

        def on_step(self, step: int, loss: float, n_images: int) -> None:
            if step == 1:
                reached("first_step_s")

    reached("imported_s")
    how: dict[str, Any] = {"backbone": "resnet18.tv_in1k", "weights": "none", "image_size": 64, "batch_size": 8}
    how |= {"steps": 1, "train": {"eval_every": 1}}
    domain = min(path.name for path in root.iterdir() if path.is_dir())
    with tempfile.TemporaryDirectory() as out:
        qtdog.train(root, domain, out=Path(out) / "run", progress=Follower(), **how)
    return times


def first_step(root: Path) -> dict[str, Any]:
    """Return the times of three starts with decoded images."""
    from qtdog.data.decoded_cache import cache_root

    apart("train", root, cache_root())  # decodes what was not decoded before
    return {f"start {i + 1}": apart("train", root, cache_root()) for i in range(3)}


def apart(what: str, root: Path, cache: Path) -> dict[str, Any]:
    """Run `start` or `draw` in a process of its own."""
    command = [sys.executable, __file__, "--do", what, str(root), str(cache)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(json.dumps(result), file=sys.stderr, flush=True)  # half a million files take long: tell each as it is known
    return result


def measure(n: int, place: Path) -> dict[str, Any]:
    """Return all measurements."""
    root, cache = place / "images", place / "cache"
    begun = time.perf_counter()
    make_images(root, n)
    print(f"{n:,} files made in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    time.sleep(2.5)  # a file that changed just now is not remembered yet
    results: dict[str, Any] = {"n_images": n} | {what: apart("start", root, cache) for what in ("first", "later")}
    results["draw"] = apart("draw", root, cache)
    for i in range(100):
        (root / "domain0" / "class0" / f"new{i}.png").write_bytes(tiny(np.random.default_rng(i)))
    time.sleep(2.5)
    results["after_100_added"] = apart("start", root, cache)
    results["draw_after_100_added"] = apart("draw", root, cache)
    results["disk_mb"] = disk_mb(place)
    return results


def disk_mb(place: Path) -> float:
    """Return the disk that the files below a folder take, each counted once whatever its number of names."""
    found = {}
    for top, _, names in os.walk(place):
        stats = [os.stat(os.path.join(top, name)) for name in (*names, ".")]
        found |= {stat.st_ino: stat.st_blocks * 512 for stat in stats}
    return round(sum(found.values()) / 1e6, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--place", type=Path, help="make the folder in this one; default: the system's temporary one")
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--first-step", type=Path, metavar="DATA", help="measure a start of training on this folder")
    parser.add_argument("--do", nargs=3, metavar=("WHAT", "ROOT", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        what, root, cache = options.do
        print(json.dumps({"start": start, "draw": draw, "train": train}[what](Path(root), Path(cache))))
        return
    if options.first_step:
        print(json.dumps(first_step(options.first_step), indent=1))
        return
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        results = measure(options.images, Path(place))
    text = json.dumps(results, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

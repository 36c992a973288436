"""Does everything work on this machine's GPU, and how fast? For owners of a GPU: at most eight minutes.

    make gpu-check          or   python benchmarks/gpu_check.py [--parts NAME …] [--out FILE.json] [--device cpu]

Each part prints a line and ends up in a JSON file; one that fails says why, and the others go on.

    machine    what the GPU is
    demo       qtdog demo, on the device
    axes       six updates with every objective, quantizer, averager, step rule and feature layer
    parity     the losses of ten float32 updates on the device and on the CPU, TF32 off
    half       the losses of ten updates under bfloat16 and float16, beside float32
    ahead      batches that are augmented ahead on a stream of their own, against those of the CPU, while updates run
    compiled   the losses of ten updates in one graph of torch.compile, beside the plain ones, and how fast they are
    resume     a run stopped half-way and resumed, against one that was not: the same weights?
    speed      seconds of a training step, float and LSQ in turns, and the memory at its peak
    syncs      how often one update makes the host wait for the device (torch's profiler); a wait per update fails
    processes  two processes, where there are two GPUs
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from qtdog.core.config import AFTER_TRAINING, Config
from qtdog.core.config_io import build_config, load_preset
from qtdog.data.augment import CPU
from qtdog.data.known_datasets import RotatedDigits
from qtdog.data.loader import CudaAhead
from qtdog.models.feature_layers import FEATURE_LAYERS
from qtdog.objectives.base import OBJECTIVES
from qtdog.quantizers.registry import QUANTIZERS
from qtdog.training.averagers import AVERAGERS
from qtdog.training.build import build_components
from qtdog.training.components import Components, RunState
from qtdog.training.loop import TrainingRun, begin_step, update
from qtdog.training.step_rules import STEP_RULES

BUDGET_S = 480
N_STEPS = 10
Changes = dict[str, dict[str, Any]]


class Failed(Exception):
    """A part found something wrong."""


def digits_config(changes: Changes | None = None) -> Config:
    """Return a short run on the digits: quantized from the third update on."""
    short: Changes = {
        "data": {"target": "75", "batch_size": 8, "image_size": 16},
        "train": {"steps": N_STEPS, "eval_every": N_STEPS},
        "quantizer": {"name": "lsq", "bits": 7, "start_step": 2},
    }
    return build_config([load_preset("digits"), short, changes or {}])


def losses_of(config: Config, n_steps: int) -> list[float]:
    """Return the loss of each of the first updates, on the device that torch has."""
    parts = build_components(config, RotatedDigits())
    run = TrainingRun(parts, RunState())
    parts.network.train()
    losses = []
    for step in range(n_steps):
        begin_step(parts, step)
        loss = update(parts, parts.batches.batch(step), step)
        run.after_step(loss, 0.0)
        losses.append(loss)
    run.read_losses()
    check_places(parts)
    return torch.stack(losses).tolist()


def check_places(parts: Components) -> None:
    """Refuse a parameter or buffer that is not on the device of the run."""
    kind = parts.accelerator.device.type
    for module in (parts.network, parts.objective):
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.device.type != kind:
                raise Failed(f"{name} of {type(module).__name__} is on {value.device}, not on {kind}")


def machine() -> dict[str, Any]:
    """Return what the machine is."""
    about: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        }
    return about


def demo() -> dict[str, Any]:
    """Run the demo as a user does."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "qtdog", "demo", "--output", str(Path(folder) / "demo")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUDGET_S, check=False)
    if done.returncode:
        raise Failed(done.stderr.strip()[-500:])
    return {"ended": True}


def members() -> list[tuple[str, Changes]]:
    """Return every member of every axis, with what it cannot go without."""
    runs: list[tuple[str, Changes]] = []
    for name in OBJECTIVES:
        layers = [layer for layer in FEATURE_LAYERS if name in FEATURE_LAYERS[layer].OBJECTIVES]
        runs.append(
            (f"objective {name}", {"objective": {"name": name}, "model": {"feature_layer": (layers or ["none"])[0]}})
        )
    for name in QUANTIZERS:
        start = None if name in AFTER_TRAINING else 2
        runs.append((f"quantizer {name}", {"quantizer": {"name": name, "start_step": start}}))
    runs += [(f"averager {name}", {"averager": {"name": name}}) for name in AVERAGERS]
    runs += [(f"step rule {name}", {"step_rule": {"name": name}}) for name in STEP_RULES]
    free = [name for name in FEATURE_LAYERS if not FEATURE_LAYERS[name].OBJECTIVES]
    return runs + [(f"feature layer {name}", {"model": {"feature_layer": name}}) for name in free]


def axes() -> dict[str, Any]:
    """Make six updates with each member of each axis."""
    problems = {}
    known = members()
    for label, changes in known:
        try:
            losses = losses_of(digits_config(changes), 6)
            if not all(abs(loss) < 1e6 for loss in losses):
                problems[label] = f"losses {losses}"
        except Exception as error:  # the others are wanted too
            problems[label] = f"{type(error).__name__}: {error}"[:300]
    if problems:
        raise Failed(json.dumps(problems))
    return {"members": len(known)}


def on_cpu(config: Config, n_steps: int) -> list[float]:
    """Return `losses_of` in a process that sees no GPU."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import gpu_check as check; "
        "print(json.dumps(check.losses_of(check.Config.model_validate_json(sys.argv[2]), int(sys.argv[3]))))"
    )
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-c", code, str(Path(__file__).parent), config.model_dump_json(), str(n_steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=hidden, check=False)
    if done.returncode:
        raise Failed(done.stderr.strip()[-500:])
    return json.loads(done.stdout.splitlines()[-1])


def parity() -> dict[str, Any]:
    """Compare float32 losses of the device with those of the CPU."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    config = digits_config()
    here, there = losses_of(config, N_STEPS), on_cpu(config, N_STEPS)
    off = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(here, there, strict=True))
    if off > 5e-3:
        raise Failed(f"losses differ by a share of {off:.2g}: {here} here, {there} on the CPU")
    return {"largest_difference": off}


def half() -> dict[str, Any]:
    """Compare losses under bfloat16 and float16 with float32."""
    full = losses_of(digits_config(), N_STEPS)
    found = {}
    for precision in ("bf16", "fp16"):
        losses = losses_of(digits_config({"train": {"precision": precision}}), N_STEPS)
        off = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(losses, full, strict=True))
        if not off < 0.1:
            raise Failed(f"losses differ by a share of {off:.2g}: {losses} under {precision}, {full} in float32")
        found[precision] = {"largest_difference": off}
    return found


def ahead() -> dict[str, Any]:
    """Compare batches that are augmented on the device, ahead, with those of the CPU, while updates use them."""
    worst = {}
    for name in ("none", "domainbed"):
        parts = build_components(digits_config({"data": {"workers": 2, "augment": name}}), RotatedDigits())
        parts.network.train()
        device = parts.accelerator.device
        plain = copy.copy(parts.batches)
        plain.device = CPU
        differences = []
        with contextlib.closing(
            parts.batches.stream(0, N_STEPS, CudaAhead(device) if device.type == "cuda" else None)
        ) as batches:
            for step, batch in enumerate(batches):
                begin_step(parts, step)
                update(parts, batch, step)
                expected = plain.batch(step)
                if batch.images.device.type != device.type or not torch.equal(batch.labels.cpu(), expected.labels):
                    raise Failed(f"the batch of step {step} on {batch.images.device} is not that of the CPU")
                levels = (batch.images.cpu() - expected.images).abs() * torch.tensor(plain.std).view(-1, 1, 1) * 255
                differences.append(levels)
        every = torch.cat(differences)
        worst[name] = {"largest_levels": round(every.max().item(), 3), "mean_levels": round(every.mean().item(), 5)}
    if worst["none"]["largest_levels"] > 0.01 or worst["domainbed"]["mean_levels"] > 0.1:
        raise Failed(f"images of the device are not those of the CPU: {worst}")
    return {"batches": 2 * N_STEPS, "levels_of_255_off_the_cpu": worst}


def compiled() -> dict[str, Any]:
    """Compare the losses of compiled updates with those of plain ones, and their time where there is a GPU."""
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    plain = losses_of(digits_config(), N_STEPS)
    graph = losses_of(digits_config({"train": {"compile": backend}}), N_STEPS)
    off = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(graph, plain, strict=True))
    if off > 5e-3:
        raise Failed(f"losses differ by a share of {off:.2g}: {graph} compiled, {plain} plain")
    found: dict[str, Any] = {"backend": backend, "largest_difference": off}
    if torch.cuda.is_available():
        lite0 = ("tf_efficientnet_lite0", 96, 16)
        steps = {name: network_step("lsq", *lite0, changes={"train": {"compile": name}}) for name in ("off", backend)}
        found["step_s"] = {name: statistics.median(times) for name, times in in_turns(steps, 15).items()}
    return found


def resume() -> dict[str, Any]:
    """Stop a run half-way and resume it, and compare its file with that of a run that was not stopped."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        names = ("whole", "halves")
        command = [
            sys.executable,
            "-m",
            "qtdog",
            "train",
            "--data",
            "rotated-digits",
            "--target",
            "75",
            "--steps",
            "40",
        ]
        command += ["--start-step", "20", "--set", "train.eval_every=10", "--output"]
        run_command([*command, str(Path(folder) / "whole")])
        process = subprocess.Popen(
            [*command, str(Path(folder) / "halves")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        checkpoint = Path(folder) / "halves" / "checkpoint"
        while process.poll() is None and not list(checkpoint.glob("step-*")):
            time.sleep(0.02)
        process.terminate()
        process.wait()
        run_command([*command, str(Path(folder) / "halves"), "--resume"])
        whole, halves = (load_file(Path(folder) / name / "model.safetensors") for name in names)
    same = whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)
    return {"stopped": process.returncode != 0, "same_bits": same}


def run_command(command: list[str]) -> None:
    """Run a command; Failed with the end of its errors if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command[3:])}: {done.stderr.strip()[-400:]}")


def network_step(
    quantizer: str, backbone: str, size: int, batch: int, changes: Changes | None = None
) -> tuple[Callable[[], None], Components]:
    """Return a function that makes one update of a network with random weights, and what it is made of.

    The batch lies on the device, as in a run, where threads have copied it ahead.
    """
    options: Changes = {
        "data": {"target": "75", "image_size": size, "batch_size": batch},
        "model": {"backbone": backbone, "weights": "none"},
        "quantizer": {"name": quantizer, "bits": 7, "start_step": 0 if quantizer != "none" else None},
        "train": {"steps": 10**6},
        "optimizer": {"lr": 1e-6},
    }
    parts = build_components(build_config([load_preset("digits"), options, changes or {}]), RotatedDigits())
    parts.network.train()
    held = parts.batches.batch(0).on(parts.accelerator.device)
    count = iter(range(10**6))

    def step() -> None:
        number = next(count)
        begin_step(parts, number)
        update(parts, held, number)

    return step, parts


def wait(parts: Components) -> None:
    """Wait until the device has done its work."""
    if parts.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def in_turns(steps: dict[str, tuple[Callable[[], None], Components]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of an update of each, round by round, five updates at a time."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 3):
        for name, (step, parts) in steps.items():
            wait(parts)
            started = time.perf_counter()
            for _ in range(5):
                step()
            wait(parts)
            if number >= 3:
                times[name].append((time.perf_counter() - started) / 5)
    return times


def speed(backbone: str = "tf_efficientnet_lite0", size: int = 96, batch: int = 16, rounds: int = 15) -> dict[str, Any]:
    """Measure a float and an LSQ step in turns."""
    steps = {name: network_step(name, backbone, size, batch) for name in ("none", "lsq")}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = in_turns(steps, rounds)
    ratios = [a / b for a, b in zip(times["lsq"], times["none"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    about = {
        "network": f"{backbone}, {size} px, 5 domains of {batch}",
        "float_step_s": statistics.median(times["none"]),
        "lsq_step_s": statistics.median(times["lsq"]),
        "ratio": {"q1": low, "median": middle, "q3": high},
    }
    if torch.cuda.is_available():
        about["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return about


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize")
READS = "aten::_local_scalar_dense"  # of tensors on the CPU too, such as Adam's count of steps


def syncs() -> dict[str, Any]:
    """Count in the profile of ten updates what makes the host wait."""
    step, parts = network_step("lsq", "tf_efficientnet_lite0", 96, 8)
    for _ in range(3):
        step()
    wait(parts)
    with torch.profiler.profile() as profile:
        for _ in range(N_STEPS):
            step()
    names = (*WAITS, READS)
    counts = {event.key: event.count / N_STEPS for event in profile.key_averages() if event.key in names}
    n_waits = sum(counts.get(name, 0) for name in WAITS)
    if parts.accelerator.device.type != "cpu" and n_waits >= 1:
        raise Failed(f"an update waits {n_waits:.1f} times for the device: {counts}")
    return {"per_step": counts}


def processes() -> dict[str, Any]:
    """Train with two processes where there are two GPUs."""
    if torch.cuda.device_count() < 2:
        return {"skipped": "one GPU"}
    with tempfile.TemporaryDirectory() as folder:
        launch = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "-m",
            "qtdog",
        ]
        options = ["train", "--data", "rotated-digits", "--target", "75", "--steps", "40", "--output", f"{folder}/run"]
        run_command([*launch, *options])
    return {"processes": 2}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    part.__name__: part
    for part in (machine, demo, axes, parity, half, ahead, compiled, resume, speed, syncs, processes)
}


def run_parts(names: list[str], out: Path | None) -> dict[str, Any]:
    """Run the parts in order, print a line for each, and keep the JSON after each."""
    started = time.perf_counter()
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    for name in names:
        began = time.perf_counter()
        if began - started > BUDGET_S:
            report[name] = {"skipped": f"{BUDGET_S} s are over"}
        else:
            try:
                report[name] = PARTS[name]()
            except Exception as error:  # the next part may work
                report[name] = {
                    "failed": str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
                }
            report[name]["seconds"] = round(time.perf_counter() - began, 1)
        print(f"{name:10s} {json.dumps(report[name])}", flush=True)
        if out is not None:
            out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> int:
    """Run the check; exit code 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default all")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="default %(default)s")
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="cpu: to try the script without a GPU"
    )
    arguments = parser.parse_args()
    if arguments.device == "auto" and not torch.cuda.is_available():
        print("torch finds no GPU here (torch.cuda.is_available() is False); --device cpu tries the script without one")
        return 2
    report = run_parts(arguments.parts, arguments.out)
    failed = [name for name in PARTS if "failed" in report.get(name, {})]
    print(f"written to {arguments.out}; " + (f"failed: {', '.join(failed)}" if failed else "all parts passed"))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

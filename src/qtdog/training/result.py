"""Finishing a run: ship the selected checkpoint, prove that the file answers alike, write down what was measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
from dataclasses import asdict
from typing import Any

import timm
import torch

from qtdog.conversion.inspect import layer_report
from qtdog.conversion.save import save
from qtdog.core.config import config_hash
from qtdog.core.errors import RunError
from qtdog.core.files import sha256_file, write_atomic
from qtdog.data.dataset import DomainDataset
from qtdog.data.text import TextDomains
from qtdog.models.backbones import preprocessing
from qtdog.models.feature_layers import make_feature_layer
from qtdog.models.text import vocabulary
from qtdog.packing.sizes import file_sizes
from qtdog.runs.folder import RunFolder
from qtdog.runs.record import Record
from qtdog.runs.selection import select
from qtdog.training.final import Final
from qtdog.training.group_scores import group_scores
from qtdog.training.parts import Parts
from qtdog.training.problem import Problem
from qtdog.training.shipped import load
from qtdog.training.state import RunState


def finish(
    parts: Parts, state: RunState, final: Final, setting: tuple[Problem, DomainDataset], folder: RunFolder
) -> dict[str, Any]:
    """Write `model.safetensors` and `result.json` and return the result.

    Args:
        parts: with the network that ships (`training.final.final_network_`).
        state: the end of training.
        final: what the network measures.
        setting: problem and data set.
        folder: where to.

    Raises:
        RunError: the shipped file does not give the logits of the training-time model.
    """
    problem, dataset = setting
    save(parts.network, folder.model_file, metadata=_metadata(parts, problem, dataset, final.record))
    _prove(parts, problem, folder)
    result = _result(parts, state, problem, final.record) | {
        "dataset": dataset.sheet.name,
        "n_skipped": len(dataset.skipped),
        "size": asdict(file_sizes(folder.model_file)),
        "model_sha256": sha256_file(folder.model_file),
        "layers": [asdict(layer) for layer in layer_report(parts.network)] if parts.quantizer else [],
        "environment": environment(),
    }
    result |= group_scores(parts, problem, dataset)
    write_atomic(folder.result_file, json.dumps(result | final.extra, indent=1))
    return result | final.extra


def _metadata(parts: Parts, problem: Problem, dataset: DomainDataset, chosen: Record) -> dict[str, Any]:
    config = parts.config
    layer = make_feature_layer(config.model.feature_layer, config.model.feature_params)
    mean, std = preprocessing(config.model.backbone, channels=dataset.sheet.channels)
    size, channels = config.data.image_size, dataset.sheet.channels
    how: dict[str, Any] = {"image_size": size, "channels": channels, "mean": mean, "std": std}
    if isinstance(dataset, TextDomains):
        how |= {"max_tokens": config.data.max_tokens, "vocabulary": vocabulary(config.model.backbone)}
    return {
        "backbone": config.model.backbone,
        "head": config.model.head,
        "feature_layer": config.model.feature_layer if layer.SHIPS else "none",
        "feature_params": layer.params if layer.SHIPS else {},
        "classes": list(dataset.classes),
        "preprocessing": how | {"resize": "bilinear, antialiased, no crop"},
        "dataset": dataset.sheet.name,
        "source_domains": list(problem.sources),
        "target_domain": problem.target,
        "accuracy": {"source": chosen.seen.source_accuracy, "test": chosen.test_accuracy},
        "pretraining": parts.network.pretraining,
        "bits": config.quantizer.bits if parts.quantizer and parts.quantizer.packs else None,
        "step": chosen.seen.step,
        "selection": config.train.selection,
        "config_hash": config_hash(config),
    }


def _prove(parts: Parts, problem: Problem, folder: RunFolder) -> None:
    """Check that the file on disk gives the training-time logits on source images (never on the target)."""
    device = parts.accelerator.device
    images = parts.batches.batch(0).images.to(device)
    shipped = load(folder.model_file, device=device)
    with torch.no_grad():
        ours, theirs = parts.network(images), shipped(images)
    # Other devices may pick another convolution kernel from one call to the next.
    same = torch.equal(ours, theirs) if device.type == "cpu" else torch.allclose(ours, theirs, atol=1e-4)
    if not same:
        worst = (ours - theirs).abs().max().item()
        raise RunError(f"{folder.model_file} does not give the training-time logits (largest difference {worst:g})")


def _result(parts: Parts, state: RunState, problem: Problem, chosen: Record) -> dict[str, Any]:
    config = parts.config
    forked_from = state.forked_from or {"step": 0, "seed": config.train.seed}
    n_images = (config.train.steps - forked_from["step"]) * config.data.batch_size * len(problem.sources)
    return {
        "config_hash": config_hash(config),
        "target_domain": problem.target,
        "source_domains": list(problem.sources),
        "test_mode": config.data.test_mode,
        "selection": config.train.selection,
        "selected_step": chosen.seen.step,
        "source_accuracy": chosen.seen.source_accuracy,
        "test_accuracy": chosen.test_accuracy,
        "test_accuracy_80": {domain: score.accuracy for domain, score in chosen.test_in.items()},
        "by_selection": _by_selection(state.records),
        "pretraining": parts.network.pretraining,
        "forked_from_step": forked_from["step"],
        "forked_from_seed": forked_from["seed"],
        "trained_s": round(state.trained_s, 2),  # of this run's own steps
        "images_per_s": round(n_images / state.trained_s, 1) if state.trained_s else None,
    }


def _by_selection(records: list[Record]) -> dict[str, Any]:
    """Return step and accuracies that each selection method would give; `oracle` looks at the target and says so."""
    by_step = {record.seen.step: record for record in records}
    methods = ["source", "last"] + (["oracle"] if records[0].test_accuracy is not None else [])
    table = {}
    for method in methods:
        step = select(method, records)
        if step is not None:
            record = by_step[step]
            accuracies = {"source_accuracy": record.seen.source_accuracy, "test_accuracy": record.test_accuracy}
            table[method] = {"step": step} | accuracies
    return table


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge or repeat a measurement."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "n_cores": os.cpu_count(),
        "n_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as stream:
            names = [line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()

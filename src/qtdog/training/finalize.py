"""The end of a run: average, quantize after training, write the model file, verify it, write the result."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate.utils import broadcast
from torch import Tensor

from qtdog.conversion.attach import activation_grids
from qtdog.conversion.inspect import layer_report
from qtdog.conversion.save import save
from qtdog.core.config import config_hash
from qtdog.core.errors import RunError
from qtdog.core.files import sha256_file, write_atomic
from qtdog.core.progress import Progress
from qtdog.core.quantized import QuantizedTensor
from qtdog.core.random import numpy_stream
from qtdog.data.loader import Indices
from qtdog.data.text import TextDomains
from qtdog.models.feature_layers import make_feature_layer
from qtdog.models.network import FeaturizerSpec
from qtdog.models.text_backbones import vocabulary
from qtdog.packing.sizes import file_sizes
from qtdog.quantizers.ptq import Fixed
from qtdog.quantizers.registry import works_after_training
from qtdog.runs.folder import RunFolder
from qtdog.runs.record import Record, Score
from qtdog.runs.selection import select
from qtdog.training.calibration import LabeledLogits, calibrate_answers
from qtdog.training.components import Components, RunState
from qtdog.training.evaluation import class_scores, evaluating, fit_batch_norm_, group_scores
from qtdog.training.load_model import load_model

CALIBRATION_BATCH = 32


def quantize_after_training_(
    components: Components, check_interrupt: Callable[[], None], progress: Progress
) -> dict[str, Any]:
    """Give the network's quantizers their codes by the method that the configuration names; return the report.

    The images are training images of the sources, never held-out ones, never the target's. Every process does the same
    work and takes the codes of the first one in the end, so that none waits long and all have the same network.

    Args:
        components: of a run whose quantizer works after training, with the chosen float network in evaluation mode.
        check_interrupt: called often, equally often in every process; may raise to break off, the network still in
            float.
        progress: is called with (done, total) of the work.

    Returns:
        method, start of the step sizes, n_images, seconds, and the layers (`conversion.calibrate.LayerCalibration`).

    Raises:
        ConfigError, ModelError: as in `conversion.calibrate.calibrate_`.
    """
    quantizer, started = components.config.quantizer, time.perf_counter()
    n_wanted = 0 if quantizer.name == "rtn" else quantizer.calibration_images
    images = CalibrationImages(
        components, calibration_indices(components.batches.pools, n_wanted, components.config.train.seed)
    )
    from qtdog.conversion.calibrate import calibrate_  # other runs need none of the methods after training

    layers = calibrate_(
        components.network, quantizer.name, images, damping=quantizer.damping, check=check_interrupt, progress=progress
    )
    if components.accelerator.num_processes > 1:
        _take_codes_of_the_first_process_(components)
    return {
        "method": quantizer.name,
        "init": quantizer.init,
        "n_images": len(images.indices),
        "seconds": round(time.perf_counter() - started, 2),
        "layers": [asdict(layer) for layer in layers],
    }


def calibration_indices(pools: Mapping[str, Indices], n: int, seed: int) -> Indices:
    """Return n images spread evenly over the domains, in an order that the seed decides; all, if there are fewer.

    A domain that runs out leaves its share to the others.

    Example:
        >>> pools = {"a": np.array([1, 2, 3]), "b": np.array([7])}
        >>> sorted(calibration_indices(pools, 9, seed=0).tolist())
        [1, 2, 3, 7]
    """
    orders = [numpy_stream(seed, "calibration", domain).permutation(pool) for domain, pool in pools.items()]
    turns = chain.from_iterable(zip_longest(*orders))
    return np.array(list(islice((index for index in turns if index is not None), n)), dtype=np.int64)


@dataclass(frozen=True)
class CalibrationImages:
    """Batches of images as the network sees them in evaluation, not augmented; can be gone through again.

    Attributes:
        components: of the run.
        indices: of the images, in their order.
    """

    components: Components
    indices: Indices

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.indices) // CALIBRATION_BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield float32 (b, C, H, W) on the device."""
        device = self.components.accelerator.device
        for images, _ in self.components.inputs.batches(self.indices, CALIBRATION_BATCH, device):
            yield images


def _take_codes_of_the_first_process_(components: Components) -> None:
    assert components.quantizer is not None
    for quantizer in components.quantizer.layers.values():
        assert isinstance(quantizer, Fixed)
        codes, scale = broadcast((quantizer.codes.contiguous(), quantizer.scale))
        quantizer.set_(QuantizedTensor(codes, scale, quantizer.spec))


@dataclass(frozen=True)
class Final:
    """What is known of the network that is saved.

    Attributes:
        record: its evaluation.
        extra: what the result says besides, by key of `result.json`.
    """

    record: Record
    extra: dict[str, Any] = field(default_factory=dict)


def final_network_(
    components: Components,
    state: RunState,
    *,
    check_interrupt: Callable[[], None] = lambda: None,
    progress: Progress = None,
) -> Final:
    """Give the network the weights that are saved, and return what they measure.

    That is the selected checkpoint, or what the averager insists on; quantized now if the quantizer works after
    training. Every process calls this.

    Args:
        components: of the run.
        state: the end of training.
        check_interrupt: called often while it lasts; may raise to break off.
        progress: is called with (done, total) of quantization after training.

    Raises:
        ConfigError, ModelError: as in `training.finalize.quantize_after_training_`.
    """
    step = select(components.config.train.selection, state.records)
    assert step is not None  # the last step is always evaluated, and selectable
    averaged = components.averager.final()
    if averaged is None:
        assert state.selected is not None
        components.network.load_state_dict(state.selected)
        record = next(record for record in state.records if record.seen.step == step)
    else:
        components.network.load_state_dict(averaged, strict=False)  # what is not averaged stays that of the last update
        fit_batch_norm_(components)
        record = components.evaluate(state.step, True, None, check_interrupt)
    components.network.eval()
    kept = {"kept": components.averager.kept(step), "trained_on_heldout": components.config.data.train_on_heldout}
    if not works_after_training(components.config.quantizer.name):
        return Final(record, kept)
    report = quantize_after_training_(components, check_interrupt, progress)
    after = components.evaluate(record.seen.step, True, None, check_interrupt)
    return Final(after, kept | _of_quantized(components, record, report, after))


def _of_quantized(components: Components, before: Record, report: dict[str, Any], after: Record) -> dict[str, Any]:
    """Return what the result says of a network quantized after training: only the one that was chosen was."""
    float_network = _accuracies(before) | {"source": asdict(before.seen)["source"]}
    chosen = {components.config.train.selection: {"step": after.seen.step} | _accuracies(after)}
    return {"after_training": report | {"float": float_network}, "by_selection": chosen}


def _accuracies(record: Record) -> dict[str, float | None]:
    return {"source_accuracy": record.seen.source_accuracy, "test_accuracy": record.test_accuracy}


def write_run_result(components: Components, state: RunState, final: Final, folder: RunFolder) -> dict[str, Any]:
    """Write `model.safetensors` and `result.json` and return the result.

    Args:
        components: with the network that is saved (`training.finalize.final_network_`).
        state: the end of training.
        final: what the network measures.
        folder: where to.

    Raises:
        RunError: the saved file does not give the logits of the training-time model.
    """
    dataset = components.dataset
    source, test = _validation_and_test_logits(components)
    answers = calibrate_answers(_joined(source), _joined(test), components.config.train.abstain)
    fitted = {"temperature": answers.temperature, "accept_threshold": answers.accept_threshold}
    save(components.network, folder.model_file, metadata=_metadata(components, final.record) | fitted)
    verify_model_file(components, folder)
    result = _result(components, state, final.record) | {
        "dataset": dataset.card.name,
        "n_skipped": len(dataset.skipped),
        "size": asdict(file_sizes(folder.model_file)),
        "model_sha256": sha256_file(folder.model_file),
        "layers": [asdict(layer) for layer in layer_report(components.network)] if components.quantizer else [],
        "coverage": components.quantizer.coverage.to_json() if components.quantizer else None,
        "calibration": answers.to_json(),
        "classes": {"source": _by_class(source, dataset.classes), "test": _by_class(test, dataset.classes)},
        "environment": environment(),
    }
    result |= group_scores(components)
    write_atomic(folder.result_file, json.dumps(result | final.extra, indent=1))
    return result | final.extra


def _validation_and_test_logits(components: Components) -> tuple[dict[str, LabeledLogits], dict[str, LabeledLogits]]:
    """Return by domain the logits of the sources' validation images, if none was trained on, and of the test images."""
    protocol, in_domain = components.protocol, components.config.data.test_mode == "in-domain"
    source = {} if protocol.train_on_heldout else protocol.selection_sets()
    test = {domain: protocol.splits[domain].test for domain in protocol.sources} if in_domain else {}
    if protocol.target is not None and not in_domain:
        test = {protocol.target: protocol.splits[protocol.target].everything}
    return _labeled_logits(components, source), _labeled_logits(components, test)


@torch.no_grad()
def _labeled_logits(components: Components, parts: Mapping[str, Indices]) -> dict[str, LabeledLogits]:
    parts = {domain: indices for domain, indices in parts.items() if len(indices)}
    if not parts:
        return {}
    device = components.accelerator.device
    with evaluating(components.network):
        found = LabeledLogits.concatenate(
            [
                LabeledLogits(components.network(images.to(device)).float().cpu()[None], labels.cpu())
                for images, labels in components.inputs.batches(np.concatenate(list(parts.values())))
            ]
        )
    sizes = list(map(len, parts.values()))
    split = zip(parts, found.logits.split(sizes, dim=1), found.labels.split(sizes), strict=True)
    return {domain: LabeledLogits(logits, labels) for domain, logits, labels in split}


def _joined(parts: Mapping[str, LabeledLogits]) -> LabeledLogits | None:
    return LabeledLogits.concatenate(list(parts.values())) if parts else None


def _by_class(parts: Mapping[str, LabeledLogits], classes: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return by domain how the images of each class were answered (`training.evaluation.class_scores`)."""
    return {domain: class_scores(one.logits.mean(0).argmax(1), one.labels, classes) for domain, one in parts.items()}


def _metadata(components: Components, chosen: Record) -> dict[str, Any]:
    config, dataset, protocol = components.config, components.dataset, components.protocol
    layer = make_feature_layer(config.model.feature_layer, config.model.feature_params)
    size, channels = config.data.image_size, dataset.card.channels
    options: dict[str, Any] = {
        "image_size": size,
        "channels": channels,
        "mean": components.inputs.mean,
        "std": components.inputs.std,
    }
    if isinstance(dataset, TextDomains):
        options |= {"max_tokens": config.data.max_tokens, "vocabulary": vocabulary(config.model.backbone)}
    metadata: dict[str, Any] = {
        "backbone": config.model.backbone,
        "head": config.model.head,
        "feature_layer": config.model.feature_layer if layer.SAVED else "none",
        "feature_params": layer.params if layer.SAVED else {},
        "classes": list(dataset.classes),
        "preprocessing": options | {"resize": "bilinear, antialiased, no crop"},
        "dataset": dataset.card.name,
        "source_domains": list(protocol.sources),
        "target_domain": protocol.target,
        "accuracy": {"source": chosen.seen.source_accuracy, "test": chosen.test_accuracy},
        "pretraining": components.network.pretraining,
        "bits": config.quantizer.bits if components.quantizer and components.quantizer.packs else None,
        "step": chosen.seen.step,
        "selection": config.train.selection,
        "config_hash": config_hash(config),
    }
    if FeaturizerSpec(config.model.backbone, channels, size).is_timm:
        metadata["timm"] = timm.__version__
    if grids := activation_grids(components.network):
        metadata["activations"] = {name: asdict(grid) for name, grid in grids.items()}
    if config.plugins.sha256:
        pairs = zip(config.plugins.files, config.plugins.sha256, strict=True)
        # names alone: folders of this machine are nobody's business
        metadata["plugins"] = [{"name": Path(file).name, "sha256": digest} for file, digest in pairs]
    return metadata


def verify_model_file(components: Components, folder: RunFolder) -> None:
    """Check that the file on disk gives the training-time logits on source images (never on the target).

    Raises:
        RunError: it does not.
    """
    device = components.accelerator.device
    images = components.batches.batch(0).images.to(device)
    saved = load_model(folder.model_file, device=device)
    with torch.no_grad():
        ours, theirs = components.network(images), saved(images)
    # Other devices may pick another convolution kernel from one call to the next.
    same = torch.equal(ours, theirs) if device.type == "cpu" else torch.allclose(ours, theirs, atol=1e-4)
    if not same:
        worst = (ours - theirs).abs().max().item()
        raise RunError(f"{folder.model_file} does not give the training-time logits (largest difference {worst:g})")


def _result(components: Components, state: RunState, chosen: Record) -> dict[str, Any]:
    config, protocol = components.config, components.protocol
    forked_from = state.forked_from or {"step": 0, "seed": config.train.seed}
    n_images = (config.train.steps - forked_from["step"]) * config.data.batch_size * len(protocol.sources)
    return {
        "config_hash": config_hash(config),
        "target_domain": protocol.target,
        "source_domains": list(protocol.sources),
        "test_mode": config.data.test_mode,
        "selection": config.train.selection,
        "selected_step": chosen.seen.step,
        "source_accuracy": chosen.seen.source_accuracy,
        "test_accuracy": chosen.test_accuracy,
        "scores": {"source": _by_domain(chosen.seen.source), "test": _by_domain(chosen.test)},
        "test_accuracy_80": {domain: score.accuracy for domain, score in chosen.test_in.items()},
        "by_selection": _by_selection(state.records),
        "pretraining": components.network.pretraining,
        "forked_from_step": forked_from["step"],
        "forked_from_seed": forked_from["seed"],
        "trained_s": round(state.trained_s, 2),  # of this run's own steps
        "images_per_s": round(n_images / state.trained_s, 1) if state.trained_s else None,
    }


def _by_domain(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {domain: asdict(score) for domain, score in scores.items()}


def _by_selection(records: list[Record]) -> dict[str, Any]:
    """Return step and accuracies that each selection method would give; `oracle` looks at the target and says so."""
    by_step = {record.seen.step: record for record in records}
    methods = ["source", "last"] + (["oracle"] if records[0].test_accuracy is not None else [])
    table = {}
    for method in methods:
        step = select(method, records)
        if step is not None:
            table[method] = {"step": step} | _accuracies(by_step[step])
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

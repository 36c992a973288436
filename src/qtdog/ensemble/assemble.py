"""From finished runs to one ensemble file, what it costs and what it measures."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtdog.conversion.save import save
from qtdog.core.config import TrainConfig
from qtdog.core.errors import RunError
from qtdog.core.files import sha256_file, write_atomic
from qtdog.core.random import torch_stream
from qtdog.core.safe_text import read_json
from qtdog.ensemble.model import (
    EnsembleInfo,
    EnsembleModel,
    Member,
    build_model,
    check_alike,
    check_kind,
    heldout_note,
    load,
    share_splits,
)
from qtdog.ensemble.scoring import EvaluationSet, Scores, mean_accuracy
from qtdog.ensemble.weight_averaging import Recipe, average_members, check_recipe
from qtdog.models.network import Network, to_device_
from qtdog.packing.ensemble_file import save_ensemble
from qtdog.packing.sizes import ensemble_sizes, file_sizes
from qtdog.runs.finished import KINDS
from qtdog.training.calibration import AnswerCalibration, LabeledLogits, calibrate_answers
from qtdog.training.evaluation import class_scores
from qtdog.training.finalize import environment


@dataclass(frozen=True)
class EnsembleCost:
    """The cost of a model beside one run and one network.

    Attributes:
        training_steps: updates behind it; what members share at their beginning counts once.
        training_runs: the same in lengths of one run.
        inference_passes: forward passes per image.
    """

    training_steps: int
    training_runs: float
    inference_passes: int


def cost(members: Sequence[Member], *, one_model: bool, extra_steps: int = 0) -> EnsembleCost:
    """Return the cost of a model made from `members`.

    Five runs that share the first 40 % of their steps cost 0.4 + 5 · 0.6 = 3.4 runs.

    Args:
        members: the runs it is made from.
        one_model: whether it is one network; else every member runs.
        extra_steps: updates made after the members were joined.
    """
    own = sum(member.config.train.steps - member.forked_from[1] for member in members)
    shared = sum(step for _, step in {member.forked_from for member in members})
    one_run = sum(member.config.train.steps for member in members) / len(members)
    steps = own + shared + extra_steps
    return EnsembleCost(steps, steps / one_run, 1 if one_model else len(members))


@dataclass(frozen=True)
class EnsembleScores:
    """Scores by domain: of the whole model first, then of its members where those were scored too.

    Attributes:
        source: on the held-out images of each source domain.
        test: on the test images.
        test_80: on the 80 % of the target that DomainBed reports.
    """

    source: Scores
    test: Scores
    test_80: Scores

    @property
    def accuracy(self) -> dict[str, float | None]:
        """Of the whole model, the mean over domains; None where nothing was scores."""
        return {"source": mean_accuracy(self.source, 0), "test": mean_accuracy(self.test, 0)}


def describe_ensemble(members: Sequence[Member], scores: EnsembleScores, folder: Path) -> dict[str, Any]:
    """Return what `result.json` says of the protocol, the accuracies and the members.

    Args:
        members: the runs.
        scores: of what was made of them.
        folder: where the result lies; the members' folders are given relative to it.
    """
    first = members[0]
    entries = [_member_entry(member, folder) for member in members]
    return {
        "n_members": len(members),
        "dataset": first.result.get("dataset"),
        "pretraining": " / ".join(dict.fromkeys(member.info.pretraining for member in members)),
        "target_domain": first.info.target_domain,
        "source_domains": list(first.info.source_domains),
        "no_source_score": heldout_note(members),
        "test_mode": first.config.data.test_mode,
        "selection": first.config.train.selection,
        "source_accuracy": scores.accuracy["source"],
        "test_accuracy": scores.accuracy["test"],
        "test_accuracy_80": {domain: part[0].accuracy for domain, part in scores.test_80.items()},
        "domains": {"source": _by_domain(scores.source), "test": _by_domain(scores.test)},
        "members": entries,
        "member_mean": {key: _mean([entry[key] for entry in entries]) for key in ("source_accuracy", "test_accuracy")},
    }


def _member_entry(member: Member, folder: Path) -> dict[str, Any]:
    keys = ("source_accuracy", "test_accuracy", "selected_step", "model_sha256", "config_hash")
    return {
        "folder": os.path.relpath(member.path, folder),
        "seed": member.config.train.seed,
        "trial": member.config.data.trial,
        "forked_from_step": member.forked_from[1],
        **{key: member.result[key] for key in keys},
    }


def _by_domain(scores: Scores) -> dict[str, Any]:
    return {
        domain: asdict(part[0]) | {"member_accuracies": [score.accuracy for score in part[1:]]}
        for domain, part in scores.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


N_VERIFIED = 16  # random images on which the file is compared with the model in memory


@dataclass(frozen=True)
class EnsembleSpec:
    """Which ensemble to make, and where to write it.

    Attributes:
        kind: a name of `runs.entry.KINDS`.
        file: the model file to write; `result.json` goes beside it.
        recipe: for the kinds that average the members into one network.
    """

    kind: str
    file: Path
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def result_file(self) -> Path:
        """Where the result is written."""
        return self.file.with_name("result.json")


def assemble(
    members: Sequence[Member],
    spec: EnsembleSpec,
    evaluation_set: EvaluationSet | None = None,
) -> dict[str, Any]:
    """Make the model that `spec` describes, measure it, write file and result, and return the result.

    Args:
        members: finished runs.
        spec: kind, file and recipe.
        evaluation_set: the images to measure it on; None to measure nothing.

    Raises:
        ConfigError: members that do not go together, are not what the kind is made of, or a recipe that does not apply.
        RunError: the folder holds something else, or the file does not give the logits of the model in memory.
        FormatError, ModelError: a member's file cannot be used.
    """
    check_alike(members)
    check_kind(spec.kind, members)
    check_recipe(spec.kind, spec.recipe)
    check_folder(spec)
    if KINDS[spec.kind].one_model:
        made = _average_members(members, spec, evaluation_set)
    else:
        members = best_first(members)
        made = _keep_members(members, spec, evaluation_set)
    result = {"kind": spec.kind} | describe_ensemble(members, made.scores, spec.file.parent)
    result |= asdict(made.cost) | made.details | {"environment": environment()}
    write_atomic(spec.result_file, json.dumps(result, indent=1))
    return result


def check_folder(spec: EnsembleSpec) -> None:
    """Refuse to write into the folder of a run, or over the result of one.

    Raises:
        RunError: naming the folder.
    """
    folder = spec.file.parent
    foreign = (folder / "config.yaml").exists()
    if spec.result_file.is_file():
        foreign = foreign or "members" not in _saved_result(spec)
    if foreign:
        raise RunError(f"{folder} holds a run, and its result.json would be lost; choose another --output")


def best_first(members: Sequence[Member]) -> list[Member]:
    """Return members with the best first: by their accuracy on held-out source images.

    Members that held out different images cannot be compared, and keep their order.
    """
    scores = [member.result["source_accuracy"] for member in members]
    if not share_splits(members) or None in scores:
        return list(members)
    return sorted(members, key=lambda member: -member.result["source_accuracy"])


def finished(members: Sequence[Member], spec: EnsembleSpec) -> dict[str, Any] | None:
    """Return the result of just this ensemble if it was made before, else None."""
    if not (spec.result_file.is_file() and spec.file.is_file()):
        return None
    check_folder(spec)
    result = _saved_result(spec)
    files = sorted(member.result["model_sha256"] for member in members)
    try:
        same = result["kind"] == spec.kind and sorted(member["model_sha256"] for member in result["members"]) == files
        if KINDS[spec.kind].one_model:
            same = same and asdict(spec.recipe).items() <= result.get("recipe", {}).items()
        return result if same and result["model_sha256"] == sha256_file(spec.file) else None
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{spec.result_file} does not hold what an ensemble writes ({error!r}); delete it") from error


def _saved_result(spec: EnsembleSpec) -> dict[str, Any]:
    result = read_json(spec.result_file)
    if not isinstance(result, dict):
        raise RunError(f"{spec.result_file} does not hold what an ensemble writes; delete it")
    return result


def members_hash(members: Sequence[Member], kind: str) -> str:
    """Return 12 hex digits that name an ensemble: its kind and its members' files, in any order."""
    parts = [kind, *sorted(member.result["model_sha256"] for member in members)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Made:
    """An ensemble that was written to its file."""

    scores: EnsembleScores
    cost: EnsembleCost
    details: dict[str, Any]


def _keep_members(members: Sequence[Member], spec: EnsembleSpec, evaluation_set: EvaluationSet | None) -> _Made:
    price = cost(members, one_model=False)
    infos = tuple(member.info for member in members)
    unknown: dict[str, float | None] = {"source": None, "test": None}
    info = EnsembleInfo(spec.kind, infos, unknown, price.training_steps, price.training_runs)
    packed = [member.packed for member in members]
    model = build_model(spec.file, packed, info, device="cpu" if evaluation_set is None else evaluation_set.device)
    source: list[LabeledLogits] = []
    test: list[LabeledLogits] = []
    scores = EnsembleScores({}, {}, {})
    if evaluation_set is not None:

        def logits_of(images: Tensor) -> Tensor:
            logits = model.member_logits(images)
            return torch.cat([logits.mean(0, keepdim=True), logits])

        scores = EnsembleScores(evaluation_set.source(logits_of, source), *evaluation_set.test(logits_of, test))
    on_source, on_test = _members_alone(source), _members_alone(test)
    answers = _calibrate(on_source, on_test, evaluation_set)
    about = {
        "kind": spec.kind,
        "accuracy": scores.accuracy,
        "training_steps": price.training_steps,
        "training_runs": price.training_runs,
        "temperature": answers.temperature,
        "accept_threshold": answers.accept_threshold,
    }
    save_ensemble(spec.file, packed, about)
    verify_file(model, members[0], spec.file)
    size = asdict(ensemble_sizes(spec.file))
    details = {
        "size": size,
        "model_sha256": sha256_file(spec.file),
        "calibration": answers.to_json(),
        "classes": _by_class(on_test, members[0]),
    }
    return _Made(scores, price, details)


def _calibrate(
    source: LabeledLogits | None, test: LabeledLogits | None, evaluation_set: EvaluationSet | None
) -> AnswerCalibration:
    abstain = TrainConfig().abstain if evaluation_set is None else evaluation_set.config.train.abstain
    return calibrate_answers(source, test, abstain)


def _members_alone(parts: Sequence[LabeledLogits]) -> LabeledLogits | None:
    """Return the logits of the members, without the mean before them; None without images."""
    if not parts:
        return None
    whole = LabeledLogits.concatenate(parts)
    return LabeledLogits(whole.logits[1:], whole.labels)


def _average_members(
    members: Sequence[Member],
    spec: EnsembleSpec,
    evaluation_set: EvaluationSet | None,
) -> _Made:
    recipe = spec.recipe
    averaged = average_members(members, spec.kind, recipe, evaluation_set)
    network = to_device_(averaged.network, torch.device("cpu") if evaluation_set is None else evaluation_set.device)
    scores = EnsembleScores({}, {}, {})
    source: list[LabeledLogits] = []
    test: list[LabeledLogits] = []
    if evaluation_set is not None:

        def logits_of(images: Tensor) -> Tensor:
            return network(images)[None]

        scores = EnsembleScores(evaluation_set.source(logits_of, source), *evaluation_set.test(logits_of, test))
    on_source, on_test = (LabeledLogits.concatenate(parts) if parts else None for parts in (source, test))
    answers = _calibrate(on_source, on_test, evaluation_set)
    price = cost(members, one_model=True, extra_steps=recipe.tune_steps)
    origin = {"kind": spec.kind} | asdict(recipe) | {"members": [members[k].info.config_hash for k in averaged.used]}
    origin |= {"training_steps": price.training_steps, "training_runs": price.training_runs}
    changes = {
        "accuracy": scores.accuracy,
        "bits": members[0].info.bits if spec.kind == "soup" else None,
        "step": max(member.info.step for member in members),
        "config_hash": members_hash(members, spec.kind),
        "joined": origin,
        "temperature": answers.temperature,
        "accept_threshold": answers.accept_threshold,
    }
    save(network, spec.file, metadata=members[0].packed.metadata | changes)
    verify_file(network, members[0], spec.file)
    size = asdict(file_sizes(spec.file))
    recipe_used = asdict(recipe) | {"used": list(averaged.used)}
    details = {"size": size, "model_sha256": sha256_file(spec.file), "recipe": recipe_used}
    about_answers = {"calibration": answers.to_json(), "classes": _by_class(on_test, members[0])}
    return _Made(scores, price, details | about_answers)


def _by_class(test: LabeledLogits | None, member: Member) -> dict[str, Any]:
    """Return how the images of each class of the unseen domain were answered; nothing where there is none."""
    target = member.info.target_domain
    if test is None or target is None or member.config.data.test_mode == "in-domain":
        return {}
    return {"test": {target: class_scores(test.logits.mean(0).argmax(1), test.labels, member.info.classes)}}


@torch.no_grad()
def verify_file(model: EnsembleModel | Network, member: Member, file: Path) -> None:
    """Check that the file on disk gives the logits of the model in memory, on random images.

    Raises:
        RunError: it does not.
    """
    preprocessing = member.info.preprocessing
    device = next(model.parameters()).device
    shape = (N_VERIFIED, preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
    images = torch.randn(shape, generator=torch_stream(0, "proof")).contiguous(memory_format=torch.channels_last)
    if preprocessing.max_tokens:  # every vocabulary has the first eight numbers
        images = torch.randint(1, 8, (N_VERIFIED, preprocessing.max_tokens), generator=torch_stream(0, "proof"))
    ours, theirs = model(images.to(device)), load(file, device=device)(images.to(device))
    same = torch.equal(ours, theirs) if device.type == "cpu" else torch.allclose(ours, theirs, atol=1e-4)
    if not same:
        worst = (ours - theirs).abs().max().item()
        raise RunError(f"{file} does not give the logits of the model in memory (largest difference {worst:g})")

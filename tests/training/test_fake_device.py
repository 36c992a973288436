"""Runs on a device that is none (`tests/fake_device.py`) give the files and numbers of the CPU, and never wait."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import qtdog
from qtdog.core.config import AFTER_TRAINING, Config
from qtdog.core.errors import Interrupted, NonFiniteLossError
from qtdog.core.progress import StopAfter
from qtdog.core.registry import Registry
from qtdog.data.augment import CPU
from qtdog.data.dataset import DomainSubset
from qtdog.data.known_datasets import RotatedDigits
from qtdog.data.loader import BUILT_IN, Batch, TrainBatches
from qtdog.ensemble.assemble import EnsembleSpec, assemble
from qtdog.ensemble.model import load as load_file
from qtdog.ensemble.model import read_member
from qtdog.ensemble.prediction import prediction_rows
from qtdog.ensemble.scoring import compare_sites, open_evaluation_set, score_corruptions
from qtdog.ensemble.teacher import load_teacher
from qtdog.ensemble.weight_averaging import Recipe
from qtdog.objectives.base import DomainOutputs
from qtdog.packing.packed_file import load_packed
from qtdog.runs.finished import KINDS
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.checkpoint import checkpoint_folders, step_of
from qtdog.training.components import Components, RunState
from qtdog.training.dart import dart
from qtdog.training.loop import TrainingRun, begin_step, train, update
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, no_health_check, run, train_fork_point
from support import load_script

CALM = RunCallbacks(make_health_check=no_health_check, warn=lambda text: None)


def tiny(short_config: Callable[..., Config], digits: DomainSubset, **changes: dict[str, Any]) -> Config:
    data = {"target": "75", "batch_size": 4, "image_size": 8, "workers": 0}
    train = {"steps": 4, "eval_every": 2, "checkpoint_every": 1}
    quantizer = {"name": "lsq", "start_step": 2}
    return resolve(short_config(**({"data": data, "train": train, "quantizer": quantizer} | changes)), digits)


@pytest.fixture
def on_device(fake: SimpleNamespace) -> Iterator[Any]:
    with fake.fake_device() as watch:
        yield watch


def on_cpu(config: Config, digits: DomainSubset, tmp_path: Path) -> bytes:
    folder = RunFolder(tmp_path / "cpu")
    run(config, digits, folder, callbacks=CALM)
    return folder.model_file.read_bytes()


contract = load_script("tests/stress/contract.py")
MEMBERS: dict[str, Registry[Any]] = contract.MEMBERS


def cells_of_all_members() -> list[dict[str, str]]:
    """Return the fewest cells in which every member of every axis occurs."""
    longest = max(map(len, contract.AXES.values()))
    return [{axis: names[place % len(names)] for axis, names in contract.AXES.items()} for place in range(longest)]


def config_of(cell: dict[str, str], content: str) -> Config:
    """Return the configuration of a cell's run, with less work for OBC, which takes a second for each layer."""
    config = contract.config_of(cell, content)
    changes: dict[str, Any] = {}
    if cell["quantizer"] == "obc":
        changes["quantizer"] = config.quantizer.model_copy(update={"include": ("featurizer.3",)})
    if cell["objective"] == "arm":  # Adam would make as much of a gradient that is nothing but rounding as of any
        changes["optimizer"] = config.optimizer.model_copy(update={"name": "sgd"})
    return config.model_copy(update=changes)


def files_of(config: Config, data: DomainSubset, tmp_path: Path, fake: SimpleNamespace) -> tuple[bytes, bytes]:
    """Return the model files of a run on the CPU and of one on the device."""
    expected = on_cpu(config, data, tmp_path)
    folder = RunFolder(tmp_path / "device")
    with fake.fake_device() as watch:
        run(config, data, folder, callbacks=CALM)
    assert watch.n_copies > 0
    return expected, folder.model_file.read_bytes()


@pytest.fixture(scope="module")
def opened() -> tuple[DomainSubset, str]:
    """The data set of the cells, and the name of its content."""
    return contract.open_digits()


@pytest.mark.parametrize("cell", cells_of_all_members(), ids=contract.name_of)
def test_a_run_on_the_device_gives_the_file_of_the_cpu(
    cell: dict[str, str], opened: tuple[DomainSubset, str], tmp_path: Path, fake: SimpleNamespace
):
    """Training, evaluation, averaging, checkpoints, calibration and the check of the file: all with values."""
    config = config_of(cell, opened[1])
    expected, found = files_of(config, opened[0], tmp_path, fake)
    assert_same(found, expected, tmp_path, exact=cell["objective"] != "arm")


@pytest.mark.stress
@pytest.mark.parametrize("cell", contract.pairwise_cells(contract.AXES), ids=contract.name_of)
def test_a_run_of_any_two_members_gives_the_file_of_the_cpu(
    cell: dict[str, str], opened: tuple[DomainSubset, str], tmp_path: Path, fake: SimpleNamespace
):
    expected, found = files_of(config_of(cell, opened[1]), opened[0], tmp_path, fake)
    assert_same(found, expected, tmp_path, exact=cell["objective"] != "arm")


def assert_same(found: bytes, expected: bytes, folder: Path, *, exact: bool) -> None:
    """Compare model files, those of ARM up to rounding: its sums are added in another order.

    A weight that lies between two points of its grid may then go to the other one.
    """
    if exact:
        assert found == expected
        return
    models = []
    for name, content in (("found", found), ("expected", expected)):
        (folder / f"{name}.safetensors").write_bytes(content)
        models.append(load_packed(folder / f"{name}.safetensors"))
    ours, theirs = models
    assert ours.rest.keys() == theirs.rest.keys()
    assert ours.quantized.keys() == theirs.quantized.keys()
    for name, value in theirs.rest.items():
        torch.testing.assert_close(ours.rest[name].float(), value.float(), rtol=1e-3, atol=1e-5)
    for name, value in theirs.quantized.items():
        torch.testing.assert_close(ours.quantized[name].scale, value.scale, rtol=1e-3, atol=1e-5)
        apart = (ours.quantized[name].codes.int() - value.codes.int()).abs()
        assert apart.max() <= 1, name
        assert apart.float().mean() < 0.005, name


@pytest.mark.parametrize(
    "changes",
    [
        {"averager": {"name": "sma"}, "train": {"steps": 4, "eval_every": 2, "accumulate": 2}},
        {"objective": {"name": "coral"}, "train": {"steps": 4, "eval_every": 2, "accumulate": 2}},
        {"averager": {"name": "sma", "params": {"start": 1}}, "quantizer": {"start_step": 2, "start_from": "average"}},
        {"averager": {"name": "ema", "params": {"start": 1, "weights": "dequantized"}}},
        {"quantizer": {"start_step": 2, "activation_bits": 8}},
        {"model": {"feature_layer": "mixstyle"}},
    ],
    ids=str,
)
def test_options_of_a_run_on_the_device_give_the_file_of_the_cpu(
    changes: dict[str, Any],
    short_config: Callable[..., Config],
    three_digits: DomainSubset,
    tmp_path: Path,
    fake: SimpleNamespace,
):
    expected, found = files_of(tiny(short_config, three_digits, **changes), three_digits, tmp_path, fake)
    assert found == expected


def test_resumed_and_forked_runs_on_the_device_give_it_too(
    short_config: Callable[..., Config], three_digits: DomainSubset, tmp_path: Path, fake: SimpleNamespace
):
    config = tiny(short_config, three_digits)
    expected = on_cpu(config, three_digits, tmp_path)
    stopped, forked = RunFolder(tmp_path / "stopped"), RunFolder(tmp_path / "forked")
    with fake.fake_device():
        stopping = RunCallbacks(StopAfter(3), warn=CALM.warn, make_health_check=no_health_check)
        with pytest.raises(Interrupted):
            run(config, three_digits, stopped, callbacks=stopping)
        run(config, three_digits, stopped, resume=True, callbacks=CALM)
        point = train_fork_point(config, three_digits, RunFolder(tmp_path / "point"), callbacks=CALM)
        run(config, three_digits, forked, fork_from=point, callbacks=CALM)
    assert {value.device.type for part in point.tensors.values() for value in part.values()} == {"cpu"}
    assert stopped.model_file.read_bytes() == expected
    assert forked.model_file.read_bytes() == expected


def test_branches_on_the_device_merge_as_on_the_cpu(
    short_config: Callable[..., Config], three_digits: DomainSubset, tmp_path: Path, fake: SimpleNamespace
):
    configs = [
        tiny(
            short_config,
            three_digits,
            train={"steps": 4, "eval_every": 2, "checkpoint_every": 2, "seed": seed},
            model={"init_seed": 0},
        )
        for seed in range(2)
    ]
    dart(configs, three_digits, tmp_path / "cpu", merge_every=2, callbacks=CALM)
    with fake.fake_device():
        dart(configs, three_digits, tmp_path / "device", merge_every=2, callbacks=CALM)
    files = [RunFolder(tmp_path / name).model_file.read_bytes() for name in ("cpu", "device")]
    assert files[0] == files[1]


def components_on_device(config: Config, digits: DomainSubset, **options: Any) -> Components:
    components = build_components(config, digits, Accelerator(), **options)
    components.network.train()
    return components


def hot_steps(components: Components, fake: SimpleNamespace, n_steps: int = 4) -> None:
    """Make updates, the last of which may wait for the device nowhere; its batch is there already."""
    made = TrainingRun(components, RunState())
    for step in range(n_steps):
        batch = components.batches.batch(step).on(fake.DEVICE)
        with fake.hot() if step == n_steps - 1 else contextlib.nullcontext():
            begin_step(components, step)
            made.after_step(update(components, batch, step), 0.0)


def needs(section: str, name: str) -> dict[str, Any]:
    """What a member of an axis cannot go without."""
    if section == "feature_layer":
        return {"model": {"feature_layer": name}} | ({"objective": {"name": "arm"}} if name == "context" else {})
    if section == "quantizer":
        if name == "inq":  # a stage begins with a wait; none begins in the last step
            return {"quantizer": {"name": name, "start_step": 0, "stages": (0.5, 1.0)}}
        return {"quantizer": {"name": name, "start_step": None if name in AFTER_TRAINING else 2}}
    return {section: {"name": name}} | ({"model": {"feature_layer": "context"}} if name == "arm" else {})


COMBINED: list[dict[str, Any]] = [
    {"step_rule": {"name": "sam"}, "quantizer": {"name": "lsq", "start_step": 1, "activation_bits": 8}},
    {"objective": {"name": "coral"}, "train": {"steps": 4, "accumulate": 2}},
    {"objective": {"name": "coral", "label_smoothing": 0.1}},
    {"objective": {"consistency": 1.0}, "data": {"target": "75", "batch_size": 4, "augment": "augmix", "workers": 0}},
    {"quantizer": {"name": "lsq", "start_step": 1, "rounding": "stochastic"}},
    {"quantizer": {"name": "lsq", "start_step": 1, "step_mode": "raw"}, "optimizer": {"name": "sgd"}},
    {"train": {"steps": 4, "probe_steps": 4}},
]


@pytest.mark.parametrize("changes", COMBINED, ids=str)
def test_no_update_with_options_waits_for_the_device(
    changes: dict[str, Any],
    short_config: Callable[..., Config],
    three_digits: DomainSubset,
    on_device: Any,
    fake: SimpleNamespace,
):
    hot_steps(components_on_device(tiny(short_config, three_digits, **changes), three_digits), fake)


@pytest.mark.parametrize(("section", "name"), [(axis, name) for axis, known in MEMBERS.items() for name in known])
def test_no_update_waits_for_the_device(
    section: str,
    name: str,
    short_config: Callable[..., Config],
    three_digits: DomainSubset,
    on_device: Any,
    fake: SimpleNamespace,
):
    config = tiny(short_config, three_digits, **needs(section, name))
    hot_steps(components_on_device(config, three_digits), fake)


def upload(loss: Tensor) -> Tensor:
    return loss + torch.ones(2).to(loss.device).sum()


def test_a_fault_in_the_path_is_found(
    device_fault: Callable[[Tensor], Tensor],
    short_config: Callable[..., Config],
    three_digits: DomainSubset,
    on_device: Any,
    fake: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
):
    assert_found(device_fault, tiny(short_config, three_digits), three_digits, fake, monkeypatch)


def test_a_copy_to_the_device_that_waits_is_found(
    short_config: Callable[..., Config],
    three_digits: DomainSubset,
    on_device: Any,
    fake: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
):
    assert_found(upload, tiny(short_config, three_digits), three_digits, fake, monkeypatch)


def assert_found(
    fault: Callable[[Tensor], Tensor],
    config: Config,
    data: DomainSubset,
    fake: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    components = components_on_device(config, data)
    loss_of = components.objective.loss

    def loss(domains: list[DomainOutputs]) -> Tensor:
        return fault(loss_of(domains))

    monkeypatch.setattr(components.objective, "loss", loss)
    with pytest.raises(fake.FakeDeviceError):
        hot_steps(components, fake)


def on_the_cpu(batches: TrainBatches) -> TrainBatches:
    """The same batches, made on the CPU."""
    plain = copy.copy(batches)
    plain.device = CPU
    return plain


def test_batches_are_made_ahead(
    short_config: Callable[..., Config], three_digits: DomainSubset, on_device: Any, fake: SimpleNamespace
):
    """Each is on the device before it is asked for, and is the batch of the CPU."""
    batches = components_on_device(tiny(short_config, three_digits), three_digits).batches
    begun, waited = [], []

    def ahead(make: Callable[[], Batch]) -> Callable[[], Batch]:
        with fake.hot():
            there = make()
        begun.append(there)

        def ready() -> Batch:
            waited.append(len(begun))
            return there

        return ready

    batches.workers = 2
    with contextlib.closing(batches.stream(0, 6, ahead)) as stream:
        found = list(itertools.islice(stream, 6))
    assert waited[:4] == sorted(waited[:4])
    assert waited[0] >= 1
    assert len(begun) == len(waited) == 6
    for step, batch in enumerate(found):
        expected = on_the_cpu(batches).batch(step)
        assert batch.images.device == fake.DEVICE
        assert torch.equal(batch.images.cpu(), expected.images)
        assert torch.equal(batch.labels.cpu(), expected.labels)
        assert batch.indices is not None
        assert batch.indices.device.type == "cpu"


@pytest.mark.parametrize("augment", BUILT_IN)
@pytest.mark.parametrize("crop", ["cached", "original"])
def test_images_are_augmented_on_the_device(
    augment: str,
    crop: str,
    short_config: Callable[..., Config],
    three_digits: DomainSubset,
    on_device: Any,
    fake: SimpleNamespace,
):
    """They travel as uint8, nothing waits for the device, and they are those of the CPU but for rounded pixels."""
    data = {"target": "75", "batch_size": 4, "image_size": 16, "workers": 0, "augment": augment, "crop": crop}
    batches = components_on_device(tiny(short_config, three_digits, data=data), three_digits).batches
    with fake.hot():
        made = batches.batch(3)
    assert made.images.device == fake.DEVICE
    expected = on_the_cpu(batches).batch(3).images
    levels = (made.images.cpu() - expected).abs() * torch.tensor(batches.std).view(-1, 1, 1) * 255
    if augment == "none" or crop == "original":
        assert levels.max() < 0.01
    else:  # an operation such as posterize turns one level into many
        assert levels.median() < 0.01
        assert (levels > 2.5).float().mean() < 0.05


def test_a_loss_that_is_not_finite_is_noticed_before_anything_is_saved(
    short_config: Callable[..., Config],
    three_digits: DomainSubset,
    on_device: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    """The device is read every twenty updates, and before each checkpoint: the last whole one stays."""
    plan = {"steps": 40, "eval_every": 40, "checkpoint_every": 8}
    components = components_on_device(tiny(short_config, three_digits, train=plan), three_digits)
    loss_of, count = components.objective.loss, itertools.count()

    def loss(domains: list[DomainOutputs]) -> Tensor:
        found = loss_of(domains)
        return found * torch.nan if next(count) == 10 else found

    monkeypatch.setattr(components.objective, "loss", loss)
    folder = RunFolder(tmp_path / "run")
    made = TrainingRun(components, RunState(), folder)
    with pytest.raises(NonFiniteLossError, match="at step 11"):
        train(made)
    assert made.state.step == 16
    assert [step_of(path) for path in checkpoint_folders(folder.checkpoints)] == [8]


def train_two(folder: Path, **options: Any) -> list[Path]:
    """Train two runs on the CPU with one random start."""
    short: dict[str, Any] = {"steps": 4, "batch_size": 4, "image_size": 12, "eval_every": 2, "progress": False}
    short |= {"target": "75", "model": {"init_seed": 0}}
    folders = [folder / name for name in ("one", "two")]
    for seed, out in enumerate(folders):
        qtdog.train(seed=seed, out=out, **(short | options))
    return folders


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two quantized averages."""
    averager = {"name": "sma", "params": {"start": 1}}
    return train_two(tmp_path_factory.mktemp("runs"), preset=("digits", "lsq"), averager=averager)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two float runs."""
    return train_two(tmp_path_factory.mktemp("floats"), preset="digits", quantizer="none")


def join(kind: str, folders: list[Path], data: DomainSubset, file: Path) -> dict[str, Any]:
    """Make an ensemble of a kind, and measure it on the device that there is."""
    members = [read_member(folder) for folder in folders]
    recipe = Recipe(pick="greedy", tune_steps=2) if kind == "soup" else Recipe()
    images = open_evaluation_set(members[0].config, data, same_splits=True)
    return assemble(members, EnsembleSpec(kind, file, recipe), images)


@pytest.mark.parametrize("kind", list(KINDS))
def test_ensembles_on_the_device_are_those_of_the_cpu(
    kind: str, trained: list[Path], floats: list[Path], digits: RotatedDigits, tmp_path: Path, fake: SimpleNamespace
):
    """Members' answers, scores, temperature and threshold, averages of weights, the file and the check of it."""
    folders = floats if kind == "ensemble" else trained
    data: Any = digits
    files = [tmp_path / name / "model.safetensors" for name in ("cpu", "device")]
    expected = join(kind, folders, data, files[0])
    with fake.fake_device():
        found = join(kind, folders, data, files[1])
        loaded = load_file(files[1], device=fake.DEVICE)
        rows = prediction_rows(loaded, torch.zeros(3, 12, 12, 1, dtype=torch.uint8))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert found["calibration"] == expected["calibration"]
    assert rows == prediction_rows(load_file(files[0]), torch.zeros(3, 12, 12, 1, dtype=torch.uint8))


@pytest.fixture(scope="module")
def ensemble(trained: list[Path], digits: RotatedDigits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an ensemble of two."""
    file, data = tmp_path_factory.mktemp("ensemble") / "model.safetensors", cast(Any, digits)
    join("eoq", trained, data, file)
    return file


SMALL_ANALYSES: dict[str, dict[str, Any]] = {
    "flatness": {"num_directions": 4, "radii": [3.0], "filter_radii": [], "num_images": 4},
    "hessian": {"num_vectors": 10, "num_eigenvalues": 1, "num_probes": 0, "num_images": 1},
    "surface": {"num_points": 3, "num_images": 4},
    "noise": {},
    "errors": {"num_images": 4, "num_mistakes": 1},
    "cam": {"num_images": 1, "num_shown": 1},
}


SLOW = {"hessian": pytest.mark.stress, "errors": pytest.mark.stress}  # 15 and 4 s


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW.get(kind, ())) for kind in SMALL_ANALYSES])
def test_analyses_on_the_device_give_the_numbers_of_the_cpu(
    kind: str, trained: list[Path], tmp_path: Path, fake: SimpleNamespace
):
    measure = getattr(qtdog.analyze, kind)
    found = []
    for name, context in (("cpu", contextlib.nullcontext()), ("device", fake.fake_device())):
        with context:
            found.append(measure([str(trained[0])], **SMALL_ANALYSES[kind], out=tmp_path / name, progress=False))
    expected, measured = (analysis.numbers for analysis in found)
    assert len(measured) == len(expected) > 0
    for one, other in zip(measured, expected, strict=True):
        for key, value in other.items():
            assert one[key] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value)


def test_scores_of_a_file_on_the_device_are_those_on_the_cpu(
    trained: list[Path], ensemble: Path, digits: RotatedDigits, fake: SimpleNamespace
):
    """Of one model and of an ensemble: by domain, under corruption, beside another one, and image by image."""
    data, image = DomainSubset(digits, ["75"]), np.zeros((12, 12), dtype=np.uint8)

    def measure(device: torch.device) -> list[Any]:
        one, several = (qtdog.load(path, device=device) for path in (trained[0], ensemble))
        found: list[Any] = [model.evaluate(data, progress=False).rows() for model in (one, several)]
        found += [model.predict([image, image], progress=False).rows() for model in (one, several)]
        found.append(score_corruptions(several.model, data, ["gaussian_noise"], [1]))
        return [*found, compare_sites(one.model, several.model, data)]

    expected = measure(torch.device("cpu"))
    with fake.fake_device():
        assert measure(fake.DEVICE) == expected


def test_a_teacher_goes_to_the_device(
    trained: list[Path],
    ensemble: Path,
    short_config: Callable[..., Config],
    three_digits: DomainSubset,
    on_device: Any,
    fake: SimpleNamespace,
):
    data = {"target": "75", "batch_size": 4, "image_size": 12, "workers": 0}
    for file in (trained[0] / "model.safetensors", ensemble):
        config = short_config(data=data, objective={"teacher": str(file), "teacher_sha256": "0" * 64})
        teacher = load_teacher(config, three_digits)
        hot_steps(components_on_device(config, three_digits, teacher=teacher), fake)


@pytest.mark.parametrize("options", [{"teacher_view": "clean"}, {"teacher_mode": "cosine"}], ids=str)
def test_a_backbone_as_teacher_goes_to_the_device(
    options: dict[str, Any],
    short_config: Callable[..., Config],
    three_digits: DomainSubset,
    on_device: Any,
    fake: SimpleNamespace,
):
    objective = {"teacher": "test_resnet", "teacher_weights": "none", "teacher_image_size": 16}
    config = tiny(short_config, three_digits, objective=objective | options)
    hot_steps(components_on_device(config, three_digits, teacher=load_teacher(config, three_digits)), fake)

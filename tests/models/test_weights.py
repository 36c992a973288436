import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qtdog.core.errors import ModelError
from qtdog.models.backbones import create_network
from qtdog.models.network import FeaturizerSpec, build_featurizer
from qtdog.models.weights import fit_state, load_weights_, read_weight_file

SPEC = FeaturizerSpec("test_resnet", channels=3, image_size=64)
State = dict[str, Tensor]


def random_state(seed: int = 0, spec: FeaturizerSpec = SPEC) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else torch.full_like(value, 7)
        for name, value in build_featurizer(spec).state_dict().items()
    }


def load(weights: Path | str, spec: FeaturizerSpec = SPEC) -> tuple[State, str]:
    featurizer = build_featurizer(spec)
    provenance = load_weights_(featurizer, spec, str(weights))
    return featurizer.state_dict(), provenance


def plain(state: State) -> object:
    return state


def nested(state: State) -> object:
    return {"state_dict": state, "epoch": 3}


def prefixed(prefix: str) -> Callable[[State], object]:
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


def with_heads(state: State) -> object:
    return state | {"fc.weight": torch.zeros(1000, 96), "fc.bias": torch.zeros(1000), "classifier.bias": torch.ones(2)}


def under(key: str) -> Callable[[State], object]:
    return lambda state: {key: prefixed("module.")(state), "epoch": 3}


def ema_beside_plain(state: State) -> object:
    return {"state_dict": {name: torch.zeros_like(value) for name, value in state.items()}, "state_dict_ema": state}


def averaged(state: State) -> object:
    return cast(State, prefixed("module.")(state)) | {"n_averaged": torch.tensor(7)}


def domainbed(state: State) -> object:
    """An algorithm of DomainBed holds its network twice, and a checkpoint its arguments."""
    parts = {"featurizer.network.": state, "network.0.network.": state}
    weights = {f"{prefix}{name}": value for prefix, part in parts.items() for name, value in part.items()}
    heads = {f"{name}.{leaf}": torch.zeros(7) for name in ("classifier", "network.1") for leaf in ("weight", "bias")}
    return {"args": {"algorithm": "ERM"}, "model_num_classes": 7, "model_dict": weights | heads}


PREFIXED = ["module.", "featurizer.", "module.featurizer.", "_orig_mod.", "model.", "backbone.", "model.backbone."]
FLAT = [plain, with_heads, averaged, *map(prefixed, PREFIXED)]
NESTED = [nested, *map(under, ["model", "model_ema", "model_state_dict"]), ema_beside_plain, domainbed]


@pytest.mark.parametrize(
    ("suffix", "form"),
    [*((".pth", form) for form in [*FLAT, *NESTED]), *((".safetensors", form) for form in FLAT), (".pt", plain)],
)
def test_a_file_in_every_usual_form(tmp_path: Path, suffix: str, form: Callable[[State], object]):
    expected, path = random_state(), tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(cast(State, form(expected)), path)
    loaded, provenance = load(path)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert provenance == f"file weights{suffix} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_a_whole_network_can_be_the_start_of_another(tmp_path: Path):
    options = {"channels": 1, "image_size": 28, "freeze_bn": True}
    first = create_network("digits_cnn", n_classes=10, weights="none", seed=1, **options)
    torch.save(first.state_dict(), tmp_path / "first.pth")
    second = create_network("digits_cnn", n_classes=3, weights=str(tmp_path / "first.pth"), seed=2, **options)
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(first.features(images), second.features(images))
    assert second.pretraining.startswith("file first.pth sha256:")


def test_half_precision_files_are_widened(tmp_path: Path):
    expected = random_state()
    save_file({name: value.half() for name, value in expected.items()}, tmp_path / "half.safetensors")
    loaded, _ = load(tmp_path / "half.safetensors")
    assert loaded["conv1.0.weight"].dtype == torch.float32
    assert torch.equal(loaded["conv1.0.weight"], expected["conv1.0.weight"].half().float())


def test_old_files_have_no_batch_counters(tmp_path: Path):
    expected = {name: value for name, value in random_state().items() if not name.endswith("num_batches_tracked")}
    torch.save(expected, tmp_path / "old.pth")
    loaded, _ = load(tmp_path / "old.pth")
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_wrong_shapes_are_listed_with_what_was_expected_and_found(tmp_path: Path):
    torch.save(random_state() | {"bn1.weight": torch.zeros(17)}, tmp_path / "x.pth")
    match = (
        r"x\.pth does not fit.*1 tensor of the wrong shape: bn1\.weight: expected \(\d+,\), found \(17,\).*--backbone"
    )
    with pytest.raises(ModelError, match=match):
        load(tmp_path / "x.pth")


def test_missing_tensors_are_counted_and_the_first_few_named(tmp_path: Path):
    state = random_state()
    dropped = [name for name in state if name.endswith(".bias")]
    torch.save({name: value for name, value in state.items() if name not in dropped}, tmp_path / "x.pth")
    listed = rf"{len(dropped)} tensors missing \(expected\): {', '.join(dropped[:3])}, …"
    with pytest.raises(ModelError, match=listed):
        load(tmp_path / "x.pth")


def test_a_deeper_relative_of_the_backbone_is_refused(tmp_path: Path):
    """ResNet-101 has every tensor of ResNet-50 in the same shape, and more: only what is left over shows it."""
    torch.save(random_state() | {"layer9.0.conv1.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(
        ModelError, match=r"1 tensor that the backbone does not have \(found\): layer9\.0\.conv1\.weight"
    ):
        load(tmp_path / "x.pth")


def test_a_refused_file_changes_nothing(tmp_path: Path):
    torch.save(random_state() | {"bn1.weight": torch.zeros(17)}, tmp_path / "x.pth")
    featurizer = build_featurizer(SPEC)
    before = {name: value.clone() for name, value in featurizer.state_dict().items()}
    with pytest.raises(ModelError):
        load_weights_(featurizer, SPEC, str(tmp_path / "x.pth"))
    assert all(torch.equal(value, before[name]) for name, value in featurizer.state_dict().items())


class Payload:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return print, ("this code ran",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickle_with_code_is_refused_and_not_run(
    tmp_path: Path, save: Callable[[object, Path], object], capsys: pytest.CaptureFixture[str]
):
    save({"state_dict": random_state(), "extra": Payload()}, tmp_path / "x.pth")
    with pytest.raises(ModelError, match=r"x\.pth is refused: it holds Python code.*use \.safetensors"):
        load(tmp_path / "x.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_truncation_is_a_clear_error(tmp_path: Path, suffix: str):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    save_file(random_state(), whole) if suffix == ".safetensors" else torch.save(random_state(), whole)
    content = whole.read_bytes()
    for length in [0, 1, 7, 8, 9, *range(100, len(content), len(content) // 7), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match=rf"cut\{suffix} (cannot be read|is refused)"):
            load(path)


@pytest.mark.parametrize("content", [[1, 2], {}, nn.Linear(1, 1).weight, {"a": 3}, {"state_dict": {"a": [1]}}])
def test_a_file_without_a_state_dict(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ModelError, match=r"x\.pth holds no state dict.*Save model\.state_dict\(\)"):
        load(tmp_path / "x.pth")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"weights file .*nowhere\.pth does not exist"):
        load(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(("given", "hint"), [("imagnet", "Did you mean 'imagenet'?"), ("model.h5", "'model.h5'.")])
def test_a_word_that_means_nothing(given: str, hint: str):
    with pytest.raises(
        ModelError, match=r"--weights is 'imagenet', 'package', 'none' or a \.safetensors, \.pth, \.pt file"
    ) as info:
        load(given)
    assert str(info.value).endswith(hint)


@pytest.mark.parametrize("backbone", ["digits_cnn", "mnist_cnn"])
def test_digits_networks_have_no_imagenet_weights(backbone: str):
    with pytest.raises(ModelError, match=f"no ImageNet weights for '{backbone}': use --weights none"):
        load("imagenet", FeaturizerSpec(backbone, channels=1, image_size=28))


def test_none_leaves_the_start_alone():
    featurizer = build_featurizer(SPEC)
    before = {name: value.clone() for name, value in featurizer.state_dict().items()}
    assert load_weights_(featurizer, SPEC, "none") == "none"
    assert all(torch.equal(value, before[name]) for name, value in featurizer.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_weights_file_is_one_error_that_names_it(tmp_path, suffix):
    """Bytes overwritten, cut out and cut off, most of them in the pickle and the header that say what follows."""
    state = {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3), "n": torch.tensor(3)}
    sound = tmp_path / f"sound{suffix}"
    torch.save(state, sound) if suffix == ".pt" else save_file(state, sound)
    content = sound.read_bytes()
    rng = np.random.default_rng(0)
    damaged = tmp_path / f"damaged{suffix}"
    n_refused = 0
    for _ in range(300):
        data = bytearray(content)
        for _ in range(int(rng.integers(1, 4))):
            begin = int(rng.integers(min(len(data), 700)))
            match int(rng.integers(3)):
                case 0:
                    data[begin] = int(rng.integers(256))
                case 1:
                    del data[begin : begin + int(rng.integers(1, 9))]
                case _:
                    data[begin : begin + 4] = rng.bytes(4)
        damaged.write_bytes(bytes(data))
        try:
            found = read_weight_file(damaged)
        except ModelError as error:
            assert str(damaged) in str(error)  # noqa: PT017
            n_refused += 1
        else:
            assert all(isinstance(value, torch.Tensor) for value in found.values())
    assert n_refused > 100


def test_weights_that_are_not_finite_are_refused():
    weight = torch.tensor([1.0, float("nan")])
    with pytest.raises(ModelError, match=r"x\.pt holds values that are not finite: 1 tensor with NaN or infinity: w"):
        fit_state({"w": weight}, {"w": torch.zeros(2)}, heads=[], where="x.pt")

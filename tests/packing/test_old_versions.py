"""Files of versions 1 and 2 load as ever: two that the program wrote then, and altered copies of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qtdog.core.errors import FormatError
from qtdog.core.quantized import QuantSpec
from qtdog.packing.ensemble_file import load_ensemble
from qtdog.packing.packed_file import load_packed, save_packed
from qtdog.packing.sizes import file_sizes

FILES = Path(__file__).parent / "files"
CONV = [[-20, -17, 53, 0, 3], [59, 3, 39, -55, 19], [-43, 50, -28, 23, 6]]
FC = [[[-1, -1], [1, 2], [1, -1]], [[2, -1], [2, 2], [-1, 2]]]


@pytest.fixture
def path(tmp_path):
    return Path(shutil.copy(FILES / "version-2.safetensors", tmp_path))


def assert_as_written(model):
    conv, fc = model.quantized["conv.weight"], model.quantized["fc.weight"]
    assert (conv.codes.tolist(), conv.scale.tolist(), conv.spec) == (CONV, [0.5, 0.25, 2.0], QuantSpec(7, 0))
    assert (fc.codes.tolist(), fc.scale.tolist()) == (FC, [0.125])
    assert model.rest["count"].item() == 3
    torch.testing.assert_close(model.rest["conv.bias"], torch.tensor([-0.7229, 2.8663, -0.5655]), atol=1e-4, rtol=0)
    assert model.metadata == {"classes": ["a", "b"], "seed": 0}


def test_version_2(path):
    model = load_packed(path)
    assert_as_written(model)
    assert model.quantized["fc.weight"].spec == QuantSpec(3, None, "power_of_two")
    assert file_sizes(path).bytes == path.stat().st_size == 767


def test_version_1_has_uniform_grids_only(path, rewrite):
    def older(header, description):
        description["format_version"] = 1
        for entry in description["quantized"].values():
            del entry["levels"]

    rewrite(path, older)
    model = load_packed(path)
    assert_as_written(model)
    assert model.quantized["fc.weight"].spec == QuantSpec(3, None, "uniform")


def test_an_ensemble_of_version_2():
    whole = load_ensemble(FILES / "version-2-ensemble.safetensors")
    assert whole.about == {"kind": "eoq"}
    assert [member.metadata["seed"] for member in whole.members] == [0, 1]
    assert_as_written(whole.members[0])
    assert whole.members[0].rest["count"] is whole.members[1].rest["count"]


def test_written_again_it_is_version_3_and_holds_the_same(path, tmp_path):
    old = load_packed(path)
    save_packed(tmp_path / "new", old.quantized, old.rest, old.metadata)
    assert b'{\\"format_version\\":3}' in (tmp_path / "new").read_bytes()
    assert_as_written(load_packed(tmp_path / "new"))


def test_a_float_model_is_still_written_plain(tmp_path):
    save_packed(tmp_path / "float", {}, {"bias": torch.zeros(2)}, {"a": 1})
    header = json.loads((tmp_path / "float").read_bytes()[8:-8])
    assert header["bias"] == {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert json.loads(header["__metadata__"]["qtdog"])["format_version"] == 2


def weight(description):
    return description["quantized"]["conv.weight"]


HOSTILE = {
    "other version": (lambda h, d: d.update(format_version=4), "format version 4; this qtdog reads up to 3"),
    "version 3 in an older file": (lambda h, d: d.update(format_version=3), "should state that and no more"),
    "no version": (lambda h, d: d.pop("format_version"), "format_version"),
    "levels in version 1": (lambda h, d: d.update(format_version=1), "should state axis, bits, shape"),
    "extra field": (lambda h, d: d.update(rest={}), "should have"),
    "nine bits": (lambda h, d: weight(d).update(bits=9), "2 to 8 bits, found 9"),
    "fewer bits": (lambda h, d: weight(d).update(bits=3), "expected 'conv.weight.codes'"),
    "a codec": (lambda h, d: weight(d).update(codec="bits"), "should state"),
    "huge shape": (lambda h, d: weight(d).update(shape=[2**40, 2**40]), "impossible shape"),
    "other shape": (lambda h, d: weight(d).update(shape=[3, 9]), "expected 'conv.weight.codes'"),
    "missing scale": (lambda h, d: h.update({"x": h.pop("conv.weight.scale")}), "expected 'conv.weight.scale'"),
    "scale of another type": (lambda h, d: h["conv.weight.scale"].update(dtype="I32"), "expected 'conv.weight.scale'"),
    "weight twice": (lambda h, d: h.update({"conv.weight": h.pop("conv.bias")}), "is there twice"),
    "alias to nothing": (lambda h, d: d["aliases"].update(x="../../etc/passwd"), "further name"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_descriptions_are_refused(path, name, rewrite):
    change, message = HOSTILE[name]
    rewrite(path, change)
    with pytest.raises(FormatError, match=message):
        load_packed(path)

"""The packed file: exact, deterministic, and unimpressed by hostile input."""

from __future__ import annotations

import json
import resource
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtdog.core.errors import FormatError, RunError
from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.packing import packed_file
from qtdog.packing.codecs import compress
from qtdog.packing.packed_file import load_packed, save_packed
from qtdog.packing.sizes import file_sizes


def sample(bits=7):
    generator = torch.Generator().manual_seed(0)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (16, 8, 3, 3), generator=generator, dtype=torch.int8)
    return {
        "conv.weight": QuantizedTensor(codes, torch.rand(16, generator=generator) + 0.1, QuantSpec(bits, 0)),
        "fc.weight": QuantizedTensor(codes[:, :, 0, 0].clone(), torch.tensor([0.25]), QuantSpec(bits, None)),
    }, {"conv.bias": torch.randn(16, generator=generator), "norm.count": torch.tensor(3)}


META = {"classes": ["a", "b"], "accuracy": {"source": 0.5, "test": None}}


@pytest.fixture
def path(tmp_path):
    save_packed(tmp_path / "model.safetensors", *sample(), META)
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("bits", range(2, 9))
def test_round_trip_is_exact_and_deterministic(tmp_path, bits):
    quantized, rest = sample(bits)
    for name in ("one", "two"):
        save_packed(tmp_path / name, dict(reversed(quantized.items())) if name == "two" else quantized, rest, META)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    back = load_packed(tmp_path / "one")
    assert back.metadata == META
    assert back.rest.keys() == rest.keys()
    for name, value in rest.items():
        assert torch.equal(back.rest[name], value)
    for name, value in quantized.items():
        assert torch.equal(back.quantized[name].codes, value.codes)
        assert torch.equal(back.quantized[name].scale, value.scale)
        assert back.quantized[name].spec == value.spec
        assert torch.equal(back.quantized[name].dequantize(), value.dequantize())


def test_codes_never_take_more_than_b_bits(path):
    """Uniform codes: nothing is gained by coding them, and nothing lost."""
    tensors = safetensors.torch.load_file(path)
    assert len(tensors["conv.weight.codes"]) == 16 * 8 * 9 * 7 // 8
    assert set(tensors) == {"conv.weight.codes", "fc.weight.codes", "description", "values.F32", "values.I64"}


def test_sizes_are_those_on_disk(path, tmp_path):
    quantized, rest = sample()
    plain = tmp_path / "float.safetensors"
    save_packed(plain, {}, {name: value.dequantize() for name, value in quantized.items()} | rest, META)
    sizes = file_sizes(path)
    assert sizes.bytes == path.stat().st_size
    assert sizes.float32_bytes == plain.stat().st_size
    assert sizes.ratio == plain.stat().st_size / path.stat().st_size
    n_weights = 16 * 8 * 9 + 16 * 8 + 16
    assert sizes.bits_per_weight == 8 * sizes.bytes / n_weights
    assert file_sizes(plain).ratio == 1


def test_truncated_anywhere_is_refused(tmp_path):
    quantized, rest = sample()
    rest["big"] = torch.randn(30_000)
    save_packed(tmp_path / "whole", quantized, rest, META)
    content = (tmp_path / "whole").read_bytes()
    broken = tmp_path / "broken"
    ends = [*range(0, len(content), 1000), len(content) - 1, 7]
    assert len(ends) > 100
    for end in ends:
        broken.write_bytes(content[:end])
        with pytest.raises(FormatError, match="broken"):
            load_packed(broken)
        with pytest.raises(FormatError, match="broken"):
            file_sizes(broken)
    broken.write_bytes(content + b"\0")
    with pytest.raises(FormatError):
        load_packed(broken)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**9), st.integers(0, 255))
def test_any_flipped_byte_is_refused_or_gives_a_sound_model(path, position, value):
    """Never another exception, never codes off the grid."""
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    altered = path.with_name("altered")
    altered.write_bytes(content)
    try:
        model = load_packed(altered)
    except FormatError:
        return
    for tensor in model.quantized.values():
        assert tensor.codes.amin() >= tensor.spec.qmin
        assert tensor.codes.amax() <= tensor.spec.qmax
        assert (tensor.scale > 0).all()


def entry(description):
    return description["quantized"]["conv.weight"]


def rename(tree, old, new):
    tree[new] = tree.pop(old)


HOSTILE = {
    "no metadata": (lambda h, d: h.pop("__metadata__"), "no packed model"),
    "other version": (lambda h, d: h["__metadata__"].update(qtdog='{"format_version":9}'), "reads up to 3: update"),
    "version no number": (lambda h, d: h["__metadata__"].update(qtdog='{"format_version":"3"}'), "format_version"),
    "more beside the version": (lambda h, d: h["__metadata__"].update(qtdog='{"format_version":3,"a":1}'), "no more"),
    "two versions": (lambda h, d: d.update(format_version=2), "of version 3 like the file, found 2"),
    "no description": (lambda h, d: rename(h, "description", "values.U8"), "'description' as a row of bytes"),
    "extra field": (lambda h, d: d.update(code="x"), "found"),
    "nine bits": (lambda h, d: entry(d).update(bits=9), "2 to 8 bits, found 9"),
    "bits as text": (lambda h, d: entry(d).update(bits="7"), "2 to 8 bits"),
    "fewer bits": (lambda h, d: entry(d).update(bits=3), "'conv.weight.codes' should take 432 bytes, found 1008"),
    "negative shape": (lambda h, d: entry(d).update(shape=[-16, 8, 3, 3]), "impossible shape"),
    "huge shape": (lambda h, d: entry(d).update(shape=[2**40, 2**40]), "impossible shape"),
    "overflowing shape": (lambda h, d: entry(d).update(shape=[2**62, 4]), "impossible shape"),
    "many dimensions": (lambda h, d: entry(d).update(shape=[1] * 99), "impossible shape"),
    "other shape": (lambda h, d: entry(d).update(shape=[16, 9, 3, 3]), "should take 1134 bytes"),
    "unknown codec": (lambda h, d: entry(d).update(codec="lzma"), "codec bits or bytes"),
    "codec no text": (lambda h, d: entry(d).update(codec=[]), "codec bits or bytes"),
    "a bomb of codes": (lambda h, d: entry(d).update(codec="bytes+zstd", shape=[16, 2**30]), "more than 64 times"),
    "a bomb of packed codes": (
        lambda h, d: entry(d).update(codec="bits+zstd", shape=[16, 2**30]), "more than 64 times",
    ),
    "a bomb of values": (lambda h, d: d["rest"]["conv.bias"].update(shape=[2**38]), "more than 64 times|should take"),
    "a pool too few": (lambda h, d: d["pools"].pop("I64"), "need pools"),
    "a pool too many": (lambda h, d: d["pools"].update(F64="plain"), "need pools"),
    "unknown codec of a pool": (lambda h, d: d["pools"].update(F32="bits"), "plain or planes"),
    "value of unknown type": (lambda h, d: d["rest"]["conv.bias"].update(dtype="F8"), "'conv.bias' is impossible"),
    "value with another field": (lambda h, d: d["rest"]["conv.bias"].update(x=1), "should state dtype and shape"),
    "value with huge shape": (lambda h, d: d["rest"]["conv.bias"].update(shape=[2**50]), "is impossible"),
    "weight twice": (lambda h, d: d["rest"].update({"conv.weight": d["rest"]["conv.bias"]}), "is there twice"),
    "a tensor besides": (lambda h, d: rename(h, "fc.weight.codes", "x.codes") or d["quantized"].pop("fc.weight"),
        "'x.codes' is not in the description|should take"),
    "axis out of range": (lambda h, d: entry(d).update(axis=4), "cannot have step sizes along 4"),
    "negative axis": (lambda h, d: entry(d).update(axis=-1), "cannot have step sizes along"),
    "missing codes": (lambda h, d: d["quantized"].update({"other.weight": entry(d)}), "expected 'other.weight.codes'"),
    "alias to nothing": (lambda h, d: d["aliases"].update(x="../../etc/passwd"), "further name"),
    "metadata no object": (lambda h, d: d.update(metadata=[1]), "should be an object"),
    "tensor of unknown type": (lambda h, d: h["values.F32"].update(dtype="F8"), "known are"),
    "tensor with huge shape": (lambda h, d: h["values.F32"].update(shape=[2**50]), "impossible shape"),
    "beyond the file": (lambda h, d: h["values.F32"].update(data_offsets=[0, 2**38], shape=[2**38]), "should begin"),
    "overlapping tensors": (lambda h, d: h["values.F32"].update(data_offsets=[0, 64]), "begin|take"),
    "codes of another type": (
        lambda h, d: h["fc.weight.codes"].update(dtype="I8"), "expected 'fc.weight.codes' as a row of bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_before_memory_is_taken(path, name, rewrite):
    change, message = HOSTILE[name]
    rewrite(path, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=message) as caught:
        load_packed(path)
    assert str(path) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 17 * 2**20])
def test_a_header_length_beyond_the_file_is_refused(path, length):
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(FormatError, match="header claims"):
        load_packed(path)


@pytest.mark.parametrize("text", ["[" * 5000, '{"a":1,"a":2}', "NaN", "", "[1]", '{"x":1e999}'])
def test_malicious_json_is_refused(path, text):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["qtdog"] = text
    for raw in (json.dumps(header).encode(), text.encode()):
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])
        with pytest.raises(FormatError):
            load_packed(path)


def test_a_description_that_expands_beyond_measure_is_refused(path, replace):
    """Parsed it would take 350 MB, out of a file of some kilobytes."""
    for text in ("[" + "[]," * (2**24 // 3 - 1) + "0]", " " * 2**24, " " * (2**24 + 1)):
        replace(path, "description", compress(text.encode(), 1))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(FormatError, match="beyond the limit"):
            load_packed(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
    with pytest.raises(FormatError, match="make the metadata smaller"):
        save_packed(path, *sample(), {"text": " " * 2**24})


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_step_sizes_must_be_positive_and_finite(tmp_path, path, bad):
    quantized, rest = sample()
    quantized["fc.weight"].scale.fill_(bad)
    with pytest.raises(FormatError, match=r"'fc.weight' should be positive and finite"):
        save_packed(tmp_path / "x", quantized, rest, META)
    content = path.read_bytes().replace(struct.pack("<f", 0.25), struct.pack("<f", bad))
    path.write_bytes(content)
    with pytest.raises(FormatError, match="positive and finite"):
        load_packed(path)


def test_what_cannot_be_held_is_refused(tmp_path):
    quantized, rest = sample()
    target = tmp_path / "x"
    with pytest.raises(FormatError, match="NaN"):
        save_packed(target, quantized, rest | {"conv.bias": torch.tensor([float("nan")])}, META)
    with pytest.raises(FormatError, match="JSON"):
        save_packed(target, quantized, rest, {"object": object()})
    with pytest.raises(FormatError, match="stored twice"):
        save_packed(target, quantized, rest | {"conv.weight": torch.zeros(1)}, META)
    off = QuantizedTensor(torch.full((2, 2), 100, dtype=torch.int8), torch.ones(2), QuantSpec(4))
    with pytest.raises(FormatError, match="should lie in -8 … 7"):
        save_packed(target, {"w": off}, {}, META)
    assert not target.exists()


def test_not_a_model_file(tmp_path):
    pickle = tmp_path / "model.pth"
    torch.save({"w": torch.zeros(2)}, pickle)
    for path in (pickle, tmp_path / "missing", tmp_path):
        with pytest.raises(FormatError, match=path.name):
            load_packed(path)


def test_full_disk_keeps_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    from qtdog.core import files

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match="the disk is full"):
        packed_file.save_packed(path, *sample(4), META)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_tied_tensors_are_stored_once(tmp_path):
    weight = torch.randn(1000)
    save_packed(tmp_path / "x", {}, {"a": weight, "b": weight}, {})
    assert (tmp_path / "x").stat().st_size < 5000
    back = load_packed(tmp_path / "x").rest
    assert back["a"] is back["b"]


def test_step_sizes_of_groups_come_back(tmp_path):
    codes = torch.randint(-4, 4, (6, 2, 3), dtype=torch.int8)
    value = QuantizedTensor(codes, torch.arange(1.0, 7.0), QuantSpec(3, axis=1, groups=3))
    save_packed(tmp_path / "m", {"w": value}, {}, {})
    found = load_packed(tmp_path / "m").quantized["w"]
    assert found.spec == value.spec
    steps = torch.tensor([[1.0, 2], [1, 2], [3, 4], [3, 4], [5, 6], [5, 6]])[:, :, None]
    assert torch.equal(found.dequantize(), codes * steps)

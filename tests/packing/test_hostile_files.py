"""Ten thousand damaged and hostile files: each is refused with a FormatError, or holds a sound model.

Seeded, so that a failure can be repeated: its message names the kind of damage and the number of the input.
With QTDOG_HOSTILE_INPUTS=100000 in the environment there are more.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import runpy
import struct
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import zstandard

from qtdog.core.errors import FormatError
from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.packing.codecs import compress
from qtdog.packing.ensemble_file import is_ensemble, load_ensemble, save_ensemble
from qtdog.packing.layout import parse
from qtdog.packing.packed_file import PackedModel, load_packed, save_packed

N_INPUTS = int(os.environ.get("QTDOG_HOSTILE_INPUTS", "1250"))  # of each kind of damage, and there are nine
MAX_GROWTH_KIB = 150_000
MAX_SECONDS = 2.0
WATCHED = runpy.run_path(str(Path(__file__).parents[1] / "stress" / "watch.py"))["watched"]
KEYS = (
    "x",
    "",
    "format_version",
    "conv.weight",
    "members.0.conv.weight",
    "members.99.x",
    "F32",
    "shape",
    "__metadata__",
)
VALUES = (
    None, True, -1, 0, 1, 2, 3, 7, 9, 2**31, 2**40, 2**63, 2**64, 10**400, 0.5, 1e308, "", "zstd", "bits", "bytes+zstd",
    "bits+zstd", "planes+zstd", "plain", "uniform", "F32", "I64", "BOOL", "U8", "../../etc/passwd", "\0", "x" * 5000,
    [], {}, [2**40], [2**20, 2**20], [0], [-1], [[[[]]]], [1] * 20, {"members": [{}] * 101}, {"members": [{}, {}]},
)  # fmt: skip


def model(seed):
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(8, 60, generator=generator) * 5
    sparse = torch.rand(4, 300, generator=generator) < 0.1
    return PackedModel(
        {
            "conv.weight": QuantizedTensor(gaussian.round().clamp(-64, 63).to(torch.int8), torch.ones(8), QuantSpec(7)),
            "fc.weight": QuantizedTensor(sparse.to(torch.int8), torch.ones(1), QuantSpec(2, None, "symmetric")),
        },
        {"mean": torch.ones(200), "count": torch.tensor(3), "mask": torch.ones(3, dtype=torch.bool)},
        {"classes": ["a", "b"], "seed": seed},
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the contents of sound files: one model, an ensemble, a float model."""
    path = tmp_path_factory.mktemp("sound") / "model"
    contents = []
    one = model(0)
    save_packed(path, one.quantized, one.rest, one.metadata)
    contents.append(path.read_bytes())
    save_ensemble(path, [model(0), model(1)], {"kind": "eoq"})
    contents.append(path.read_bytes())
    save_packed(path, {}, one.rest, one.metadata)
    contents.append(path.read_bytes())
    return contents


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def flip(content, rng):
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def overwrite(content, rng):
    begin = rng.randrange(len(content))
    noise = rng.choice([rng.randbytes(rng.randint(1, 64)), bytes(rng.randint(1, 64)), b"\xff" * rng.randint(1, 64)])
    return content[:begin] + noise + content[begin + len(noise) :]


def splice(content, rng):
    begin, end = sorted(rng.randrange(len(content)) for _ in range(2))
    return rng.choice(
        [content[:begin] + content[end:], content[:end] + content[begin:], content[end:] + content[:begin]]
    )


def parted(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def length(content, rng):
    claimed = rng.choice([0, 1, 2**24, 2**24 + 1, 2**62, 2**63, 2**64 - 1, len(content), rng.randrange(len(content))])
    return struct.pack("<Q", claimed) + content[8:]


def alter(tree, rng):
    """Change one statement somewhere in a JSON tree: replace, remove, rename or add."""
    while True:
        inner = [
            value for value in (tree.values() if isinstance(tree, dict) else tree) if isinstance(value, dict | list)
        ]
        if not any(inner) or rng.random() < 0.3:
            break
        tree = rng.choice([value for value in inner if value])
    value = copy.deepcopy(rng.choice(VALUES))  # what was put in may be changed in its turn
    if isinstance(tree, list):
        tree[rng.randrange(len(tree))] = value
        return
    key = rng.choice(list(tree)) if tree else "x"
    how = rng.randrange(4)
    if how == 0:
        tree[rng.choice(KEYS)] = tree.pop(key, value)
    elif how == 1:
        tree.pop(key, None)
    else:
        tree[key if how == 2 else rng.choice(KEYS)] = value


def alter_header(content, rng):
    header, data = parted(content)
    alter(header, rng)
    return joined(header, data)


def with_stream(content, name, stream):
    """Put other bytes in the place of a tensor and make the header fit."""
    header, data = parted(content)
    begin, end = header[name]["data_offsets"]
    grown = len(stream) - (end - begin)
    for info in header.values():
        if "data_offsets" in info and info["data_offsets"][0] >= end:
            info["data_offsets"] = [offset + grown for offset in info["data_offsets"]]
    header[name] = {"dtype": "U8", "shape": [len(stream)], "data_offsets": [begin, begin + len(stream)]}
    return joined(header, data[:begin] + stream + data[end:])


def alter_description(content, rng):
    header, data = parted(content)
    if "description" not in header:
        description = json.loads(header["__metadata__"]["qtdog"])
        alter(description, rng)
        header["__metadata__"]["qtdog"] = json.dumps(description)
        return joined(header, data)
    begin, end = header["description"]["data_offsets"]
    description = json.loads(zstandard.decompress(data[begin:end]))
    for _ in range(rng.randint(1, 2)):
        alter(description, rng)
    return with_stream(content, "description", compress(json.dumps(description).encode(), 1))


def bomb(n_bytes):
    """Return a small frame of many zeros."""
    return compress(bytes(n_bytes), 1)


BOMBS = [bomb(2**k) for k in (10, 16, 20, 24, 25)]
JSON_BOMBS = [compress(text.encode(), 1) for text in ("[" * 2**20, "9" * 2**20, '{"a":' * 2**18, " " * 2**24, "[]" * 9)]


def hostile_stream(content, rng):
    """Replace a stream by a bomb, by noise in a sound frame, or by a frame whose size is a lie."""
    header, data = parted(content)
    streams = [name for name in header if name != "__metadata__" and header[name]["dtype"] == "U8"]
    if not streams:
        return alter_header(content, rng)
    name = rng.choice(streams)
    begin, end = header[name]["data_offsets"]
    stream = data[begin:end]
    try:
        n_bytes = zstandard.frame_content_size(stream)
    except zstandard.ZstdError:
        n_bytes = len(stream)
    noise = rng.randbytes(max(n_bytes, 1))
    frame = bytearray(compress(noise, 1))
    frame[rng.randrange(min(len(frame), 12))] = rng.randrange(256)
    kinds = [rng.choice(BOMBS), rng.choice(JSON_BOMBS), compress(noise, 1), noise, bytes(frame), stream * 2, b""]
    return with_stream(content, name, rng.choice(kinds))


def hostile_tables(content, rng):
    """Damage the first bytes of a compressed block: there lie sizes, and the tables of its Huffman code."""
    header, data = parted(content)
    streams = [name for name in header if name != "__metadata__" and header[name]["dtype"] == "U8"]
    if not streams:
        return flip(content, rng)
    begin, end = header[rng.choice(streams)]["data_offsets"]
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        damaged[begin + rng.randrange(min(60, end - begin))] = rng.randrange(256)
    return joined(header, bytes(damaged))


DAMAGE = [cut, flip, overwrite, splice, length, alter_header, alter_description, hostile_stream, hostile_tables]


def read(path):
    """Read a file as the program does, and return all models in it."""
    return load_ensemble(path).members if is_ensemble(path) else (load_packed(path),)


def assert_sound(found):
    for value in found.quantized.values():
        assert value.codes.dtype == torch.int8
        assert value.spec.qmin <= value.codes.amin() <= value.codes.amax() <= value.spec.qmax
        assert (value.scale > 0).all()
        assert value.scale.isfinite().all()
    for value in found.rest.values():
        assert not value.is_floating_point() or not value.isnan().any()


def refused(path):
    """Return whether a file is refused; what is not must be sound."""
    try:
        found = read(path)
    except FormatError as error:
        return str(path) in str(error)
    for member in found:
        assert_sound(member)
    return False


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_hostile_files(files, tmp_path, damage):
    path = tmp_path / "hostile"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n_refused, slowest, seen = 0, 0.0, list[str]()
    for index in range(N_INPUTS):
        rng = random.Random(f"{damage.__name__} {index}")
        path.unlink(missing_ok=True)  # on some disks much faster than to write over it
        path.write_bytes(damage(rng.choice(files), rng))
        started = time.process_time()
        try:
            with WATCHED(tmp_path) as found:
                n_refused += refused(path)
            seen += found
        except Exception as error:
            raise AssertionError(f"input {index} of {damage.__name__}: {error!r}") from error
        slowest = max(slowest, time.process_time() - started)
    assert n_refused > N_INPUTS / 3
    assert slowest < MAX_SECONDS
    assert seen == []  # no program was started, and no file changed elsewhere
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KIB


def test_there_are_ten_thousand():
    assert N_INPUTS * len(DAMAGE) >= 10_000


def test_nesting_and_number_of_items_are_bounded_whatever_strings_say():
    assert parse('{"a[[[[": ' + "[" * 60 + "]" * 60 + "}")
    assert parse(json.dumps({"text": '[{,"\\' * 400_000}))
    with pytest.raises(ValueError, match="nested too deeply"):
        parse("[" * 65 + "]" * 65)
    with pytest.raises(ValueError, match="1048576 are the limit"):
        parse("[" + "[]," * 2**20 + "0]")


@pytest.mark.parametrize("text", ['{"\\ud800": 1}', '["a\\uDFFF"]', '["\\udc00\\ud800"]'])
def test_half_a_character_is_refused_because_no_file_could_be_given_it(text):
    with pytest.raises(ValueError, match="half a character"):
        parse(text)
    assert parse('["\\ud83d\\ude00", "\\\\ud800"]') == ["\U0001f600", "\\ud800"]


def test_half_a_character_is_not_written_either(tmp_path):
    one = model(0)
    with pytest.raises(FormatError, match="half a character"):
        save_packed(tmp_path / "x", one.quantized, one.rest, {"classes": ["\ud800"]})
    save_packed(tmp_path / "x", one.quantized, one.rest, {"classes": ["\U0001f600"]})
    assert load_packed(tmp_path / "x").metadata["classes"] == ["\U0001f600"]


def test_a_description_of_hundreds_of_thousands_of_empty_tensors_is_refused(tmp_path):
    rest = {f"{index:06}": {"dtype": "F32", "shape": [0]} for index in range(380_000)}
    tree = {
        "format_version": 3,
        "quantized": {},
        "rest": rest,
        "pools": {"F32": "plain"},
        "aliases": {},
        "metadata": {},
    }
    text = json.dumps(tree, separators=(",", ":")).encode()
    frame = torch.frombuffer(bytearray(compress(text, 1)), dtype=torch.uint8)
    tensors = {"description": frame, "values.F32": torch.zeros(0, dtype=torch.uint8)}
    safetensors.torch.save_file(tensors, tmp_path / "x", {"qtdog": '{"format_version":3}'})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match="limit"):
        load_packed(tmp_path / "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000

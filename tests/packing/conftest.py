"""Files changed as an attacker would: any statement of the header or of the description, the rest made to fit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from qtdog.packing.codecs import compress

Tree = dict[str, Any]
Change = Callable[[Tree, Tree], object]


def parts(path: Path) -> tuple[Tree, bytes]:
    """Return header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path: Path, header: Tree, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _with_description_last(header: Tree, data: bytes) -> tuple[bytes, bytes]:
    """Move the description to the end of the data; return the data before it and the description."""
    begin, end = header["description"]["data_offsets"]
    for name, info in header.items():
        if name != "__metadata__" and info["data_offsets"][0] >= end:
            info["data_offsets"] = [offset - (end - begin) for offset in info["data_offsets"]]
    return data[:begin] + data[end:], data[begin:end]


def rewrite_file(path: Path, change: Change) -> None:
    """Change the header of a file and its description, and write it back with fitting lengths."""
    header, data = parts(path)
    if "description" not in header:
        description = json.loads(header["__metadata__"]["qtdog"])
        change(header, description)
        if "qtdog" in header.get("__metadata__", {}):
            header["__metadata__"]["qtdog"] = json.dumps(description)
        write(path, header, data)
        return
    before, frame = _with_description_last(header, data)
    description = json.loads(zstandard.decompress(frame))
    info = header["description"]
    change(header, description)
    frame = compress(json.dumps(description).encode(), 1)
    info |= {"shape": [len(frame)], "data_offsets": [len(before), len(before) + len(frame)]}
    write(path, header, before + frame)


def replace_stream(path: Path, name: str, data: bytes) -> None:
    """Put other bytes in the place of a tensor, whatever their number."""
    header, whole = parts(path)
    begin, end = header[name]["data_offsets"]
    for info in (info for key, info in header.items() if key != "__metadata__"):
        if info["data_offsets"][0] >= end:
            info["data_offsets"] = [offset + len(data) - (end - begin) for offset in info["data_offsets"]]
    header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [begin, begin + len(data)]}
    write(path, header, whole[:begin] + data + whole[end:])


@pytest.fixture
def rewrite() -> Callable[[Path, Change], None]:
    return rewrite_file


@pytest.fixture
def replace() -> Callable[[Path, str, bytes], None]:
    return replace_stream

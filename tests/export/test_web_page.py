"""A bundle's page: what it is made of, what is refused, that no name in it is markup; `tests/browser` opens it."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qtdog.core.errors import ConfigError
from qtdog.export.bundle import write_bundle
from qtdog.export.packed_source import read_packed_source
from qtdog.export.web_page import GLUE, RUNTIME, WASM, web_page, web_runtime

PROGRAM = (
    "const a={},b={},c={};export{a as env,b as InferenceSession,c as Tensor,a as default};\n//# sourceMappingURL=x.map"
)
BINARY = b"\0asm\1\0\0\0"
ABOUT = {"classes": ["cat", "dog"], "backbone": "resnet18", "made_by": "qtdog", "threshold": 0.5}


def write_runtime(folder: Path, program: str = PROGRAM, wasm: bytes = BINARY) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / RUNTIME).write_text(program)
    (folder / GLUE).write_text("export default () => {};")
    (folder / WASM).write_bytes(wasm)
    return folder


def part(page: str, name: str) -> str:
    found = re.search(rf'<script [^>]*id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return found[1]


def test_model_runtime_and_description_are_in_the_page_and_nothing_is_fetched(tmp_path: Path):
    page = web_page(ABOUT, b"the model", web_runtime(write_runtime(tmp_path)))
    assert base64.b64decode(part(page, "model")) == b"the model"
    assert base64.b64decode(part(page, "runtime")) == BINARY
    assert base64.b64decode(part(page, "glue")) == b"export default () => {};"
    assert json.loads(part(page, "description")) == ABOUT
    assert "const ort = { env: a, InferenceSession: b, Tensor: c };" in page
    assert "sourceMappingURL" not in page
    assert not re.search(r"https?://", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize("name", ["</script><img src=x onerror=alert(1)>", "<!--", "{{ model }}", "a & b"])
def test_names_of_classes_are_data(tmp_path: Path, name: str):
    hostile = ABOUT | {"classes": [name, "dog"], "backbone": name}
    page = web_page(hostile, b"m", web_runtime(write_runtime(tmp_path)))
    plain = web_page(ABOUT, b"m", web_runtime(tmp_path))
    assert json.loads(part(page, "description"))["classes"][0] == name
    for tag in ("<script", "</script", "<img", "<!--"):
        assert page.count(tag) == plain.count(tag)


@pytest.mark.parametrize(
    ("program", "wasm", "reason"),
    [
        ("no module", BINARY, "not those of onnxruntime-web"),
        (PROGRAM, b"MZ", "not those of onnxruntime-web"),
        ("export{a as env};", BINARY, "lacks InferenceSession, Tensor"),
    ],
)
def test_what_is_no_runtime_is_refused(tmp_path: Path, program: str, wasm: bytes, reason: str):
    write_runtime(tmp_path, program, wasm)
    with pytest.raises(ConfigError, match=reason):
        web_page(ABOUT, b"m", web_runtime(tmp_path))


def test_a_folder_without_the_runtime_is_refused_with_the_way_to_get_it(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"npm pack onnxruntime-web"):
        web_runtime(tmp_path)


def test_a_bundle_has_a_page_only_where_it_was_asked_for(packed: Any, photos: Any, tmp_path: Path):
    source = read_packed_source(packed("test_resnet"))
    runtime = web_runtime(write_runtime(tmp_path / "dist"))
    write_bundle(source, tmp_path / "site", photos, name="onnx", runtime=runtime)
    page = (tmp_path / "site" / "index.html").read_text()
    assert base64.b64decode(part(page, "model")) == (tmp_path / "site" / "model.onnx").read_bytes()
    write_bundle(source, tmp_path / "site", photos, name="onnx")
    assert not (tmp_path / "site" / "index.html").exists()  # it would hold the model of before

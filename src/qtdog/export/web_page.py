"""A page that classifies photographs in a browser: model, runtime and program in one file that needs no network."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from qtdog.core.errors import ConfigError

PAGE = "index.html"
NEEDED = ("env", "InferenceSession", "Tensor")
EXPORTS = re.compile(r"export\s*\{([^}]*)\}\s*;?")
RUNTIME, GLUE, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"
MAX_PART_BYTES = 100_000_000
"""Of model or runtime: a larger page opens in no browser in reasonable time."""


@dataclass(frozen=True)
class WebRuntime:
    """ONNX Runtime Web.

    Attributes:
        program: the module that pages talk to.
        glue: the module that starts the WebAssembly.
        wasm: the WebAssembly.
    """

    program: str
    glue: bytes
    wasm: bytes


def web_runtime(folder: Path) -> WebRuntime:
    """Return ONNX Runtime Web from the `dist` folder of its npm package.

    Raises:
        ConfigError: the files are not there, or not what they should be; the text says how to get them.
    """
    hint = "get it with 'npm pack onnxruntime-web', unpack the file, and give its folder package/dist"
    files = [folder / name for name in (RUNTIME, GLUE, WASM)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"{folder} is no onnxruntime-web: {' and '.join(missing)} not there; {hint}")
    if any(file.stat().st_size > MAX_PART_BYTES for file in files):
        raise ConfigError(f"{folder}: a file is larger than {MAX_PART_BYTES:,} bytes; {hint}")
    program, glue, wasm = (file.read_bytes() for file in files)
    text = program.decode("utf-8", errors="replace")
    if not wasm.startswith(b"\0asm") or EXPORTS.search(text) is None:
        raise ConfigError(f"{folder}: its files are not those of onnxruntime-web; {hint}")
    return WebRuntime(text, glue, wasm)


def web_page(about: Mapping[str, Any], model: bytes, runtime: WebRuntime) -> str:
    """Return the page.

    Args:
        about: what model.json says.
        model: the content of the ONNX file.
        runtime: as `web_runtime` returns it.

    Raises:
        ConfigError: the model is too large for a page, or the runtime has none of the names that are needed.
    """
    if len(model) > MAX_PART_BYTES:
        raise ConfigError(f"the model has {len(model):,} bytes, too many for a page; leave --web out")
    assets = resources.files("qtdog") / "export" / "assets"
    template, own = ((assets / name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    classes = list(about["classes"])
    shown = ", ".join(classes[:12]) + (f" and {len(classes) - 12} more" if len(classes) > 12 else "")
    parts = {
        "title": html.escape(f"{len(classes)} classes of photographs"),
        "about": html.escape(f"Classes: {shown}. {about['backbone']}, {about['made_by']}."),
        "description": json.dumps(about).replace("<", "\\u003c"),
        "glue": base64.b64encode(runtime.glue).decode(),
        "wasm": base64.b64encode(runtime.wasm).decode(),
        "model": base64.b64encode(model).decode(),
        "script": _in_script(f"{_as_object(runtime.program)}\n{{\n{own}}}"),
    }
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: parts[match[1]], template)


def _in_script(text: str) -> str:
    """Return a program that cannot end the `script` element that holds it: its strings say the same."""
    return text.replace("</", "<\\/").replace("<!--", "<\\!--")


def _as_object(program: str) -> str:
    """Return a module's text that defines `ort` instead of exporting names, so that it can stand inside a page.

    A page that was opened from a disk may load no module from beside it.
    """
    found = EXPORTS.search(program)
    assert found is not None  # `web_runtime` looked
    local = {name: own for own, name in re.findall(r"([\w$]+) as (\w+)", found[1])}
    lacking = [name for name in NEEDED if name not in local]
    if lacking:
        raise ConfigError(f"this onnxruntime-web lacks {', '.join(lacking)}; take another version")
    rest = re.sub(r"//# sourceMappingURL=\S+", "", program[: found.start()] + program[found.end() :])
    members = ", ".join(f"{name}: {local[name]}" for name in NEEDED)
    return f"{rest}\nconst ort = {{ {members} }};"

"""A folder that classifies photographs without qtdog: model, script, model card; the same as one page for browsers."""

from __future__ import annotations

import ast
import base64
import html
import json
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from qtdog import __version__
from qtdog.core.errors import ConfigError
from qtdog.core.files import sha256_file, sync_file, sync_folder, temporary_folder, umask
from qtdog.export.export import Exported, Watch, export
from qtdog.export.formats import FORMATS
from qtdog.export.packed_source import PackedSource
from qtdog.export.parity import LabelledImages, images_of
from qtdog.export.runtimes import open_runtime
from qtdog.runs.folder import RunFolder
from qtdog.runs.statistics import percent_range, share_interval
from qtdog.training.finalize import environment

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


MODEL, SCRIPT, ABOUT, CARD = "model.onnx", "predict.py", "model.json", "README.md"
BUNDLE_FORMATS = ("onnx-int8", "onnx")
INLINED = ("core/errors.py", "core/printable.py", "data/scan.py", "data/decode.py")
"""Modules that the script imports. Their text becomes part of it, so that both read alike."""
N_TIMED = 30


@dataclass(frozen=True)
class MeasuredDomain:
    """How right the packed model was on one domain.

    Attributes:
        domain: its name, or that of several.
        role: "validation images of a source", or "unseen in training".
        accuracy: share of right answers.
        n: images; None where that was not kept.
    """

    domain: str
    role: str
    accuracy: float
    n: int | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the accuracy (Wilson)."""
        return None if self.n is None else share_interval(self.accuracy, self.n)


SOURCE, UNSEEN = "validation images of a source", "unseen in training"


def measured_domains(source: PackedSource) -> list[MeasuredDomain]:
    """Return how right a packed model was on each domain, as the result of its run says.

    A run that does not say it by domain, and a file without its run, give the means over the sources.

    Raises:
        RunError: its `result.json` is damaged.
    """
    info = source.infos[0]
    folder = RunFolder(source.path.parent)
    result = folder.finished_result() or {}
    if result:
        folder.require_result(result)
    scores = result.get("scores", {})
    found = [
        MeasuredDomain(domain, role, score["accuracy"], score["n"])
        for part, role in (("source", SOURCE), ("test", UNSEEN))
        for domain, score in scores.get(part, {}).items()
    ]
    if found:
        return found
    single = info.accuracy if len(source.infos) == 1 else {}
    means = {
        "source": result.get("source_accuracy", single.get("source")),
        "test": result.get("test_accuracy", single.get("test")),
    }
    names = {"source": ("mean of the sources", SOURCE), "test": (info.target_domain or "test images", UNSEEN)}
    return [MeasuredDomain(*names[part], value) for part, value in means.items() if value is not None]


def write_bundle(
    source: PackedSource,
    out: Path,
    images: LabelledImages,
    *,
    name: str = BUNDLE_FORMATS[0],
    calibration: LabelledImages | None = None,
    runtime: WebRuntime | None = None,
    watch: Watch = lambda title: None,
) -> Exported:
    """Write a packed model as a folder that runs without qtdog, and return what the export made.

    Args:
        source: the packed model.
        out: the folder; what of these files it holds is replaced, all else stays.
        images: source images to compare on, as in `export`.
        name: of the format, one of `BUNDLE_FORMATS`.
        calibration: as in `export`.
        runtime: of a browser, as `web_page.web_runtime` returns it; None for a folder without a page.
        watch: shows how far the work is.

    Raises:
        ConfigError: the format is none of those, or the model is too large for a page.
        DataError, ModelError, RunError: as in `export`; nothing is written then.
    """
    if name not in BUNDLE_FORMATS:
        raise ConfigError(f"a bundle holds an ONNX model: its format is {' or '.join(BUNDLE_FORMATS)}, not {name}")
    with temporary_folder(out / ABOUT) as draft:
        made = export(source, draft / MODEL, name, images, calibration=calibration, watch=watch)
        about = description(source, made)
        (draft / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
        (draft / SCRIPT).write_text(script(), encoding="utf-8")
        card = model_card(source, made, about, latency_ms(draft / MODEL, images.pixels[:1]))
        (draft / CARD).write_text(card, encoding="utf-8")
        files = [CARD, SCRIPT, MODEL, ABOUT]  # the last one makes the others valid
        if runtime is not None:
            page = web_page(about, (draft / MODEL).read_bytes(), runtime)
            (draft / PAGE).write_text(page, encoding="utf-8")
            files.insert(0, PAGE)
        for file in files:
            sync_file(draft / file)
            (draft / file).chmod(0o666 & ~umask())
            (draft / file).replace(out / file)
        if runtime is None:
            (out / PAGE).unlink(missing_ok=True)  # of an earlier model
        sync_folder(out)
    return Exported(out / MODEL, made.info, made.parity, made.n_bytes, made.packed_bytes)


def description(source: PackedSource, made: Exported) -> dict[str, Any]:
    """Return the content of model.json."""
    info = made.info
    domains = [asdict(one) | {"interval": one.interval} for one in measured_domains(source)]
    return {
        "file": MODEL,
        "sha256": sha256_file(made.path),
        "format": info.format,
        "classes": list(info.classes),
        "preprocessing": {
            "image_size": info.preprocessing.image_size,
            "channels": info.preprocessing.channels,
            "resize": "bilinear, antialiased, no crop; scaling and normalizing are inside the model",
        },
        "threshold": info.accept_threshold,
        "temperature": info.temperature,
        "source_domains": list(info.source_domains),
        "target_domain": info.target_domain,
        "accuracy": domains,
        "backbone": info.backbone,
        "n_members": info.n_members,
        "parity": info.model_dump(mode="json")["parity"],
        "notes": list(info.notes),
        "packed_sha256": sha256_file(source.path),
        "made_by": f"qtdog {__version__}",
    }


def script() -> str:
    """Return the content of predict.py: our own reading of images and folders with the script around it, one file."""
    root = Path(__file__).parents[1]
    own = (root / "export" / "bundle_predict.py").read_text(encoding="utf-8")
    texts = [*((root / name).read_text(encoding="utf-8") for name in INLINED), own]
    imports: set[str] = set()
    bodies = []
    for text in texts:
        tree = ast.parse(text)
        heads = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        outside = (node for node in heads if not ast.unparse(node).startswith(("from qtdog", "from __future__")))
        imports |= {ast.unparse(node) for node in outside}
        bodies.append("\n".join(text.splitlines()[heads[-1].end_lineno :]).strip("\n"))
    about = ast.get_docstring(ast.parse(own), clean=False)
    order = sorted(imports, key=lambda line: (line.startswith("from"), line))
    head = [f'"""{about}"""', "from __future__ import annotations", "\n".join(order)]
    hint = 'HINT = "Replace or remove it."'  # ours names a command of qtdog
    return "\n\n\n".join([*head, *bodies[:-1], hint, bodies[-1]]) + "\n"


def latency_ms(model: Path, image: np.ndarray) -> float:
    """Return the median time of one image in onnxruntime, one thread."""
    opened = open_runtime(model, threads=1)
    times = []
    for _ in range(N_TIMED + 3):
        start = time.perf_counter()
        opened(image)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[3:])


def model_card(source: PackedSource, made: Exported, about: dict[str, Any], ms: float) -> str:
    """Return the content of README.md."""
    info, parity = made.info, made.parity
    bits = source.infos[0].bits
    weights = "float weights" if bits is None else f"weights of {bits} bits"
    networks = info.backbone if info.n_members == 1 else f"{info.n_members} × {info.backbone}"
    size = info.preprocessing.image_size
    target = f" `{info.target_domain}` was held out." if info.target_domain else " No domain was held out."
    rows = [_row(one) for one in measured_domains(source)] or ["| (not known) | | | | |"]
    unseen = any(one.role == UNSEEN for one in measured_domains(source))
    warning = "" if unseen else "\n\nIt was measured on no domain that it had not seen: expect less at a new site."
    threshold = about["threshold"]
    accepted = "none was fitted; `--threshold P` sets one" if threshold is None else f"{threshold:.4f}"
    notes = "".join(f"\n- {note}" for note in info.notes)
    products = (
        "" if info.integer_products is None else "\n- products in integers: {} of {}".format(*info.integer_products)
    )
    return f"""# {len(info.classes)} classes of photographs, {networks}

Classes: {", ".join(info.classes)}.

```bash
pip install onnxruntime numpy pillow
python {SCRIPT} photo.jpg new-site/
```

Each line is an image: path, class, probability, accepted or rejected. `--json` prints a JSON object per line.

## Trained on

The domains {", ".join(info.source_domains)}.{target} Images are resized to {size} × {size} pixels without cropping.

## How right it is

| domain | | accuracy (%) | 95 % interval | images |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}{warning}

These are numbers of the packed model. This file was compared with it on {parity.n_images} {images_of(parity)}:
the same class on {100 * parity.agreement_frac:.2f} %, accuracy there
{100 * parity.accuracy_packed:.1f} → {100 * parity.accuracy_exported:.1f} %, and no probability further off than
{parity.max_difference["probabilities"]:.2g}.

Threshold of accepted answers: {accepted}.

## Cost

- size: {made.n_bytes / 1e6:.3g} MB ({FORMATS[info.format].title}, {weights})
- time: {ms:.3g} ms per image (median of {N_TIMED}, onnxruntime, one thread, {environment()["cpu"]}){products}{notes}

`{ABOUT}` holds all of this for programs, with the sha256 of `{MODEL}`. Made by {about["made_by"]}.
"""


def _row(one: MeasuredDomain) -> str:
    interval = "" if one.interval is None else percent_range(one.interval)
    n = "" if one.n is None else f"{one.n:,}"
    return f"| {one.domain} | {one.role} | {100 * one.accuracy:.1f} | {interval} | {n} |"

"""A bundle answers like `qtdog predict`, on photographs of every kind, without qtdog."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qtdog.core.errors import ConfigError, QtdogError
from qtdog.core.files import sha256_file
from qtdog.ensemble.prediction import find_images, predict_images
from qtdog.export.bundle import GLUE, INLINED, RUNTIME, WASM, script, web_page, web_runtime, write_bundle
from qtdog.export.bundle_predict import Classifier
from qtdog.export.packed_source import read_packed_source
from qtdog.training.load_model import load_model

ALLOWED = ("numpy", "PIL", "onnxruntime")


def draw_photos(folder: Path) -> None:
    """Write photographs of every kind that cameras, phones and programs leave."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((60, 44), Image.Resampling.BICUBIC)
    inside = folder / "Süd lager"
    inside.mkdir(parents=True)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        coarse.save(inside / f"turned {turn}.jpg", exif=exif, quality=95)
    coarse.convert("CMYK").save(folder / "print.jpg")
    coarse.convert("L").save(folder / "grey.png")
    coarse.convert("1").save(folder / "black and white.png")
    coarse.convert("P").save(folder / "palette.png")
    coarse.convert("P").save(folder / "transparent palette.gif", transparency=3)
    alpha = coarse.convert("RGBA")
    alpha.putalpha(coarse.convert("L"))
    alpha.save(folder / "alpha.png")
    alpha.convert("LA").save(folder / "grey alpha.png")
    alpha.save(folder / "alpha.webp")
    wide = (np.asarray(coarse.convert("L")).astype(np.uint16) << 8) + 7
    Image.fromarray(wide).save(folder / "sixteen bits.png")
    Image.fromarray(wide).save(folder / "sixteen bits.tif")
    Image.fromarray(wide >> 6).save(folder / "ten bits.png")  # refused: nothing says which value is white
    coarse.save(folder / "no suffix", format="PNG")
    (folder / "broken.jpg").write_bytes((inside / "turned 1.jpg").read_bytes()[:300])
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_bytes((inside / "turned 1.jpg").read_bytes())


@pytest.fixture(scope="module")
def bundle(packed, photos, tmp_path_factory):
    """A bundle of a float graph, the packed file that it was made from, and photographs."""
    folder = tmp_path_factory.mktemp("bundle")
    draw_photos(folder / "photos")
    source = read_packed_source(packed("test_resnet", accept=0.4))
    (folder / "site" / ".model.json.abcdefgh.tmp").mkdir(parents=True)  # as a kill leaves it
    write_bundle(source, folder / "site", photos, name="onnx")
    return folder / "site", source.path, folder / "photos"


def test_what_a_kill_left_is_removed(bundle):
    site, _, _ = bundle
    assert [path.name for path in site.iterdir() if path.name.startswith(".")] == []


def test_every_photograph_gets_the_answer_of_predict(bundle):
    site, model, photos = bundle
    files = find_images([photos])
    expected = list(predict_images(load_model(model), files))
    found = list(Classifier(site).rows(files))
    assert len(found) == len(files) == 22
    errors = [str(row) for row in expected if isinstance(row, QtdogError)]
    assert len(errors) == 3
    assert [row["error"] for row in found if "error" in row] == errors
    for one, other in zip(expected, found, strict=True):
        if isinstance(one, dict):
            assert (other["image"], other["class"]) == (one["image"], one["class"])
            assert other["probability"] == pytest.approx(one["probability"], abs=1e-4)
    assert len({row["class"] for row in expected if isinstance(row, dict)}) > 1


def without_qtdog(folder: Path) -> Path:
    """Return a folder of packages that has nothing besides what the script may use."""
    packages = folder / "packages"
    packages.mkdir()
    for name in (*ALLOWED, "numpy.libs", "pillow.libs", "onnxruntime.libs"):
        found = next((Path(place) / name for place in sys.path if (Path(place) / name).is_dir()), None)
        if found is not None:
            (packages / name).symlink_to(found)
    return packages


def test_the_script_runs_where_qtdog_is_not(bundle, tmp_path):
    site, model, photos = bundle
    elsewhere = tmp_path / "another machine"
    elsewhere.mkdir()
    for file in site.iterdir():
        (elsewhere / file.name).write_bytes(file.read_bytes())
    start = f"import sys, runpy; sys.path.append({str(without_qtdog(tmp_path))!r}); sys.argv = sys.argv[1:]; "
    run = [sys.executable, "-I", "-S", "-c", start + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    done = subprocess.run(
        [*run, elsewhere / "predict.py", photos, "--json"], capture_output=True, text=True, cwd="/", check=False
    )
    assert done.returncode == 1, done.stderr
    assert "3 of 22 images could not be read" in done.stderr
    assert "qtdog" not in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    expected = [row for row in predict_images(load_model(model), find_images([photos])) if isinstance(row, dict)]
    assert [(row["image"], row["class"]) for row in rows] == [(row["image"], row["class"]) for row in expected]
    assert [row["accepted"] for row in rows] == [row["probability"] >= 0.4 for row in rows]
    assert 0 < sum(row["accepted"] for row in rows) < len(rows)


def test_the_script_imports_three_libraries_and_names_no_command_of_ours():
    tree = ast.parse(script())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"__future__"}
    assert outside - {"pillow_heif"} == set(ALLOWED)  # that one only if it is installed
    assert all(module.endswith(".py") for module in INLINED)


def run_script(site, *arguments, environment=None):
    command = [sys.executable, site / "predict.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_names_reach_the_terminal_as_characters(bundle, tmp_path):
    site, _, photos = bundle
    received = tmp_path / "site"
    shutil.copytree(site, received)
    about = json.loads((received / "model.json").read_text())
    about["classes"] = [f"\x1b]0;{name}\x07" for name in about["classes"]]
    (received / "model.json").write_text(json.dumps(about))
    shutil.copy(photos / "grey.png", tmp_path / "a\x1b[31m\tb.png")
    (tmp_path / "c\x1b[2J.png").write_bytes(b"x")
    done = run_script(received, tmp_path / "a\x1b[31m\tb.png", tmp_path / "c\x1b[2J.png")
    assert "\x1b" not in done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    image, label, *_ = line.split("\t")
    assert image.endswith("a?[31m?b.png")
    assert label.startswith("?]0;")
    assert "c?[2J.png" in done.stderr


def test_a_threshold_decides_what_is_accepted_and_lines_have_tabs(bundle):
    site, _, photos = bundle
    about = json.loads((site / "model.json").read_text())
    classifier = Classifier(site, threshold=0.42)
    rows = [row for row in classifier.rows(find_images([photos])) if "error" not in row]
    assert [row["accepted"] for row in rows] == [row["probability"] >= 0.42 for row in rows]
    done = run_script(site, photos / "print.jpg", "--threshold", "0")
    path, name, probability, accepted = done.stdout.rstrip("\n").split("\t")
    assert (done.returncode, path, accepted) == (0, str(photos / "print.jpg"), "accepted")
    assert name in about["classes"]
    assert 0 < float(probability) <= 1


@pytest.mark.parametrize("given", ["80", "-0.1", "nan", "auto"])
def test_a_threshold_that_is_no_probability_is_refused(bundle, given, monkeypatch, capsys):
    site, _, photos = bundle
    monkeypatch.setattr(sys, "argv", [str(site / "predict.py"), f"--threshold={given}", str(photos / "print.jpg")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(site / "predict.py"), run_name="__main__")
    assert end.value.code == 2
    assert f"invalid probability value: '{given}'" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_the_script_without_a_traceback(bundle):
    site, _, photos = bundle
    command = f"{shlex.join([sys.executable, str(site / 'predict.py'), str(photos / 'print.jpg')])} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_ctrl_c_ends_the_script_without_a_traceback(bundle, monkeypatch, capsys):
    site, _, photos = bundle
    script_of = runpy.run_path(str(site / "predict.py"))

    class Interrupted(script_of["Classifier"]):
        def rows(self, files):
            yield next(super().rows(files))
            raise KeyboardInterrupt

    monkeypatch.setitem(script_of["run_script"].__globals__, "Classifier", Interrupted)
    monkeypatch.setattr(sys, "argv", [str(site / "predict.py"), str(photos / "print.jpg")])
    monkeypatch.setitem(script_of["run_script"].__globals__, "__file__", str(site / "predict.py"))
    assert script_of["run_script"]() == 130
    assert "print.jpg" in capsys.readouterr().out


def test_a_missing_library_is_named_with_the_command_that_installs_it(bundle, monkeypatch, capsys):
    site, _, photos = bundle
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(sys, "argv", [str(site / "predict.py"), str(photos / "print.jpg")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(site / "predict.py"), run_name="__main__")
    assert end.value.code == 2
    assert "pip install onnxruntime numpy pillow" in capsys.readouterr().err


def test_a_locale_without_a_letter_of_a_name_loses_no_row(bundle, tmp_path):
    site, _, photos = bundle
    for name in ("a.jpg", "\u732b.jpg", "z.jpg"):
        (tmp_path / name).write_bytes((photos / "print.jpg").read_bytes())
    (tmp_path / "notes.txt").touch()
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = run_script(site, tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"passed over: 1 .txt (such as {tmp_path}/notes.txt)\n"
    names = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert names == [f"{tmp_path}/{name}" for name in ("a.jpg", "z.jpg", "\\u732b.jpg")]


def test_a_damaged_model_and_a_missing_path_are_told(bundle, tmp_path):
    site, _, photos = bundle
    assert "does not exist" in run_script(site, photos / "no.jpg").stderr
    for file in site.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.onnx").write_bytes((site / "model.onnx").read_bytes()[:-1])
    done = run_script(tmp_path, photos, environment=os.environ | {"PYTHONWARNINGS": "error"})
    assert done.returncode == 2
    assert "copy the whole folder again" in done.stderr


def test_description_and_card_say_what_is_known(bundle):
    site, model, _ = bundle
    about = json.loads((site / "model.json").read_text())
    assert (about["threshold"], about["temperature"]) == (0.4, 30.0)
    assert about["sha256"] == sha256_file(site / "model.onnx")
    assert about["packed_sha256"] == sha256_file(model)
    assert about["classes"] == ["bird", "cat", "dog"]
    card = (site / "README.md").read_text()
    assert "`outdoor` was held out" in card
    assert "Threshold of accepted answers: 0.4000" in card
    assert f"no probability further off than\n{about['parity']['max_difference']['probabilities']:.2g}." in card
    assert "measured on no domain that it had not seen" in card
    assert sorted(file.name for file in site.iterdir()) == ["README.md", "model.json", "model.onnx", "predict.py"]


def test_only_onnx_makes_a_bundle(packed, photos, tmp_path):
    with pytest.raises(ConfigError, match="onnx-int8 or onnx, not openvino"):
        write_bundle(read_packed_source(packed("test_resnet")), tmp_path / "site", photos, name="openvino")
    assert not (tmp_path / "site").exists()


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

"""The way from mixed photographs to a machine without qtdog: every command of its page, at a small scale."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qtdog.cli.main import main

PAGE = Path(__file__).parents[2] / "docs/tasks/photographs.md"
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
SMALL = ["--backbone", "digits_cnn", "--weights", "none", "--image-size", "16", "--batch-size", "4"]
SMALL += ["--lr", "0.01", "--steps", "40"]
SITES = ("Köln Süd", "Århus", "site 3")


def photograph(path: Path, *, bright: bool, number: int) -> None:
    """Write a picture whose class can be seen: bright above, or bright below."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 60, (20, 28, 3), dtype=np.uint8)
    pixels[slice(0, 10) if bright else slice(10, 20)] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if number == 1:  # lies on its side, and says so
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".jpg"), exif=exif)
    elif number == 2:
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
    else:
        image.save(path)


def fill(folder: Path, n: int) -> None:
    """Write n photographs of each class, one that is broken, one in HEIC, and a file that is none."""
    for number in range(n):
        for name, bright in (("früh am Tag", True), ("spät", False)):
            photograph(folder / name / f"Foto ä {number}.png", bright=bright, number=number)
    (folder / "spät" / "kaputt.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken off")
    (folder / "spät" / "telefon.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (folder / "spät" / "notes.txt").write_text("not an image")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs a line of the page among the photographs and returns exit code and output."""
    monkeypatch.chdir(tmp_path)
    for site in SITES:
        fill(tmp_path / "photos" / site, 8)
    fill(tmp_path / "new photos", 3)

    def run(line: str) -> tuple[int, str]:
        program, *words = shlex.split(line)
        capsys.readouterr()
        code: Any = 0
        with pytest.MonkeyPatch.context() as patch:
            try:
                if program == "qtdog":
                    patch.setattr(sys, "argv", [program, *words, *(SMALL if words[0] == "train" else [])])
                    main()
                else:
                    assert program == "classify/bin/python"
                    patch.setattr(sys, "argv", words)
                    runpy.run_path(words[0], run_name="__main__")
            except SystemExit as end:
                code = end.code
        return int(code or 0), capsys.readouterr().out

    return run


@pytest.mark.usefixtures("one_registry")
def test_each_command_of_the_page_runs_on_mixed_photographs(machine: Any):
    verify, train, evaluate, export, _, _, script, script_json, predict = COMMANDS
    code, out = machine(verify)
    assert code == 1
    assert out.count("kaputt.jpg") >= 3
    assert out.count("telefon.heic") >= 3
    assert machine(train)[0] == 0
    skipped = json.loads(Path("runs/site/skipped.json").read_text())
    assert len(skipped) == 2 * len(SITES)
    code, out = machine(evaluate)
    assert code == 0
    assert "Köln Süd" in out
    assert machine(export)[0] == 0
    assert {file.name for file in Path("site").iterdir()} == {"model.onnx", "predict.py", "model.json", "README.md"}
    code, lines = machine(script)
    assert code == 1  # two files cannot be read, and are named
    code, objects = machine(script_json)
    assert code == 1
    told = {row["image"]: row for row in map(json.loads, objects.splitlines()) if "error" not in row}
    assert [line.split("\t")[:2] for line in lines.splitlines()] == [
        [row["image"], row["class"]] for row in told.values()
    ]
    assert machine(predict)[0] == 1
    code, out = machine(f"{predict} --json")
    expected = {row["image"]: row for row in json.loads(out)}
    assert len(expected) == 6
    assert {name: row["class"] for name, row in expected.items()} == {name: row["class"] for name, row in told.items()}
    for name, row in expected.items():
        assert row["probability"] == pytest.approx(told[name]["probability"], abs=0.05)
    code, out = machine(
        "qtdog compare runs/site runs/site --data photos/"
    )  # broken images, as in training, are left out
    assert code == 0
    assert out.count("no difference shown") == len(SITES)
    code, out = machine("qtdog eval runs/site --unknown 'new photos' --json")
    assert code == 0
    assert 0 <= json.loads(out)["unknown_auroc_entropy"] <= 1


def test_the_machine_without_qtdog_gets_the_three_libraries_of_the_script():
    make, install = COMMANDS[4:6]
    assert make == "python3 -m venv classify"
    assert install == "classify/bin/pip install onnxruntime numpy pillow"

"""Every script of the gallery runs at a small scale and draws its picture."""

import re
import runpy
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from qtdog.training.plugins import forget_plugins

ROOT = Path(__file__).parents[2]
HOOKS = runpy.run_path(str(ROOT / "docs/make/hooks.py"))
PICTURES = runpy.run_path(str(ROOT / "docs/make/pictures.py"))
EXAMPLES = HOOKS["examples"]()
SMALLER = {
    r'steps=300|"steps": 300': lambda found: found[0].replace("300", "4"),
    r"members=3": lambda found: "members=2",
    r"\* 3 \+": lambda found: "* 2 +",
    r"num_points=\d+": lambda found: "num_points=3",
    r"num_images=\d+": lambda found: "num_images=4",
    r"num_directions=\d+": lambda found: "num_directions=4",
    r"radii=\[0, 1, 2, 3, 4\]": lambda found: "radii=[0, 1]",
    r"bits in \(3, 5, 7\)": lambda found: "bits in (7,)",
}


def smaller(program: str) -> str:
    for pattern, change in SMALLER.items():
        program = re.sub(pattern, change, program)
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where the scripts find the runs of those before them."""
    return tmp_path_factory.mktemp("gallery")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
@pytest.mark.filterwarnings("ignore")  # of so short runs
def test_a_script_runs_and_draws(example: Any, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    try:
        exec(compile(smaller(example.code), example.script, "exec"), {"__name__": "__main__"})
    finally:
        plt.close("all")
        forget_plugins()
    with Image.open(f"{example.name}.png") as picture:
        assert min(picture.size) > 100


def test_the_gallery_has_a_picture_for_each_script_and_no_other():
    assert len(EXAMPLES) >= 12
    kept = {path.stem for path in (ROOT / "docs/gallery").glob("*.png")}
    assert kept == {example.name for example in EXAMPLES}
    printed = {path.stem for path in (ROOT / "docs/gallery").glob("*.txt")}
    assert printed == {example.name for example in EXAMPLES if "print(" in example.code}


def test_a_script_is_short_and_says_what_it_shows():
    for example in EXAMPLES:
        assert len(example.code.splitlines()) <= 40, example.name
        assert example.title, example.name
        assert example.text, example.name
        assert f'"{example.name}.png"' in example.code, example.name
    index = HOOKS["gallery_index"]()
    assert all(f"({example.name}.md)" in index for example in EXAMPLES)

"""Run the scripts of the gallery and keep their pictures and what they print; about five minutes on two cores.

    python docs/make/pictures.py                 # all of docs/gallery/*.png and *.txt
    python docs/make/pictures.py flatness        # these alone; what they train is trained for them

The drawings of the other pages are made by drawings.py.
"""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
import tempfile
import warnings
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "docs" / "gallery"
MAX_WIDTH = 1200  # pixels


def run_script(path: Path) -> str:
    """Run a script in the current folder and return what it prints; it leaves NAME.png there."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()


def keep(name: str, printed: str) -> None:
    """Write the picture, small enough for a repository, and the output."""
    with Image.open(f"{name}.png") as picture:
        small = picture.convert("RGB")
        small.thumbnail((MAX_WIDTH, 2 * MAX_WIDTH))
        # MAXCOVERAGE keeps rare colors, those of a color bar
        small.quantize(128, Image.Quantize.MAXCOVERAGE).save(GALLERY / f"{name}.png", optimize=True)
    output = GALLERY / f"{name}.txt"
    output.unlink(missing_ok=True)
    if printed:
        output.write_text(printed)


def main() -> None:
    """Run the scripts, all in one folder, since they share runs."""
    hooks = runpy.run_path(str(Path(__file__).with_name("hooks.py")))
    wanted = sys.argv[1:]
    GALLERY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for example in hooks["examples"]():
            if not wanted or example.name in wanted:
                print(example.name, flush=True)
                keep(example.name, run_script(hooks["GALLERY"] / example.script))


if __name__ == "__main__":
    main()

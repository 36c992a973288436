"""The page on the architecture names the files that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "src" / "qtdog"


def test_every_file_of_every_folder_is_listed():
    section = PAGE.partition("### Files")[2]
    listed = {
        folder: sorted(re.findall(r"`(\w+)`", files))
        for folder, files in re.findall(r"^- `(\w+)`: (.*(?:\n  .*)*)", section, re.MULTILINE)
    }
    there: dict[str, list[str]] = {}
    for file in PACKAGE.glob("*/*.py"):
        if file.stem != "__init__":
            there.setdefault(file.parent.name, []).append(file.stem)
    assert listed == {folder: sorted(files) for folder, files in there.items()}


def test_files_and_names_in_the_life_of_a_run_exist():
    for path, name in re.findall(r"`(\w+/\w+\.py)(?::(\w+))?`", PAGE):
        file = (ROOT if path.startswith("tests/") else PACKAGE) / path
        assert file.is_file(), path
        assert not name or re.search(rf"^(def|class) {name}\b", file.read_text(encoding="utf-8"), re.MULTILINE), name

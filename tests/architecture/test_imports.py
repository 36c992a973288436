"""The import contract of pyproject.toml holds, and would notice if it did not."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("cli", "api", "sweep", "report", "ensemble", "analysis", "export", "training", "conversion")
ROOMS += ("runs", "data", "models", "quantizers", "objectives", "packing", "core")


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the linter in `folder`, where pyproject.toml is; the folder's own `qtdog` is found first if it has one."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_the_contract_holds():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def house(folder: Path, room: str, imported: str) -> Path:
    """Make an empty house with our contract, in which one room imports another."""
    for name in ROOMS:
        package = folder / "qtdog" / name
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (folder / "qtdog/__init__.py").touch()
    (folder / "qtdog" / room / "guest.py").write_text(f"import qtdog.{imported}\n")
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    return folder


@pytest.mark.parametrize(
    ("room", "imported"), [("core", "data"), ("packing", "conversion"), ("data", "models"), ("training", "cli")]
)
def test_an_import_upwards_or_sideways_is_noticed(tmp_path: Path, room: str, imported: str):
    done = lint_imports(house(tmp_path, room, imported))
    assert done.returncode == 1
    assert f"qtdog.{room} is not allowed to import qtdog.{imported}" in done.stdout


def test_an_import_downwards_is_allowed(tmp_path: Path):
    done = lint_imports(house(tmp_path, "conversion", "packing"))
    assert done.returncode == 0, done.stdout


def test_a_room_that_is_not_in_the_picture_is_noticed(tmp_path: Path):
    folder = house(tmp_path, "cli", "core")
    (folder / "qtdog/attic").mkdir()
    (folder / "qtdog/attic/__init__.py").touch()
    done = lint_imports(folder)
    assert done.returncode == 1
    assert "attic" in done.stdout


def test_the_contract_names_every_room():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = {name.strip(" ()") for layer in contracts[0]["layers"] for name in layer.split("|")}
    assert named == set(ROOMS)

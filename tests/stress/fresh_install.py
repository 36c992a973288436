"""Install the package into a new environment without any extra, and run `qtdog demo` there.

    python tests/stress/fresh_install.py            # a minute; downloads nothing

The new environment borrows the installed libraries of this one, but only those that the package depends on, directly or
not: an import of any other fails as if it were not installed. The package itself is built and installed as a wheel.
Prints what was found, and ends with an error where a file is missing or the demo fails.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]


def closure(name: str) -> set[str]:
    """Return the distributions that a package needs without extras, itself included."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        one = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if one in found:
            continue
        try:
            needs = metadata.requires(one) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(one)
        waiting += [match[0] for need in needs if "extra ==" not in need and (match := re.match(r"[\w.-]+", need))]
    return found


def borrow(needed: set[str], folder: Path) -> int:
    """Link the files of installed libraries into a folder, the needed ones alone; return how many are left out."""
    n_kept_out = 0
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name not in needed or name == "qtdog":
            n_kept_out += name != "qtdog"
            continue
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    return n_kept_out


def build(folder: Path) -> Path:
    """Return a wheel of this tree."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def missing_files(wheel: Path) -> list[str]:
    """Return the files below src/ that git knows and the wheel has not."""
    listed = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = {line.removeprefix("src/") for line in listed.splitlines()}
    with zipfile.ZipFile(wheel) as archive:
        return sorted(wanted - set(archive.namelist()))


def main() -> None:
    """Build, install, run."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        missing = missing_files(wheel)
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, missing files: {missing or 'none'}")
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
        python = Path(folder) / "venv" / "bin" / "python"
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
        where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        site = Path(
            subprocess.run([str(python), "-c", where], capture_output=True, text=True, check=True).stdout.strip()
        )
        borrowed = Path(folder) / "borrowed"
        borrowed.mkdir()
        n_kept_out = borrow(closure("qtdog"), borrowed)
        (site / "borrowed.pth").write_text(f"{borrowed}\n")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        check = "import qtdog, json; print(json.dumps(qtdog.__file__))"
        found = subprocess.run(
            [str(python), "-c", check], capture_output=True, text=True, check=True, env=environment, cwd=folder
        )
        place = json.loads(found.stdout)
        print(f"installed in {place.removeprefix(folder)}; {n_kept_out} libraries are not there")
        assert place.startswith(str(site)), place
        subprocess.run(
            [str(python.with_name("qtdog")), "demo", "--steps", "20"], check=True, env=environment, cwd=folder
        )
        if missing:
            sys.exit("the wheel lacks files")


if __name__ == "__main__":
    main()

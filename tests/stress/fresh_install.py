"""Build the sdist and the wheel, install the sdist into a new environment without any extra, and use it there.

    make check-release                                     # this command; two minutes, downloads nothing
    python tests/stress/fresh_install.py --download        # pip fetches the dependencies (gigabytes) as for a user
    python tests/stress/fresh_install.py --whole           # the demo and the README with all their steps

Without `--download` the new environment borrows the installed libraries of this one, but only those that the package
depends on, directly or not: an import of any other fails as if it were not installed. The files that git knows are
copied to an empty folder, the sdist is built from them, the wheel from the sdist. In an empty folder of the new
environment run: `qtdog demo`, the README's shell (all but the export, which must name its extra) and Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
BESIDE_THE_PACKAGE = {"README.md", "LICENSE", "NOTICE", "CITATION.cff", "CHANGELOG.md", "pyproject.toml"}


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


def tracked() -> list[str]:
    """Return the files that git knows."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def build(folder: Path) -> tuple[Path, Path]:
    """Build an sdist of the tracked files and a wheel of the sdist; return both."""
    for name in tracked():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder / "tree", check=True, stdout=subprocess.DEVNULL)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, str(sdist)], check=True)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def missing_files(sdist: Path, wheel: Path) -> list[str]:
    """Return the files of the package that git knows and one of both has not, and what the sdist lacks beside it."""
    package = {name for name in tracked() if name.startswith("src/qtdog/")}
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    not_installed = {name for name in package if name.removeprefix("src/") not in installed}
    licences = {name for name in ("LICENSE", "NOTICE") if not any(path.endswith(f"/{name}") for path in installed)}
    return [
        *(f"{sdist.name}: {name}" for name in sorted((package | BESIDE_THE_PACKAGE) - held)),
        *(f"{wheel.name}: {name}" for name in sorted(not_installed | licences)),
    ]


def install(sdist: Path, folder: Path, *, download: bool) -> Path:
    """Install the sdist into a new environment below a folder and return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    began = time.monotonic()
    if download:
        subprocess.run([*pip, str(sdist)], check=True)
    else:
        subprocess.run([*pip, "--no-deps", str(sdist)], check=True)
        where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        site = subprocess.run([str(python), "-c", where], capture_output=True, text=True, check=True).stdout.strip()
        borrowed = folder / "borrowed"
        borrowed.mkdir()
        print(f"{borrow(closure('qtdog'), borrowed)} libraries of this environment are not in the new one")
        (Path(site) / "borrowed.pth").write_text(f"{borrowed}\n")
    n_bytes = sum(path.stat().st_size for path in (folder / "venv").rglob("*") if path.is_file())
    print(f"installed in {time.monotonic() - began:.0f} s; the environment has {n_bytes / 1e9:.2f} GB")
    return python


def readme_blocks() -> tuple[str, str]:
    """Return the README's lines of shell and of Python."""
    text = (ROOT / "README.md").read_text()
    parts = (text.split("## Five lines of shell")[1], text.split("## Ten lines of Python")[1])
    shell, program = (part.split("```", 2)[1].partition("\n")[2] for part in parts)
    return shell, program


def use(python: Path, folder: Path, *, whole: bool) -> None:
    """Run the demo and the README in an empty folder with the installed package."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    here = folder / "empty"
    here.mkdir()

    def call(*words: str, ends_with: int = 0) -> str:
        print("$", " ".join(words).strip(), flush=True)
        done = subprocess.run(words, env=environment, cwd=here, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == ends_with, done.stderr
        return done.stderr

    place = subprocess.run(
        [str(python), "-c", "import qtdog, json; print(json.dumps(qtdog.__file__))"],
        capture_output=True, text=True, check=True, env=environment, cwd=here,
    )  # fmt: skip
    assert json.loads(place.stdout).startswith(str(folder / "venv")), place.stdout
    fewer = (lambda block: block) if whole else (lambda block: re.sub(r"(steps\"?:?\s)\d+", r"\g<1>20", block))
    call("qtdog", "demo", *([] if whole else ["--steps", "20"]))
    shell, program = readme_blocks()
    exports = [line for line in shell.splitlines() if line.startswith("qtdog export")]
    call("bash", "-ec", fewer("\n".join(line for line in shell.splitlines() if line not in exports)))
    (export,) = exports
    assert "pip install 'qtdog[onnx]'" in call("bash", "-ec", export, ends_with=1)
    call(str(python), "-c", fewer(program))


def main() -> None:
    """Build, look into what was built, install, use."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--download", action="store_true", help="let pip fetch the dependencies.")
    parser.add_argument("--whole", action="store_true", help="train with all steps of the demo and the README.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        sdist, wheel = build(folder)
        missing = missing_files(sdist, wheel)
        for file in (sdist, wheel):
            print(f"{file.name}: {file.stat().st_size:,} bytes", flush=True)
        if missing:
            sys.exit("files are missing:\n" + "\n".join(missing))
        use(install(sdist, folder, download=given.download), folder, whole=given.whole)
        print("the release works")


if __name__ == "__main__":
    main()

"""What the wheel holds and what the pages say of extras and systems agrees with `pyproject.toml`."""

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def test_every_file_of_the_package_that_is_no_module_is_package_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["qtdog"]
    package = ROOT / "src" / "qtdog"
    others = [
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    ]
    assert len(others) > 10
    assert [name for name in others if not any(fnmatch(name, pattern) for pattern in patterns)] == []


def test_the_page_lists_the_extras():
    page = (ROOT / "docs/install.md").read_text()
    table = page.split("## Extras")[1].split("\n## ")[0]
    listed = [
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([\w]+)`", line.split("|")[1])
    ]
    assert sorted(listed) == sorted(EXTRAS)


def test_extras_that_pages_and_messages_name_exist():
    texts = [
        path.read_text() for folder in ("docs", "src", "benchmarks") for path in (ROOT / folder).rglob("*.[mp][dy]")
    ]
    named = {name for text in texts for group in re.findall(r"qtdog\[([\w,]+)\]", text) for name in group.split(",")}
    assert named
    assert named <= set(EXTRAS)


def test_stated_versions_are_those_of_the_project():
    page = (ROOT / "docs/install.md").read_text()
    assert f"Python {PROJECT['project']['requires-python'].removeprefix('>=')} or newer" in page
    torch = next(need for need in PROJECT["project"]["dependencies"] if need.startswith("torch>"))
    assert f"PyTorch {torch.partition('>=')[2]} or newer" in page
    assert f"qtdog-{PROJECT['project']['version']}-py3-none-any.whl" in page


def test_a_system_without_fcntl_is_told_what_to_do():
    code = "import importlib.util as u; u.find_spec = lambda name: None; import qtdog"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: qtdog runs on Linux and macOS; on Windows use WSL" in done.stderr


def test_make_bench_gives_no_argument_to_a_script_that_needs_one():
    line = r'add_argument\("[a-z]\w*"(?!.*(nargs="[*?]"|default=))'
    needy = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if re.search(line, path.read_text())}
    done = subprocess.run(["make", "-n", "bench"], cwd=ROOT, capture_output=True, text=True, check=True)
    made = set(re.findall(r"benchmarks/(\w+)\.py", done.stdout))
    assert {"rescore", "shift_scores"} <= needy
    assert made
    assert not made & needy

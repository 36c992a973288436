"""`import qtdog` and `qtdog --help` are quick and quiet: nothing heavy is imported for them."""

from __future__ import annotations

import signal
import subprocess
import sys
import tomllib
from pathlib import Path

HEAVY = {"torch", "numpy", "pandas", "pydantic", "yaml", "timm", "rich.progress", "rich.markdown", "importlib.metadata"}


def test_nothing_heavy_is_imported_before_a_command_runs():
    code = f"""
import sys
import tomllib
from pathlib import Path
import qtdog
assert not {HEAVY | {"rich"}} & set(sys.modules), {HEAVY | {"rich"}} & set(sys.modules)
import qtdog.cli.main
assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)
sys.argv = ["qtdog", "--help"]
try:
    qtdog.cli.main.main()
except SystemExit as left:
    assert not left.code
assert not {HEAVY | {"rich"}} & set(sys.modules), {HEAVY | {"rich"}} & set(sys.modules)
print(qtdog.__version__)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1][0].isdigit()
    assert "  eval       Score a model on every domain of a data set" in done.stdout
    assert "The index is a cache of the run folders" in done.stdout  # the whole first paragraph, not one line of it


def test_ctrl_c_while_it_loads_shows_no_trace():
    code = """
import os, signal, sys

class InterruptHere:
    def find_spec(self, name, path=None, target=None):
        if name == "qtdog.cli.main":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python starts, unless the tests run in the background
sys.meta_path.insert(0, InterruptHere())
sys.argv = ["qtdog", "--version"]
from qtdog.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_the_command_starts_where_the_module_does():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"qtdog": "qtdog.__main__:main"}

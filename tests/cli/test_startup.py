"""`import qtdog` and `qtdog --help` are quick and quiet: nothing heavy is imported for them."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"torch", "numpy", "pandas", "pydantic", "yaml", "timm", "rich.progress", "rich.markdown", "importlib.metadata"}


def test_nothing_heavy_is_imported_before_a_command_runs():
    code = f"""
import sys
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

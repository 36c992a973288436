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
print(qtdog.__version__)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()

"""Run the commands and programs of a page and write what they print below them.

    python docs/make/outputs.py docs/quickstart.md docs/tutorials/*.md

    python docs/make/outputs.py --folder runs/pages PAGE    # keep the runs: what is finished there is not trained again

A block `bash` or `python` that is followed by a block `text` is run, in the order of the page, in a new folder that all
pages of one call share. A block with `title="NAME"` is written to that file. The tests run the pages the same way, with
fewer steps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(bash|python|yml)([^\n]*)\n(.*?)^```\n(\s*```text\n.*?^```\n)?", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r'title="([^"]+)"')
Shell = Callable[[str], str]


def in_shell(command: str) -> str:
    """Run a command line as a user would and return what it prints.

    Raises:
        RuntimeError: it failed.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(["bash", "-ec", command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout}{done.stderr}")
    return done.stdout


def in_python(program: str, names: dict[str, Any]) -> str:
    """Run a program with the names of those before it, and return what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "page", "exec"), names)
    return printed.getvalue()


def run_page(
    text: str,
    shell: Shell = in_shell,
    change: Callable[[str], str] = str,
    *,
    every: bool = False,
    names: dict[str, Any] | None = None,
) -> str:
    """Return a page with the output of its blocks written anew.

    Args:
        text: the page.
        shell: runs a block of command lines in the current folder.
        change: what to do to a block before it is run, such as taking fewer steps.
        every: also run the blocks that are followed by no output.
        names: is filled with what the page's programs define.

    Raises:
        RuntimeError: a command failed.
    """
    names = {} if names is None else names

    def replaced(match: re.Match[str]) -> str:
        language, rest, block, output = match.groups()
        title = TITLE.search(rest)
        if title:
            Path(title[1]).write_text(change(block))
            return match[0]
        if language == "yml" or (output is None and not every):
            return match[0]
        printed = shell(change(block)) if language == "bash" else in_python(change(block), names)
        if output is None:
            return match[0]
        kept = "\n".join(line.rstrip() for line in printed.strip("\n").splitlines()).replace(f"{Path.cwd()}/", "")
        return f"```{language}{rest}\n{block}```\n\n```text\n{kept}\n```\n"

    return BLOCK.sub(replaced, text)


def main() -> None:
    """Run the pages that are named on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, help="where to run them. Default a temporary folder.")
    given = parser.parse_args()
    pages = [page.absolute() for page in given.pages]
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "examples").exists():
            os.symlink(ROOT / "examples", folder / "examples")
        stack.enter_context(contextlib.chdir(folder))
        for page in pages:
            page.write_text(run_page(page.read_text()))


if __name__ == "__main__":
    main()

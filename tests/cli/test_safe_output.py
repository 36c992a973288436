"""Names with terminal escapes and markup are characters on the terminal, in results, warnings and errors."""

from __future__ import annotations

import io
import shutil

import pytest
from rich.progress import Progress
from rich.text import Text
from typer.testing import CliRunner

from qtdog.api.display import SafeConsole
from qtdog.cli.console import fail, print_table, print_text, warn
from qtdog.cli.main import app

HOSTILE = "a\x1b[31mred\x1b]0;title\x07\r\x9b2J\u202e[/nothing][red]"


@pytest.mark.parametrize("show", [fail, warn, print_text, lambda text: print_table([text], [[text]])])
def test_what_is_said_is_text(show, capsys):
    show(HOSTILE)
    said = "".join(capsys.readouterr())
    assert "a?[31mred?]0;title" in said
    assert "[/nothing][red]" in said
    assert not set(said) & set("\x1b\x07\r\x9b\u202e")


def test_styles_and_bars_still_reach_a_terminal():
    stream = io.StringIO()
    console = SafeConsole(file=stream, force_terminal=True, color_system="truecolor", markup=False, width=200)
    console.print(Text.assemble(("bold", "bold"), HOSTILE))
    with Progress(console=console, auto_refresh=False) as progress:
        progress.add_task(HOSTILE.replace("[/nothing]", ""), total=1)
        progress.refresh()
    said = stream.getvalue()
    assert "\x1b[1mbold\x1b[0m" in said
    assert "\x1b[?25l" in said  # the bar hides the cursor
    assert "\x1b[31mred" not in said
    assert "\x1b]0;" not in said
    assert "\x9b" not in said


@pytest.mark.parametrize("words", [["tab\x1b[31mle"], ["table", "--\x1b[31mx"], ["table", "x", "--format", "\x1b[31m"]])
def test_a_wrong_argument_is_text_in_the_error(words):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "\x1b[31m" not in done.output
    assert "[31m" in done.output or "--" in done.output


def test_a_hostile_name_of_a_folder_is_text(tmp_path, capsys):
    folder = tmp_path / "runs\x1b[31m"
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "result.json").write_text("{")
    done = CliRunner().invoke(app, ["runs", "--runs", str(folder)])
    assert done.exception is None
    assert "\x1b" not in done.output
    assert "?[31m" in done.output
    shutil.rmtree(folder)

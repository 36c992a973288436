"""The program `qtdog`: commands, errors and exit codes."""

from __future__ import annotations

import io
import os
import sys

import typer

from qtdog.cli.analyze import analyze_app
from qtdog.cli.bits import bits
from qtdog.cli.data import data_app
from qtdog.cli.ensemble import ensemble
from qtdog.cli.export import bench, export
from qtdog.cli.listing import inspect_file, listing
from qtdog.cli.options import QtdogGroup
from qtdog.cli.predict import compare, evaluate, predict
from qtdog.cli.reproduce import demo, reproduce
from qtdog.cli.sweep import sweep_app
from qtdog.cli.tables import report, runs, table
from qtdog.cli.train import dart, distill, train
from qtdog.core.errors import ConfigError, QtdogError

EPILOG = (
    "First steps: 'qtdog demo' (a minute), then 'qtdog train --data ROOT --target DOMAIN'. Every command has --help. "
    "'--plugin FILE.py' runs a plug-in of yours (a loss, a quantizer, a backbone, …) before any command."
)

app = typer.Typer(
    no_args_is_help=True,
    cls=QtdogGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    epilog=EPILOG,
    help="Train, select and save one small model that holds up on domains it never saw.",
)


def show_version(wanted: bool) -> None:
    """Print the version and leave, if that is wanted."""
    if wanted:
        from qtdog import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Show the version and leave.", is_eager=True, callback=show_version
    ),
) -> None:
    del version  # its callback has done it


app.command()(train)
app.command(name="eval")(evaluate)
app.command()(compare)
app.command()(predict)
app.command()(ensemble)
app.command()(bits)
app.command()(distill)
app.command()(export)
app.command()(bench)
app.command(name="inspect")(inspect_file)
app.command()(dart)
app.command()(table)
app.command()(report)
app.command()(runs)
app.command()(reproduce)
app.command()(demo)
app.command(name="list")(listing)
app.add_typer(analyze_app, name="analyze", cls=QtdogGroup)
app.add_typer(analyze_app, name="analyse", cls=QtdogGroup, hidden=True)  # its name before
app.add_typer(data_app, name="data", cls=QtdogGroup)
app.add_typer(sweep_app, name="sweep")


def take_plugins(args: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without `--plugin FILE` wherever they stand, and the files: every command takes plug-ins.

    Example:
        >>> take_plugins(["train", "--plugin", "a.py", "--steps", "9", "--plugin=b.py", "--", "--plugin"])
        (['train', '--steps', '9', '--', '--plugin'], ['a.py', 'b.py'])
    """
    left: list[str] = []
    files: list[str] = []
    rest = iter(args)
    for word in rest:
        if word == "--":
            return [*left, word, *rest], files
        if word == "--plugin":
            file = next(rest, None)
            if file is None:
                raise ConfigError("--plugin takes a Python file: --plugin my_loss.py")
            files.append(file)
        elif word.startswith("--plugin="):
            files.append(word.partition("=")[2])
        else:
            left.append(word)
    return left, files


def _decode_names_as_utf8() -> None:
    """Start again where the locale says that file names are not UTF-8: a name means the same whatever the locale."""
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"  # workers inherit it
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")  # of the terminal
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    """Run the program; a QtdogError, or what a place on a disk refuses, becomes one sentence and an exit code."""
    _decode_names_as_utf8()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale without a letter of some name loses no output
    try:
        args, plugins = take_plugins(sys.argv[1:])
        if plugins:
            _run_with_plugins(args, plugins)
        else:
            app(args)
    except QtdogError as error:
        from qtdog.cli.console import fail

        fail(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        from qtdog.cli.console import fail
        from qtdog.core.files import place_sentence

        text = place_sentence(error)
        if not text:
            raise
        fail(str(QtdogError(text)))
        sys.exit(QtdogError.exit_code)


def _run_with_plugins(args: list[str], plugins: list[str]) -> None:
    from qtdog.training.plugins import name_plugins

    name_plugins(plugins)
    try:
        app(args)
    finally:  # a program that calls this one twice means them for this command alone
        name_plugins([])


if __name__ == "__main__":
    main()

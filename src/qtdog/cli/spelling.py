"""How commands and options are spelled: old names with a note, the nearest for a mistyped one; `--plugin`."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperGroup

from qtdog.api.python_words import ON_COMMAND_LINE

# What an option was called → what it is called: the first of these that the command has.
RENAMED = {
    "--out": ("--runs", "--output"),
    "--into": ("--output",),
    "--to": ("--output",),
    "--csv": ("--format=csv",),
    "--images": ("--num-images",),
    "--directions": ("--num-directions",),
    "--vectors": ("--num-vectors",),
    "--eigenvalues": ("--num-eigenvalues",),
    "--probes": ("--num-probes",),
    "--points": ("--num-points",),
    "--shown": ("--num-shown",),
    "--mistakes": ("--num-mistakes",),
    "--rounds": ("--num-rounds",),
    "--calibrate": ("--num-calibration",),
    "--check": ("--num-check",),
}
PLUGIN = "Python file that registers members of your own, such as a loss; it is run. May be given several times."
NO_MEMBERS = {"demo", "merge", "fetch", "import", "report", "runs"}  # commands that have no use for a plug-in
JSON_OR_TEXT = ("text", "json")


class QtdogGroup(TyperGroup):
    """A group of commands that reads its arguments by the rules of this file."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands as plain text: importing rich and drawing with it would take half of the time."""
        super(TyperGroup, self).format_help(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command with the whole first paragraph of its help, where click would cut it to one line."""
        commands = ((name, self.commands[name]) for name in self.list_commands(ctx))
        rows = [(name, _first_paragraph(one.help or "")) for name, one in commands if not one.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; one that has a use for plug-ins lists `--plugin`."""
        command = super().get_command(ctx, cmd_name)
        if command is None or hasattr(command, "commands") or command.name in NO_MEMBERS:
            return command
        if not any("--plugin" in option.opts for option in command.params):
            command.params.append(_plugin_option())
        return command

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for; what is said of a wrong argument cannot move on the terminal."""
        token = ON_COMMAND_LINE.set(True)
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(message := getattr(error, "message", None), str):  # as click's errors have it
                from qtdog.core.printable import printable

                setattr(error, "message", printable(message))  # noqa: B010
            raise
        finally:
            ON_COMMAND_LINE.reset(token)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the arguments name and what is left of them, old names replaced.

        Raises:
            UsageError: there is no such command; the text has the nearest one.
        """
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            from qtdog.core.errors import unknown

            visible = [name for name in self.list_commands(ctx) if not self.commands[name].hidden]
            ctx.fail(unknown("command", args[0], visible))
        name, command, rest = super().resolve_command(ctx, args)
        return name, command, rest if command is None else _today(ctx, command, rest)


def _first_paragraph(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


@cache
def _plugin_option() -> Any:
    """Return `--plugin` for --help and shell completion; `cli.main.take_plugins` reads it before any command."""
    prototype = typer.Typer(add_completion=False)

    @prototype.command()
    def _(plugin: Annotated[list[str] | None, typer.Option("--plugin", metavar="FILE.py", help=PLUGIN)] = None) -> None:
        del plugin

    options = typer.main.get_command(prototype).params
    option = next(one for one in options if "--plugin" in one.opts)
    option.expose_value = False
    return option


def _today(ctx: Any, command: Any, args: list[str]) -> list[str]:
    """Return the arguments of a command with old names replaced, each named once on standard error."""
    known = {name for option in command.params if option.param_type_name == "option" for name in option.opts}
    mentioned: set[str] = set()
    words = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*words, word, *rest]
        old, equals, value = word.partition("=")
        new = next((name for name in RENAMED.get(old, ()) if name.partition("=")[0] in known), None)
        if new is not None and old not in known:
            if old not in mentioned:
                typer.echo(f"note: {old} is called {new.replace('=', ' ')} now", err=True)
                mentioned.add(old)
            word = new + equals + value
        elif old == "--format" and "--format" not in known and "--json" in known:
            words += _format_words(ctx, value if equals else rest.pop(0) if rest else "")
            continue
        words.append(word)
    return words


def _format_words(ctx: Any, name: str) -> list[str]:
    """Return what `--format NAME` means to a command that writes text or JSON."""
    if name not in JSON_OR_TEXT:
        from qtdog.core.errors import unknown

        ctx.fail(unknown("format", name, JSON_OR_TEXT))
    return ["--json"] if name == "json" else []

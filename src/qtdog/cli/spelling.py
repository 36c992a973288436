"""How commands and options are spelled: one name for one thing in every command, old names with a note, nearest names.

The table is applied to the options of all commands when they are looked up, so that no command can depart from it.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

# What an option was called → what it is called.
RENAMED = {
    "--out": ("--output", "-o"),
    "--images": ("--num-images",),
    "--directions": ("--num-directions",),
    "--vectors": ("--num-vectors",),
    "--eigenvalues": ("--num-eigenvalues",),
    "--probes": ("--num-probes",),
    "--calibrate": ("--num-calibration",),
    "--check": ("--num-check",),
}
COUNTS = frozenset(RENAMED) - {"--out"}  # renamed only where they take a number
READS_RUNS = ("runs",)  # commands whose --out names what they read


class QtdogGroup(TyperGroup):
    """A group of commands with the names of this file."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, its options under their names of today."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            for option in command.params:
                _rename_(command, option)
        return command

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
        return name, command, rest if command is None else _today(command, rest)


def _rename_(command: Any, option: Any) -> None:
    if option.param_type_name != "option":
        return
    for old in [name for name in option.opts if name in RENAMED]:
        if old not in COUNTS or not getattr(option, "is_flag", False):
            new = ("--runs",) if old == "--out" and command.name in READS_RUNS else RENAMED[old]
            option.opts = [*new, *(name for name in option.opts if name not in (old, *new))]


def _today(command: Any, args: list[str]) -> list[str]:
    """Return the arguments of a command with old names replaced, each told once on standard error."""
    known = {name for option in command.params if option.param_type_name == "option" for name in option.opts}
    told: set[str] = set()
    words = []
    for place, word in enumerate(args):
        if word == "--":
            return words + args[place:]
        old, equals, value = word.partition("=")
        new = next((name for name in ("--runs", *RENAMED.get(old, ())) if name in known), None)
        if old in RENAMED and old not in known and new is not None and (new != "--runs" or old == "--out"):
            if old not in told:
                typer.echo(f"note: {old} is called {new} now", err=True)
                told.add(old)
            word = new + equals + value
        words.append(word)
    return words

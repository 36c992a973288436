"""`qtdog sweep`: a group of commands whose first word may be left out."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from qtdog.cli.sweep import sweep
from qtdog.cli.sweep_more import diff, merge, retry, status
from qtdog.cli.sweep_table import table

DEFAULT = "run"


class SweepGroup(TyperGroup):
    """Reads `qtdog sweep STUDY …` as `qtdog sweep run STUDY …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command before arguments that name none."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


sweep_app = typer.Typer(
    cls=SweepGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make all runs of a study, and go on where they stopped: [bold]qtdog sweep STUDY.yaml[/].",
)
sweep_app.command(name=DEFAULT)(sweep)
for _command in (status, retry, table, diff, merge):
    sweep_app.command()(_command)

"""`qtdog analyse`: what can be asked of finished runs, one command per question."""

from __future__ import annotations

import typer

from qtdog.cli.analyse_cam import cam
from qtdog.cli.analyse_flatness import flatness
from qtdog.cli.analyse_hessian import hessian
from qtdog.cli.analyse_noise import noise
from qtdog.cli.analyse_slices import slices
from qtdog.cli.analyse_stability import stability
from qtdog.cli.analyse_surface import surface

analyse_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Ask why runs do what they do: flatness, curvature, rounding noise, stability, attention, mistakes.",
    epilog="Every command writes OUT/KIND/: points, a table, figures (PNG, PDF) and analysis.json for the report.",
)
for _command in (flatness, hessian, surface, noise, stability, cam, slices):
    analyse_app.command()(_command)

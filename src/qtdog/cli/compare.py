"""`qtdog compare`: may a new model replace the old one? Both on the same images, site by site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtdog.cli.options import JsonOutput

DATA = "Images of every site, old and new: a folder SITE/CLASS/image, a name, or a manifest."
OLD = "The model in use: a file, or the folder that it is in."
NEW = "The model that may replace it: a file, or the folder that it is in."
SKIP = "Leave out images that cannot be read, and say how many. Default: an unreadable image is an error."
REGRESSED = 1


def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help=OLD)],
    new: Annotated[Path, typer.Argument(metavar="NEW", help=NEW)],
    *,
    data: Annotated[str, typer.Option("--data", help=DATA)],
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help=SKIP)] = False,
    as_json: JsonOutput = False,
) -> None:
    """Compare two models on every site, image by image, before the new one replaces the old one.

    For each site: both accuracies, the images won and lost, the 95 % interval of the difference and the exact McNemar
    test. A site where the new model is worse beyond chance is named, and the exit code is then 1, so that a script can
    stop there. Models may differ in everything but the classes of the data.

    Examples:
      qtdog compare old.safetensors runs/with-site-c --data photos/

      qtdog compare old.safetensors new.safetensors --data photos/ --json
    """
    from dataclasses import asdict

    from qtdog.cli.console import CountingBar, out, print_json, print_table
    from qtdog.cli.train import warn_skipped
    from qtdog.data.open import open_readable
    from qtdog.ensemble.model import load
    from qtdog.ensemble.model_comparison import compare_sites, worse_sites
    from qtdog.report.tables import percent
    from qtdog.runs.find import find_model

    files = [find_model(path) for path in (old, new)]
    models = [load(file) for file in files]
    dataset = open_readable(
        data, skip_unreadable=skip_unreadable, min_domains=1, progress=CountingBar("reading images")
    )
    warn_skipped(dataset)
    sites = compare_sites(models[0], models[1], dataset, progress=CountingBar("decoding images"))
    worse = worse_sites(sites)
    if as_json:
        rows = [
            asdict(site) | {"interval": site.interval, "p_value": site.p_value, "verdict": site.verdict}
            for site in sites
        ]
        print_json({"old": str(files[0]), "new": str(files[1]), "data": data, "sites": rows, "worse": worse})
    else:
        sources = set(models[1].info.source_domains)
        table = [
            [
                site.domain + ("" if site.domain in sources else " (unseen)"),
                f"{site.n:,}",
                percent(site.n_old / site.n),
                percent(site.n_new / site.n),
                f"+{site.n_won} −{site.n_lost}",
                "{:+.1f} … {:+.1f}".format(*(100 * end for end in site.interval)),
                site.verdict,
            ]
            for site in sites
        ]
        headers = ["site", "images", "old (%)", "new (%)", "images won, lost", "difference, 95 %", "verdict"]
        print_table(headers, table, title="(unseen): the new model was not trained on this site")
        if worse:
            text = f"The new model is worse at {', '.join(worse)}: look at them before it replaces the old one."
            out.print(text, highlight=False, soft_wrap=True)
    if worse:
        raise typer.Exit(REGRESSED)

"""`qtdog train`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

DATA = "Data set name (rotated-digits, pacs), a folder ROOT/DOMAIN/CLASS/image, or a .csv/.jsonl manifest."
TARGET = "The unseen domain; 'all' for each in turn; 'none' to train on everything (the model you deploy)."
PRESET = "Preset (qtdog list presets) or YAML file; may be given several times, later ones win."
OUT = "The run folder itself (with several runs: the folder that holds them). Default: runs/<hash>."
RESUME = "Go on from the last checkpoint; with --out alone the saved configuration is used."


def train(
    *,
    data: Annotated[str | None, typer.Option(help=DATA, rich_help_panel="Problem")] = None,
    target: Annotated[str | None, typer.Option(help=TARGET, rich_help_panel="Problem")] = None,
    trial: Annotated[
        int | None, typer.Option(help="Which random 20 % of each domain is held out.", rich_help_panel="Problem")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel="Problem")] = None,
    preset: Annotated[list[str] | None, typer.Option(help=PRESET, rich_help_panel="Configuration")] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", help="Any configuration value.", rich_help_panel="Configuration"
        ),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Any timm model, digits_cnn or mnist_cnn.", rich_help_panel="Method")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="'imagenet', 'none', or a .safetensors/.pth file.", rich_help_panel="Method")
    ] = None,
    objective: Annotated[str | None, typer.Option(help="The loss.", rich_help_panel="Method")] = None,
    step_rule: Annotated[
        str | None, typer.Option(help="How the loss becomes an update.", rich_help_panel="Method")
    ] = None,
    averager: Annotated[str | None, typer.Option(help="Which weights are kept.", rich_help_panel="Method")] = None,
    quantizer: Annotated[
        str | None, typer.Option(help="'lsq', or 'none' for a float model.", rich_help_panel="Method")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per weight, 2 to 8.", rich_help_panel="Method")] = None,
    start_step: Annotated[
        int | None, typer.Option(help="First quantized step. Default: 40 % of the steps.", rich_help_panel="Method")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of updates.", rich_help_panel="Training")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per source domain per step.", rich_help_panel="Training")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", rich_help_panel="Training")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of initialisation, batches and augmentation.", rich_help_panel="Training")
    ] = None,
    members: Annotated[
        int,
        typer.Option(min=1, max=100, help="Train this many models, seeds SEED, SEED+1, …", rich_help_panel="Training"),
    ] = 1,
    out: Annotated[Path | None, typer.Option(help=OUT, rich_help_panel="Run")] = None,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME, rich_help_panel="Run")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.", rich_help_panel="Run")] = False,
) -> None:
    """Train, select and ship one small model; measure it on a domain that it never saw.

    Examples:
      qtdog train                                                     (embedded digits, trains on all domains)

      qtdog train --data photos/ --target hospital_c --preset pacs-lite --bits 7

      qtdog train --data photos/ --target all --out runs/photos      (each domain unseen in turn, one table)

      qtdog train --resume --out runs/photos-c                       (after a crash, or Ctrl-C)
    """
    given = dict(locals())
    from qtdog.cli.plan import FLAGS, Request, make_plan
    from qtdog.cli.progress import CountingBar

    flags = {name: given[name] for name in FLAGS}
    request = Request(flags, preset or (), assign or (), members, out, resume)
    dataset, plan = make_plan(request, CountingBar("reading images"))
    announce(dataset)
    results = run_all(dataset, plan, resume=resume)
    if out is not None and len(plan) > 1:
        _keep_table(out, results)
    if as_json:
        from qtdog.cli.console import print_json

        print_json(results[0] if len(results) == 1 else results)
    else:
        _show(results)


def announce(dataset: Any) -> None:
    """Say which data set was recognised, and what differs from its datasheet."""
    from qtdog.cli.console import err, warn
    from qtdog.data.cards import check_counts

    n_domains, n_classes = len(dataset.domains), len(dataset.classes)
    text = f"{dataset.sheet.title} — {len(dataset):,} images, {n_domains} domains, {n_classes} classes"
    err.print(escape(text), highlight=False)
    for difference in check_counts(dataset):
        warn(difference)


def run_all(dataset: Any, plan: Sequence[Any], *, resume: bool) -> list[dict[str, Any]]:
    """Make every planned run, one after another, and return their results with folder and method."""
    from qtdog.cli.console import warn
    from qtdog.cli.progress import CountingBar, training_bar
    from qtdog.report.table import method_name
    from qtdog.training.run import Voice, run

    voice = Voice(training_bar, CountingBar("decoding images"), warn)
    results = []
    for planned in plan:
        result = run(planned.config, dataset, planned.folder, resume=resume, voice=voice)
        name = method_name(planned.config.model_dump())
        results.append(result | {"method": name, "folder": str(planned.folder.path)})
    return results


def _keep_table(out: Path, results: Sequence[dict[str, Any]]) -> None:
    from qtdog.core.files import write_atomic
    from qtdog.report.table import markdown, target_table

    write_atomic(out / "results.json", json.dumps(list(results), indent=1))
    write_atomic(out / "results.md", markdown(*target_table({results[0]["method"]: results})) + "\n")


def _show(results: Sequence[dict[str, Any]]) -> None:
    from qtdog.cli.console import out, print_table
    from qtdog.report.table import target_table

    title = "accuracy (%) on the whole unseen domain, checkpoint by source validation"
    first = results[0]
    if first["selection"] != "source":
        title = f"accuracy (%) on the whole unseen domain, checkpoint by '{first['selection']}'"
    if first["test_mode"] == "in-domain":
        title = "accuracy (%) on the last 20 % of each source domain (in-domain)"
    headers, rows = target_table({first["method"]: results})
    print_table(headers, rows, title=title)
    if first["test_accuracy"] is None:
        out.print("No domain was held out, so nothing says how well it transfers; --target all measures that.")
    for result in results:
        folder = escape(result["folder"])
        out.print(f"model  {folder}/model.safetensors", highlight=False, soft_wrap=True)
        out.print(f"report {folder}/result.json (accuracies, sizes, each layer)", highlight=False, soft_wrap=True)

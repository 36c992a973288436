"""How commands and options are declared, each option once, and spelled: old names, mistyped ones, `--plugin`."""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperGroup

from qtdog.api.python_words import ON_COMMAND_LINE

OUT = "Run folder to write (with several runs: the folder that holds theirs). Default: runs/HASH."
LOG = "Also send the numbers to tensorboard, wandb or mlflow. May be given several times."


def panel(name: str, text: str, *spelling: str, **more: Any) -> Any:
    """Return an option with its help text and the heading under which `--help` shows it."""
    return typer.Option(*spelling, help=text, rich_help_panel=name, **more)


_MODEL = "Model file (.safetensors) of 'qtdog train' or 'ensemble', or the folder that it is in."
AS_JSON = "Print the result as JSON; the same as --format json."
_DATA = (
    "Data set: a name (rotated-digits, pacs), a folder ROOT/DOMAIN/CLASS/image, or a .csv/.jsonl list. Default: "
    "the embedded rotated digits."
)
_TRIAL = "Which random 20 % of each source domain is the validation split. Default 0."
_SIZE = "Image size in pixels (square). Default 224, or what the data set's preset says."
_PRESET = "Preset (see 'qtdog list presets') or YAML file. May be given several times; later ones win."
_SET = panel(
    "Configuration",
    "Set any value of the configuration (see 'qtdog list options'). May be given several times.",
    "--set",
    metavar="SECTION.KEY=VALUE",
)
_BACKBONE = (
    "Backbone: any timm model, digits_cnn, mnist_cnn, a plug-in's. Default resnet50.tv_in1k, or as the preset says."
)
_WEIGHTS = "Initial weights: 'imagenet', 'package', 'none', or a .safetensors/.pth file. Default 'imagenet'."
_OBJECTIVE = "Training objective (see 'qtdog list objectives'). Default erm."
_STEP_RULE = "How a gradient becomes an update: plain, sam or sagm. Default plain."
_AVERAGER = "Weight averaging: none, sma, swa, bma or swad (see 'qtdog list averagers'). Default none."
_QUANTIZER = "Quantizer (see 'qtdog list quantizers'), or 'none' to train in float. Default lsq."
_BITS = "Bits per weight, 2 to 8. Default 7."
_STEPS = "Number of updates. Default 5000, or what the data set's preset says."
_BATCH = "Number of images per source domain in each step. Default 32, or what the data set's preset says."
_RATE = "Learning rate. Default 5e-5, or what the data set's preset says."
_SEED = "Seed of initialization, batches and augmentation. Default 0."
_RESUME = "Continue from the last checkpoint. With --output alone the saved configuration is used."

Model = Annotated[Path, typer.Argument(help=_MODEL, metavar="MODEL")]
Data = Annotated[str | None, panel("Data", _DATA)]
Trial = Annotated[int | None, panel("Data", _TRIAL)]
ImageSize = Annotated[int | None, panel("Data", _SIZE)]
Presets = Annotated[list[str] | None, panel("Configuration", _PRESET)]
Assignments = Annotated[list[str] | None, _SET]
Backbone = Annotated[str | None, panel("Method", _BACKBONE)]
Weights = Annotated[str | None, panel("Method", _WEIGHTS)]
Objective = Annotated[str | None, panel("Method", _OBJECTIVE)]
StepRule = Annotated[str | None, panel("Method", _STEP_RULE)]
Averager = Annotated[str | None, panel("Method", _AVERAGER)]
Quantizer = Annotated[str | None, panel("Method", _QUANTIZER)]
Bits = Annotated[int | None, panel("Method", _BITS)]
Steps = Annotated[int | None, panel("Training", _STEPS)]
BatchSize = Annotated[int | None, panel("Training", _BATCH)]
LearningRate = Annotated[float | None, panel("Training", _RATE)]
Seed = Annotated[int | None, panel("Training", _SEED)]
RunFolderOrNone = Annotated[Path | None, panel("Run", OUT, "--output", "-o")]
Resume = Annotated[bool, panel("Run", _RESUME, "--resume")]
AsJson = Annotated[bool, panel("Run", AS_JSON, "--json")]
JsonOutput = Annotated[bool, typer.Option("--json", help=AS_JSON)]


_FOLDER = "Folder of the run folders. Default: runs/NAME of the study."
_STUDY = "Study file: methods, a grid of targets, seeds and any configuration values."
_ONLY = (
    "Only runs whose labels or folder contain these words, like 'lsq target=sketch seed=0', and what they need. "
    "'sma' also finds lsq+sma; 'method=sma' is just that one."
)
_WORKERS = "Number of runs at a time. Default: one per GPU, or where there is none one per core, divided by --threads."
_THREADS = "Threads of each run; the last bits depend on it. Default: 1, with GPUs the cores shared out."
_ENGINE = "What makes the runs: processes on this machine, Ray, or Slurm."
_ADDRESS = "Address of a Ray cluster: auto, or ray://host:10001. Default: this machine."
_GPUS = "GPUs of each run; a fraction shares one. Default: on this machine one if there are any, on a cluster none."
_HOURS = "Hours of each Slurm job; a run that is not finished continues in a new one. Default 4."


class EngineName(StrEnum):
    """Who runs the runs."""

    LOCAL = "local"
    RAY = "ray"
    SLURM = "slurm"


StudyFile = Annotated[Path, typer.Argument(help=_STUDY, metavar="STUDY")]
OutFolder = Annotated[Path | None, typer.Option("--output", "-o", help=_FOLDER)]
RunsFolder = Annotated[Path | None, typer.Option("--runs", help=_FOLDER)]
DataFolder = Annotated[str | None, typer.Option(help="Data set, if it is not where the study says.")]
Only = Annotated[str | None, typer.Option(help=_ONLY)]
Log = Annotated[list[str] | None, typer.Option(metavar="LOGGER", help=LOG)]
EngineChoice = Annotated[EngineName, panel("Machines", _ENGINE)]
Workers = Annotated[int | None, panel("Machines", _WORKERS, min=1)]
Threads = Annotated[int | None, panel("Machines", _THREADS, min=1)]
Gpus = Annotated[float | None, panel("Machines", _GPUS, min=0)]
Address = Annotated[str | None, panel("Machines", _ADDRESS)]
Partition = Annotated[str, panel("Machines", "Partition of Slurm. Default: the cluster's own.")]
Hours = Annotated[float, panel("Machines", _HOURS, min=0.1)]


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
# Options that are gone, with what to do instead.
NO_CASCADE = (
    "a cascade saved no time (docs/results/benchmarks.md) and is gone. For one pass per image distill the ensemble: "
    "qtdog distill RUN; to abstain where a model is uncertain: predict --threshold auto"
)
REMOVED = {"--cascade": NO_CASCADE, "--cascade-loss": NO_CASCADE}
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
        if old in REMOVED and old not in known:
            ctx.fail(f"{old}: {REMOVED[old]}")
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

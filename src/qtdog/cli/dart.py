"""`qtdog dart`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from qtdog.cli.flags import OUT, AsJson, Assignments, Bits, Data, LearningRate, Presets, Quantizer, panel

if TYPE_CHECKING:
    from qtdog.core.config import Config

TARGET = "The unseen domain; 'none' to train on everything."
BRANCH = (
    "A branch, by what is its own: 'data.augment=none', or several values with ';' between them. Give it once for each "
    "branch. Default: a branch for each source domain, which gets half of its batches (data.focus)."
)
MERGE = "Steps between merges. Default: a tenth of the steps."


def dart(
    *,
    data: Data = None,
    target: Annotated[str | None, panel("Problem", TARGET)] = None,
    preset: Presets = None,
    assign: Assignments = None,
    branch: Annotated[list[str] | None, panel("Method", BRANCH, metavar="KEY=VALUE[;…]")] = None,
    merge_every: Annotated[int | None, panel("Method", MERGE, min=1)] = None,
    quantizer: Quantizer = None,
    bits: Bits = None,
    steps: Annotated[int | None, panel("Training", "Number of updates of each branch.")] = None,
    lr: LearningRate = None,
    seed: Annotated[int | None, panel("Training", "Of the first branch.")] = None,
    out: Annotated[Path, panel("Run", OUT)],
    resume: Annotated[bool, panel("Run", "Go on with what is in the folder.", "--resume")] = False,
    as_json: AsJson = False,
) -> None:
    """Train branches side by side, average them now and then, and ship one network (DART, CVPR 2023).

    The branches begin alike and differ in what they see: by default each gets half of its batches from a source domain
    of its own. It costs as many times the training as there are branches, and all of them lie in memory at once; what
    ships is one model.

    Examples:
      qtdog dart --data photos/ --target c --preset pacs-lite --out runs/dart

      qtdog dart --data photos/ --target c --branch data.augment=none --branch objective.name=coral --out runs/two
    """
    given = dict(locals())
    from qtdog.api.experiment import FLAGS, Request, make_plan
    from qtdog.cli.console import print_json, warn
    from qtdog.cli.progress import CountingBar, training_bar
    from qtdog.cli.train import announce, show
    from qtdog.core.errors import ConfigError
    from qtdog.report.tables import method_name
    from qtdog.training.dart import dart as train_branches
    from qtdog.training.protocol import make_problem
    from qtdog.training.run import Voice

    flags = {name: given[name] for name in FLAGS if name in given}
    dataset, plan = make_plan(Request(flags, preset or (), assign or (), out=out), CountingBar("reading images"))
    if len(plan) > 1:
        raise ConfigError("dart takes one --target at a time")
    config = plan[0].config
    configs = _branches(config, make_problem(config, dataset).sources, branch or ())
    announce(dataset)
    voice = Voice(training_bar, CountingBar("decoding images"), warn)
    every = merge_every or max(1, config.train.steps // 10)
    result = train_branches(configs, dataset, out, merge_every=every, resume=resume, voice=voice)
    told = {"method": f"{method_name(config.model_dump())}, dart", "folder": str(out)}
    result |= told | {"training_steps": config.train.steps * len(configs)}
    print_json(result) if as_json else show([result])


def _branches(config: Config, sources: Sequence[str], texts: Sequence[str]) -> list[Config]:
    """Return the configuration of each branch: one start, seeds counted up, and what is its own."""
    from qtdog.core.config_io import build_config, parse_assignment

    own: list[list[dict[str, Any]]] = [[parse_assignment(one) for one in text.split(";")] for text in texts]
    own = own or [[{"data": {"focus": source}}] for source in sources]
    configs = []
    for number, changes in enumerate(own):
        common = {"train": {"seed": config.train.seed + number}, "model": {"init_seed": config.init_seed}}
        configs.append(build_config([config.model_dump(), common, *changes]))
    return configs

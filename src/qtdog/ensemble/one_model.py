"""One network from several: the mean of their weights, in float or quantized anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError
from qtdog.ensemble.average import Latent, State, average, greedy, read_latent
from qtdog.ensemble.exam import Exam, mean_accuracy
from qtdog.ensemble.member import Member, check_one_start
from qtdog.ensemble.tune import enable_, tune
from qtdog.models.network import Network, place_
from qtdog.quantizers.registry import QUANTIZERS
from qtdog.training.build import make_quantizer
from qtdog.training.load import empty_network


@dataclass(frozen=True)
class Recipe:
    """How members become one network.

    Attributes:
        pick: which of them take part: "uniform" for all, "greedy" by accuracy on the held-out source images.
        refit: where the step sizes of a soup start: "mse" for the least squared error of each channel, or "init" as in
            its members' configuration.
        tune_steps: updates of a soup on the sources after that.
    """

    pick: str = "uniform"
    refit: str = "mse"
    tune_steps: int = 0


@dataclass(frozen=True)
class Joined:
    """One network made of several.

    Attributes:
        network: in evaluation mode, with quantizers if it is a soup.
        used: positions of the members that take part.
    """

    network: Network
    used: tuple[int, ...]


def check_recipe(kind: str, recipe: Recipe) -> None:
    """Refuse a choice that a kind of ensemble would not read.

    Raises:
        ConfigError: naming the choice and the kind.
    """
    readers = {"pick": ("diwa", "soup"), "refit": ("soup",), "tune_steps": ("soup",)}
    for name, kinds in readers.items():
        if kind not in kinds and getattr(recipe, name) != getattr(Recipe(), name):
            flag = name.removesuffix("_steps")
            raise ConfigError(f"--{flag} is for --kind {' or '.join(kinds)}; leave it out for '{kind}'")


def join(
    members: Sequence[Member], kind: str, recipe: Recipe, exam: Exam | None, warn: Callable[[str], None]
) -> Joined:
    """Return the one network of kind `diwa` or `soup`.

    Args:
        members: finished runs that may answer together (`member.check_alike`).
        kind: `diwa` for float weights, `soup` for weights quantized anew.
        recipe: see there.
        exam: the sources' images; needed by `greedy` and for tuning.
        warn: is told of broken checkpoints.

    Raises:
        ConfigError: members without a common start, buffers that differ, members of a soup with other grids, or a
            recipe that the quantizer cannot follow or that needs images which are not there.
        RunError: a member's checkpoints are gone.
    """
    check_one_start(members)
    config = _soup_config(members, recipe) if kind == "soup" else None
    _check_images(recipe, exam)
    latents = [read_latent(member, warn) for member in members]
    used = list(range(len(members)))
    if recipe.pick == "greedy" and exam is not None:
        used = greedy(_accuracies(members), lambda chosen: _score(_network(members[0], latents, chosen, config), exam))
    if config is not None and recipe.tune_steps and exam is not None:
        network = tune(_mean(latents, used), config, exam, recipe.tune_steps)
    else:
        network = _network(members[0], latents, used, config)
    return Joined(network.eval(), tuple(used))


def _soup_config(members: Sequence[Member], recipe: Recipe) -> Config:
    """Return the configuration of the soup: the first member's, its step sizes starting where the recipe says."""
    first = members[0]
    trees = [member.config.quantizer.model_dump(exclude={"start_step", "init"}) for member in members]
    for member, tree in zip(members, trees, strict=True):
        for key, value in tree.items():
            if value != trees[0][key]:
                text = f"{first.path} and {member.path} differ in quantizer.{key}: {trees[0][key]} and {value}"
                raise ConfigError(f"{text}. A soup has one grid; make members of one, or --kind eoq")
    name = first.config.quantizer.name
    if "calibration_images" in QUANTIZERS[name].reads:
        text = f"quantizer '{name}' finds its codes from images of the finished model, so the mean of weights has none"
        raise ConfigError(f"{text}. Make a soup of members of another quantizer, or --kind eoq")
    if recipe.refit == "mse" and "init" not in QUANTIZERS[name].reads:
        raise ConfigError(f"quantizer '{name}' has one start of its own: add --refit init")
    start = {"init": "mse"} if recipe.refit == "mse" else {}
    return first.config.model_copy(update={"quantizer": first.config.quantizer.model_copy(update=start)})


def _check_images(recipe: Recipe, exam: Exam | None) -> None:
    asked = {"--pick greedy": recipe.pick == "greedy", "--tune": recipe.tune_steps > 0}
    needy = [flag for flag, given in asked.items() if given]
    if needy and exam is None:
        raise ConfigError(f"{needy[0]} needs the images of the source domains: give --data")
    if needy and exam is not None and not exam.has_source:
        text = f"{needy[0]} needs source images that no member was trained on, and there are none"
        raise ConfigError(f"{text}: train the members with one data.trial and without data.train_on_heldout")


def _accuracies(members: Sequence[Member]) -> list[float]:
    return [member.result["source_accuracy"] for member in members]


def _score(network: Network, exam: Exam) -> float:
    place_(network, exam.device).eval()
    accuracy = mean_accuracy(exam.source(lambda images: network(images)[None]), 0)
    assert accuracy is not None  # the exam has source images: `_check_images`
    return accuracy


def _mean(latents: Sequence[Latent], used: Sequence[int]) -> State:
    return average([latents[index].state for index in used], latents[0].buffers)


def _network(member: Member, latents: Sequence[Latent], used: Sequence[int], config: Config | None) -> Network:
    """Return the float network of the mean weights, or, with the configuration of a soup, the quantized one."""
    network = empty_network(member.info)
    network.load_state_dict(_mean(latents, used))
    if config is not None:
        make_quantizer(config.quantizer, network)
        enable_(network, config)
    return network

"""One network from several: the mean of their weights (DiWA, soup), in float or quantized anew and tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor

from qtdog.conversion.attach import Attached
from qtdog.core.config import Config
from qtdog.core.config_io import build_config
from qtdog.core.errors import ConfigError
from qtdog.ensemble.model import Member, check_one_start
from qtdog.ensemble.scoring import EvaluationSet, mean_accuracy
from qtdog.models.network import Network, to_device_
from qtdog.quantizers.registry import QUANTIZERS
from qtdog.training.averagers import snapshot
from qtdog.training.build import build_components, make_quantizer
from qtdog.training.components import LOSS_SCALE, RunState
from qtdog.training.finalize import final_network_
from qtdog.training.load_model import empty_network
from qtdog.training.loop import TrainingRun, train
from qtdog.training.shared_steps import load_plain_

State = dict[str, Tensor]


@dataclass(frozen=True)
class _Weights:
    """Members' weights under the names of the plain network.

    Attributes:
        states: of each member.
        buffers: names of what does not train, such as the statistics of batch norm.
    """

    states: Sequence[State]
    buffers: frozenset[str]

    def mean(self, used: Sequence[int]) -> State:
        return average_weights([self.states[index] for index in used], self.buffers)


def _read_weights(members: Sequence[Member]) -> _Weights:
    buffers = frozenset(name for name, _ in empty_network(members[0].info).named_buffers())
    return _Weights([shipped_weights(member) for member in members], buffers)


def shipped_weights(member: Member) -> State:
    """Return the weights that a member's model file answers with, in float, under the names of the plain network.

    Rounded weights, not those behind the rounding: training has seen the rounded ones alone, and on Office-Caltech the
    mean of what is behind them was 1.1 points worse (docs/results/recipe.md, "One network of several").
    """
    packed = member.packed
    return packed.rest | {name: value.dequantize() for name, value in packed.quantized.items()}


def average_weights(states: Sequence[Mapping[str, Tensor]], buffers: AbstractSet[str] = frozenset()) -> State:
    """Return the mean of the weights, name by name: θ = (1/m) Σ_k θ_k, summed in float64.

    Source: Ramé et al. (NeurIPS 2022), Eq. 1; Wortsman et al., "Model soups" (ICML 2022).

    Args:
        states: of m plain networks, with the same names and shapes.
        buffers: names that do not train; they must be the same in all.

    Raises:
        ConfigError: a buffer differs: statistics of batch norm belong to the weights that they were measured with, and
            their mean to none.

    Example:
        >>> average_weights([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])
        {'w': tensor([2.])}
    """
    first = states[0]
    for name in sorted(buffers & first.keys()):
        if any(not torch.equal(state[name], first[name]) for state in states):
            hint = "average members with frozen batch norm (model.freeze_bn=true)"
            raise ConfigError(f"'{name}' differs between the members, and its mean would fit none of them: {hint}")
    return {
        name: value if name in buffers else _mean([state[name] for state in states]) for name, value in first.items()
    }


def _mean(values: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(values[0], dtype=torch.float64)  # keeps the memory format
    for value in values:
        total += value
    return (total / len(values)).to(values[0].dtype)


def greedy(accuracies: Sequence[float], score: Callable[[Sequence[int]], float]) -> list[int]:
    """Return the members that take part in a greedy average, in the order in which they came in.

    From the best single member on, each further one, by falling accuracy, stays in if the average is then at least as
    accurate as before ("restricted" weight selection: Ramé et al., NeurIPS 2022, section 2.3.2).

    Args:
        accuracies: of each member alone, on the held-out source images.
        score: that of the average of the members at some positions, on the same images.

    Example:
        >>> greedy([0.5, 0.9, 0.8], lambda chosen: 0.7 if 2 in chosen else 0.9)
        [1, 0]
    """
    order = sorted(range(len(accuracies)), key=lambda index: -accuracies[index])
    chosen = order[:1]
    best = score(chosen)
    for index in order[1:]:
        accuracy = score([*chosen, index])
        if accuracy >= best:
            chosen, best = [*chosen, index], accuracy
    return chosen


N_EVALUATIONS = 4


def tune_config(config: Config, steps: int) -> Config:
    """Return the configuration of the short training: the members' own, quantized from the first step, constant rate.

    Example:
        >>> tune_config(Config(), 100).train.eval_every
        25
    """
    changes = {
        "averager": {"name": "none", "params": {}},
        "quantizer": {"start_step": 0},
        "optimizer": {"schedule": "constant", "decay_from": None},
        "train": {"steps": steps, "eval_every": max(1, steps // N_EVALUATIONS), "selection": "source"},
    }
    return build_config([config.model_dump(), changes])


def tune(weights: State, config: Config, evaluation_set: EvaluationSet, steps: int) -> Network:
    """Return the quantized network of `weights` after `steps` updates on the sources, or before if it was better then.

    Kept is the evaluation with the best accuracy on the held-out source images, that before the first update
    included.

    Args:
        weights: of the plain network, in float.
        config: of the members, with the start of the step sizes that is wanted.
        evaluation_set: the images.
        steps: updates.

    Raises:
        ConfigError: the members' objective has weights of its own, or their quantizer has no grid at its start.
        NonFiniteLossError: the loss became NaN.
    """
    config = tune_config(config, steps)
    parts = build_components(config, evaluation_set.dataset)
    if any(not name.startswith(LOSS_SCALE) for name in parts.objective.state_dict()):
        text = f"objective '{config.objective.name}' has weights of its own, which are not averaged"
        raise ConfigError(f"--tune: {text}; leave --tune out")
    load_plain_(parts.network, weights)
    enable_(parts.network, config)
    state = RunState()
    state.add_line(parts.evaluate(0, True, None).to_json())
    state.selected = snapshot(parts.network)
    train(TrainingRun(parts, state))
    final_network_(parts, state)
    return parts.network


def enable_(network: Network, config: Config) -> None:
    """Put the weights of a network with fresh quantizers on grids that fit them, in place.

    Raises:
        ConfigError: the quantizer has no grid right after its start (it freezes weights in stages, or has none).
    """
    quantizers = Attached(network)
    quantizers.enable()
    if not all(quantizer.packs for quantizer in quantizers.layers.values()):
        raise ConfigError(f"weights cannot be put on the grid of quantizer '{config.quantizer.name}' at once: no soup")


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
class AveragedNetwork:
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


def average_members(
    members: Sequence[Member],
    kind: str,
    recipe: Recipe,
    evaluation_set: EvaluationSet | None,
) -> AveragedNetwork:
    """Return the one network of kind `diwa` or `soup`.

    Args:
        members: finished runs that may answer together (`member.check_alike`).
        kind: `diwa` for float weights, `soup` for weights quantized anew.
        recipe: see there.
        evaluation_set: the sources' images; needed by `greedy` and for tuning.

    Raises:
        ConfigError: members without a common start, buffers that differ, members of a soup with other grids, or a
            recipe that the quantizer cannot follow or that needs images which are not there.
    """
    check_one_start(members)
    config = _soup_config(members, recipe) if kind == "soup" else None
    _check_images(recipe, evaluation_set)
    weights = _read_weights(members)
    used = list(range(len(members)))
    if recipe.pick == "greedy" and evaluation_set is not None:
        used = greedy(
            _accuracies(members),
            lambda chosen: _score(_network(members[0], weights.mean(chosen), config), evaluation_set),
        )
    if config is not None and recipe.tune_steps and evaluation_set is not None:
        network = tune(weights.mean(used), config, evaluation_set, recipe.tune_steps)
    else:
        network = _network(members[0], weights.mean(used), config)
    return AveragedNetwork(network.eval(), tuple(used))


def _soup_config(members: Sequence[Member], recipe: Recipe) -> Config:
    """Return the configuration of the soup: the first member's, its step sizes starting where the recipe says."""
    first = members[0]
    trees = [member.config.quantizer.model_dump(exclude={"start_step", "init"}) for member in members]
    for member, tree in zip(members, trees, strict=True):
        for key, value in tree.items():
            if value != trees[0][key]:
                text = f"{first.path} and {member.path} differ in quantizer.{key}: {trees[0][key]} and {value}"
                raise ConfigError(f"{text}. A soup has one grid; make members of one, or --kind eoq")
    if first.config.quantizer.activation_bits:
        raise ConfigError(
            "the grids of activations have no mean that fits the soup's; make members without, or --kind eoq"
        )
    name = first.config.quantizer.name
    if "calibration_images" in QUANTIZERS[name].reads:
        text = f"quantizer '{name}' finds its codes from images of the finished model, so the mean of weights has none"
        raise ConfigError(f"{text}. Make a soup of members of another quantizer, or --kind eoq")
    if recipe.refit == "mse" and "init" not in QUANTIZERS[name].reads:
        raise ConfigError(f"quantizer '{name}' has one start of its own: add --refit init")
    start = {"init": "mse"} if recipe.refit == "mse" else {}
    return first.config.model_copy(update={"quantizer": first.config.quantizer.model_copy(update=start)})


def _check_images(recipe: Recipe, evaluation_set: EvaluationSet | None) -> None:
    asked = {"--pick greedy": recipe.pick == "greedy", "--tune": recipe.tune_steps > 0}
    needy = [flag for flag, given in asked.items() if given]
    if needy and evaluation_set is None:
        raise ConfigError(f"{needy[0]} needs the images of the source domains: give --data")
    if needy and evaluation_set is not None and not evaluation_set.has_source:
        text = f"{needy[0]} needs source images that no member was trained on, and there are none"
        raise ConfigError(f"{text}: train the members with one data.trial and without data.train_on_heldout")


def _accuracies(members: Sequence[Member]) -> list[float]:
    return [member.result["source_accuracy"] for member in members]


def _score(network: Network, evaluation_set: EvaluationSet) -> float:
    to_device_(network, evaluation_set.device).eval()
    accuracy = mean_accuracy(evaluation_set.source(lambda images: network(images)[None]), 0)
    assert accuracy is not None  # the evaluation set has source images: `_check_images`
    return accuracy


def _network(member: Member, mean: State, config: Config | None) -> Network:
    """Return the float network of the mean weights, or, with the configuration of a soup, the quantized one."""
    network = empty_network(member.info)
    network.load_state_dict(mean)
    if config is not None:
        make_quantizer(config.quantizer, network)
        enable_(network, config)
    return network

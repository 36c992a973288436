"""A short training of averaged weights on the source domains, with the machinery of a run."""

from __future__ import annotations

from qtdog.conversion.attach import Attached
from qtdog.core.config import Config
from qtdog.core.config_io import build_config
from qtdog.core.errors import ConfigError
from qtdog.ensemble.average import State
from qtdog.ensemble.exam import Exam
from qtdog.models.network import Network
from qtdog.training.averagers import snapshot
from qtdog.training.build import compose, make_accelerator
from qtdog.training.components import RunState
from qtdog.training.finalize import final_network_
from qtdog.training.loop import Doors, Track, train
from qtdog.training.resume import load_plain_
from qtdog.training.run import Silent

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


def tune(weights: State, config: Config, exam: Exam, steps: int) -> Network:
    """Return the quantized network of `weights` after `steps` updates on the sources, or before if it was better then.

    What ships is the evaluation with the best accuracy on the held-out source images, that before the first update
    included.

    Args:
        weights: of the plain network, in float.
        config: of the members, with the start of the step sizes that is wanted.
        exam: the images.
        steps: updates.

    Raises:
        ConfigError: the members' objective has weights of its own, or their quantizer has no grid at its start.
        NonFiniteLossError: the loss became NaN.
    """
    config = tune_config(config, steps)
    parts = compose(config, exam.dataset, exam.problem, make_accelerator(config))
    if parts.objective.state_dict():
        text = f"objective '{config.objective.name}' has weights of its own, which are not averaged"
        raise ConfigError(f"--tune: {text}; leave --tune out")
    load_plain_(parts.network, weights)
    enable_(parts.network, config)
    state = RunState()
    state.add_line(parts.evaluate(0, True, None, lambda: None).to_json())
    state.selected = snapshot(parts.network)
    ignore = Doors(save=lambda state: None, keep_line=lambda line: None, check=lambda: None, watcher=Silent())
    train(Track(parts, state, ignore))
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

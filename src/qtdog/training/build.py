"""From names to objects: the one place where a configuration becomes the objects of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState

from qtdog.conversion.attach import Attached, attach, input_layers
from qtdog.core.config import Config, ObjectiveConfig, OptimizerConfig, QuantizerConfig
from qtdog.core.errors import ConfigError
from qtdog.core.progress import Progress
from qtdog.data.augment_policies import POLICIES
from qtdog.data.dataset import DomainDataset
from qtdog.data.loader import TrainBatches, batch_sizes
from qtdog.data.original_cache import OriginalCache, open_originals
from qtdog.models.backbones import check_backbone, create_network, preprocessing
from qtdog.models.feature_layers import FEATURE_LAYERS, find_stages
from qtdog.models.network import Network, to_device_
from qtdog.objectives.base import N_VIEWS, OBJECTIVES, Objective, ObjectiveSetting
from qtdog.objectives.wrappers import BatchTeacher, Distill, FeatureDistill, Teacher
from qtdog.quantizers.activations import quantize_inputs_
from qtdog.quantizers.base import OPTION_NAMES
from qtdog.quantizers.registry import QUANTIZERS
from qtdog.training import swad  # noqa: F401  (registers its averager)
from qtdog.training.averagers import AVERAGERS, make_averager  # noqa: F401  (found here with all its members)
from qtdog.training.components import LOSS_SCALE, Components, Trainable
from qtdog.training.evaluation import EvaluationInputs, Evaluator
from qtdog.training.load_model import read_any_weights
from qtdog.training.loss_scale import LossScale
from qtdog.training.protocol import DomainProtocol, check_input, make_protocol, open_inputs, run_labels
from qtdog.training.step_rules import STEP_RULES


def make_accelerator(config: Config) -> Accelerator:
    """Return the device handling of this run: one CPU or GPU, or one of several processes under `accelerate launch`."""
    # A process may run several configurations; accelerate would refuse a second one of another precision.
    AcceleratorState._reset_state()
    # Step sizes take part only from the start step on; until then they have no gradient to wait for.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    precision = config.train.precision
    # torch would round the inputs of convolutions, and of nothing else, to 10 bits of mantissa without a word
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = config.train.cudnn == "benchmark"
    torch.backends.cudnn.deterministic = config.train.cudnn == "deterministic"
    # Several processes on a machine without a GPU would each train alone, did nobody say that they are meant to meet.
    cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    return Accelerator(cpu=cpu, mixed_precision="bf16" if precision == "bf16" else "no", kwargs_handlers=[unused])


def build_components(
    config: Config,
    dataset: DomainDataset,
    accelerator: Accelerator | None = None,
    progress: Progress = None,
    *,
    teacher: Teacher | None = None,
) -> Components:
    """Return the objects that `config` names, on the device, ready for `training.loop.train`.

    Args:
        config: the effective configuration (`training.protocol.resolve`).
        dataset: the data it names.
        accelerator: device and processes; default `make_accelerator(config)`.
        progress: of decoding images.
        teacher: images → logits, if the configuration names one.

    Raises:
        ConfigError: an unknown name on one of the axes, with the nearest match, names that do not go together, or a
            configuration with a teacher and none given, or the other way round.
        ModelError: an unknown backbone, one without the stages that a method needs, or weights that cannot be had or do
            not fit.
        DataError: an image cannot be decoded.
    """
    accelerator = accelerator or make_accelerator(config)
    protocol = make_protocol(config, dataset)
    make_objective, make_step_rule = OBJECTIVES[config.objective.name], STEP_RULES[config.step_rule.name]
    averager = make_averager(config)
    step_rule = make_step_rule(config.step_rule.params)
    _check_feature_layer(config)
    if config.train.precision == "fp16" and make_objective.OWN_GRADIENTS:
        raise ConfigError(
            f"objective '{config.objective.name}' takes gradients through the network itself, which float16 would "
            "flush to zero: take train.precision=bf16 or fp32"
        )
    check_input(config, dataset)
    check_backbone(config.model.backbone)
    if config.quantizer.name != "none":
        _ = QUANTIZERS[config.quantizer.name]  # refuses an unknown name
    # Images before weights: a broken one is an error before anything is fetched.
    with accelerator.main_process_first():
        data = config.data
        cache = open_inputs(
            dataset, config.model.backbone, image_size=data.image_size, max_tokens=data.max_tokens, progress=progress
        )
        crops_originals = data.crop == "original" and data.augment in ("domainbed", *POLICIES)
        originals = open_originals(dataset, data.image_size, progress=progress) if crops_originals else None
    # The device first: the optimizer must hold the parameters that train.
    network = to_device_(_network(config, dataset), accelerator.device)
    setting = _setting(config, protocol, network, accelerator.num_processes, dataset.card.channels)
    objective = make_objective(setting, config.objective.params)
    if config.objective.label_smoothing:
        from qtdog.objectives.wrappers import LabelSmoothing

        objective = LabelSmoothing(objective, config.objective.label_smoothing)
    if config.objective.consistency:
        from qtdog.objectives.wrappers import Consistency

        _check_consistency(config)
        objective = Consistency(objective, config.objective.consistency)
    objective = with_teacher(objective, config.objective, teacher, setting).to(accelerator.device)
    _check_accumulation(config, objective, setting)
    quantizer = make_quantizer(config.quantizer, network)
    if quantizer is not None and config.quantizer.activation_bits:
        _quantize_activations_(config.quantizer, quantizer, accelerator.num_processes)
    _check_compilation(config, objective, quantizer, accelerator)
    optimizer = make_optimizer(config.optimizer, network, quantizer, objective)
    use_float16 = config.train.precision == "fp16"
    if use_float16:
        objective.add_module(LOSS_SCALE, LossScale().to(accelerator.device))
    model, prepared = accelerator.prepare(Trainable(network, config.train.compile, use_float16=use_float16), optimizer)
    mean, std = preprocessing(config.model.backbone, channels=dataset.card.channels)
    labels = run_labels(config, protocol, dataset)
    inputs = EvaluationInputs(cache, labels.evaluation, mean, std)
    return Components(
        config=config,
        accelerator=accelerator,
        network=network,
        model=model,
        optimizer=prepared,
        quantizer=quantizer,
        batches=_batches(config, protocol, inputs, labels.training, accelerator, originals),
        objective=objective,
        step_rule=step_rule,
        averager=averager,
        base_lrs=tuple(group["lr"] for group in optimizer.param_groups),
        dataset=dataset,
        protocol=protocol,
        inputs=inputs,
        evaluate=Evaluator(network, accelerator, inputs, protocol, config.data.test_mode),
    )


def _network(config: Config, dataset: DomainDataset) -> Network:
    return create_network(
        config.model.backbone,
        n_classes=len(dataset.classes),
        channels=dataset.card.channels,
        image_size=config.data.image_size,
        weights=config.model.weights,
        freeze_bn=config.model.freeze_bn,
        seed=config.init_seed,
        feature_layer=config.model.feature_layer,
        feature_params=config.model.feature_params,
        head=config.model.head,
        class_names=dataset.classes,
        read_weights=read_any_weights,
    )


def _check_accumulation(config: Config, objective: Objective, setting: ObjectiveSetting) -> None:
    n_parts, name = config.train.accumulate, config.objective.name
    if n_parts == 1:
        return
    if not objective.accumulates:
        raise ConfigError(
            f"objective '{name}' runs the network itself on the whole batch, so train.accumulate cannot cut it. Take a "
            "smaller data.batch_size, or another objective, such as erm"
        )
    if objective.accumulates == "outputs" and setting.n_processes > 1:
        raise ConfigError(
            f"objective '{name}' looks at the whole batch, and then train.accumulate works in one process: leave it "
            "out, since several processes share the batch already"
        )
    if setting.batch_size < n_parts * setting.n_processes:
        raise ConfigError(
            f"train.accumulate={n_parts} cuts the images of each domain in a process, and some have fewer: the "
            f"smallest share of a batch is {setting.batch_size} images over {setting.n_processes} processes"
        )


def _check_compilation(
    config: Config, objective: Objective, attached: Attached | None, accelerator: Accelerator
) -> None:
    backend, quantizer = config.train.compile, config.quantizer
    if backend == "off":
        return
    missing = compiler_missing(accelerator.device) if backend == "inductor" else ""
    layers = [] if attached is None else list(attached.layers.values())
    reasons = {
        "it works in one process": accelerator.num_processes > 1,
        f"objective '{config.objective.name}' with train.accumulate computes its passes twice": (
            config.train.accumulate > 1 and objective.accumulates == "outputs"
        ),
        f"feature layer '{config.model.feature_layer}' draws numbers": (
            not FEATURE_LAYERS[config.model.feature_layer].COMPILES
        ),
        f"quantizer '{quantizer.name}' draws numbers": not all(layer.COMPILES for layer in layers),
        "quantizer.rounding=stochastic draws numbers": quantizer.rounding == "stochastic",
        "activations are rounded by grids that begin in the pass": bool(quantizer.activation_bits),
        missing: bool(missing),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"train.compile={backend} cannot be used: {reason}. Leave it out")


def compiler_missing(device: torch.device, which: Callable[[str], str | None] = shutil.which) -> str:
    """Return what torch.compile's own backend lacks to compile for a device, or "" if nothing.

    Args:
        device: of the run.
        which: finds a program.

    Example:
        >>> compiler_missing(torch.device("cpu"), which=lambda name: None)
        'there is no C++ compiler (g++ or clang++)'
    """
    if device.type == "cpu":
        found = any(which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
        return "" if found else "there is no C++ compiler (g++ or clang++)"
    return "" if find_spec("triton") else "triton is not installed"


def _check_consistency(config: Config) -> None:
    if config.data.augment != "augmix":
        raise ConfigError("objective.consistency compares views of AugMix: set data.augment=augmix, or leave it out")


def _check_feature_layer(config: Config) -> None:
    name, objective = config.model.feature_layer, config.objective.name
    fitting = FEATURE_LAYERS[name].OBJECTIVES
    if fitting and objective not in fitting:
        text = f"feature layer '{name}' makes no sense with objective '{objective}': it is for {', '.join(fitting)}"
        raise ConfigError(f"{text}. Add --objective {fitting[0]}, or take another feature layer.")


def with_teacher(
    objective: Objective, config: ObjectiveConfig, teacher: Teacher | None, setting: ObjectiveSetting
) -> Objective:
    """Return the objective with the distillation from a teacher, if the configuration names one.

    Raises:
        ConfigError: it names a teacher and none is given, or the other way round.
    """
    if (teacher is None) == bool(config.teacher_sha256):
        raise ConfigError(
            "this run learns from a teacher, and none was given: train it with qtdog distill or qtdog train"
        )
    if teacher is None:
        return objective
    if config.teacher_mode != "logits":
        if not isinstance(teacher, BatchTeacher):
            raise ConfigError(f"objective.teacher_mode={config.teacher_mode} needs a teacher with features: a backbone")
        return FeatureDistill(
            objective, teacher, weight=config.teacher_weight, kind=config.teacher_mode, setting=setting
        )
    return Distill(objective, teacher, weight=config.teacher_weight, temperature=config.teacher_temperature)


def _setting(
    config: Config, protocol: DomainProtocol, network: Network, n_processes: int, channels: int
) -> ObjectiveSetting:
    sizes = batch_sizes(protocol.sources, config.data.batch_size, config.data.focus)
    return ObjectiveSetting(
        n_domains=len(protocol.sources),
        n_classes=network.classifier.out_features,
        n_features=network.classifier.in_features,
        batch_size=min(sizes),
        network=network,
        n_processes=n_processes,
        seed=config.init_seed,
        stages=partial(find_stages, network, (channels, config.data.image_size, config.data.image_size)),
        equal_shares=len(set(sizes)) == 1,
    )


def make_quantizer(config: QuantizerConfig, network: Network) -> Attached | None:
    """Attach the quantizers that a configuration names, not yet enabled; None for a float run.

    Raises:
        ConfigError: as in `conversion.attach.attach`.
    """
    if config.name == "none":
        return None
    return attach(
        network,
        quantizer=config.name,
        bits=config.bits,
        layer_bits=config.layer_bits,
        granularity=config.granularity,
        include=config.include,
        exclude=config.exclude,
        **{name: getattr(config, name) for name in OPTION_NAMES},
    )


def _quantize_activations_(config: QuantizerConfig, quantizer: Attached, n_processes: int) -> None:
    """Let the convolutions and linear layers with a quantized weight round their inputs too.

    Raises:
        ConfigError: several processes, each of which would begin its grids with images of its own.
    """
    if n_processes > 1:
        raise ConfigError("quantizer.activation_bits works in one process: grids begin with the images of a batch")
    for module in input_layers(quantizer.model).values():
        quantize_inputs_(module, config.activation_bits, config.activation_range)


IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def make_optimizer(
    config: OptimizerConfig, network: Network, quantizer: Attached | None, objective: Objective
) -> torch.optim.Optimizer:
    """Return the optimizer over all parameters; step sizes are a group of their own, without decay."""
    if quantizer is None:
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [{"params": parameters, "lr": config.lr, "weight_decay": config.weight_decay}]
    else:
        groups = quantizer.param_groups(config.lr, weight_decay=config.weight_decay, step_size_lr=config.step_size_lr)
    own = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if own:
        groups.append({"params": own, "lr": config.lr * objective.lr_factor, "weight_decay": config.weight_decay})
    code = IMPLEMENTATIONS[config.implementation]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, **code)
    if config.momentum:
        raise ConfigError("optimizer.momentum is for sgd; Adam has its own (leave it out or set optimizer.name=sgd)")
    return torch.optim.Adam(groups, lr=config.lr, **code)


def _batches(
    config: Config,
    protocol: DomainProtocol,
    inputs: EvaluationInputs,
    class_index: npt.NDArray[np.integer],
    accelerator: Accelerator,
    originals: OriginalCache | None,
) -> TrainBatches:
    return TrainBatches(
        inputs.cache,
        class_index,
        protocol.train_pools(),
        batch_size=config.data.batch_size,
        seed=config.train.seed,
        augment=config.data.augment,
        augment_params=config.data.augment_params,
        n_views=N_VIEWS if config.objective.consistency else 0,
        mean=inputs.mean,
        std=inputs.std,
        workers=config.data.workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        focus=config.data.focus,
        class_weights=config.data.class_weights,
        originals=originals,
        device=accelerator.device,
    )

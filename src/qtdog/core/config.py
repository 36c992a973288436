"""The configuration tree of one run: frozen, validated, with one canonical hash.

Every section is an axis or a stage; every value has the default of the published protocol (DomainBed as SWAD and QT-DoG
use it). Names of axis members (objective, quantizer, …) are checked where names become objects, in `training/run.py`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MIN_BITS, MAX_BITS = 2, 8  # per weight
HASH_VERSION = 1
# Quantizers that work after training, on the chosen float checkpoint: such a run trains in float to the end.
AFTER_TRAINING = ("gptq", "obc", "rtn")
START_FRAC = 0.4  # of the steps, before quantization starts (paper: 2,000 of 5,000)
Params = dict[str, bool | int | float | str]
# Where the data lies and how many threads read it change no result: runs on two machines have one name.
NOT_HASHED = {"data": {"source", "workers", "skip_unreadable"}, "objective": {"teacher"}, "plugins": {"files"}}


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, numbers accepted where a name is meant (`target: 75`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, validate_default=True)


class DataConfig(Section):
    """Which images, which domain is unseen, how they are split and batched."""

    source: str = Field(
        default="rotated-digits", description="data set name, folder ROOT/DOMAIN/CLASS/image, or .csv/.jsonl[:COLUMN]"
    )
    content: str = Field(default="", description="sha256 of the data set's content; filled in by the run")
    target: str = Field(default="none", description="the unseen domain; 'none' trains on every domain")
    trial: int = Field(default=0, ge=0, description="which random 20 % of each domain is the validation split")
    holdout_frac: float = Field(
        default=0.2, gt=0, lt=0.5, description="share of each source domain that is the validation split"
    )
    train_on_heldout: bool = Field(
        default=False, description="train on the validation images too, for a run whose length is settled"
    )
    test_mode: Literal["target", "in-domain"] = Field(
        default="target", description="'in-domain' splits the sources 60/20/20 and reports on the last 20 %"
    )
    image_size: int = Field(
        default=224, ge=8, le=1024, description="pixels; images are resized, never cropped, to a square"
    )
    max_tokens: int = Field(default=512, ge=4, le=512, description="tokens of a text; longer ones are cut")
    augment: str = Field(default="domainbed", description="training augmentation: a name of 'qtdog list augmentations'")
    augment_params: Params = Field(default={}, description="of the augmentation, like {n_ops: 2, magnitude: 9}")
    crop: Literal["cached", "original"] = Field(
        default="cached",
        description="what crops are cut from: the cached square, or the image at its own aspect",
    )
    batch_size: int = Field(default=32, ge=1, le=4096, description="images per source domain per step")
    focus: str = Field(
        default="",
        description="source domain that gets half of each batch, as in a branch of DART; '' for equal shares",
    )
    class_weights: Literal["none", "sqrt", "balanced"] = Field(
        default="none",
        description="how often a class is drawn within its domain: as often as it is there, all alike, or half-way",
    )
    label_noise: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of each source's training labels that are made wrong, for a study; which ones depends "
        "on data.trial alone",
    )
    label_noise_validation: bool = Field(
        default=False, description="make that share of the validation labels wrong too; those of the target never are"
    )
    skip_unreadable: bool = Field(default=False, description="leave out images that cannot be read, and record which")
    allow_missing_classes: bool = Field(default=False, description="accept a domain that lacks a class")
    workers: int = Field(default=1, ge=0, le=64, description="threads that prepare the next batches")


class ModelConfig(Section):
    """The backbone and where its weights come from."""

    backbone: str = Field(
        default="resnet50.tv_in1k", description="any timm model, or one of 'qtdog list backbones', for text too"
    )
    weights: str = Field(
        default="imagenet",
        description="'imagenet' for those that the backbone's name means, 'package' for a package's, 'none', or a "
        ".safetensors/.pth file",
    )
    weights_sha256: str = Field(default="", description="of the weights' file; filled in by the run")
    head: Literal["linear", "text"] = Field(
        default="linear", description="the classifier starts at random, or ('text', CLIP only) at the classes' names"
    )
    freeze_bn: bool = Field(default=True, description="keep batch-norm statistics as they were pretrained")
    feature_layer: str = Field(default="none", description="a name of 'qtdog list feature-layers'")
    feature_params: Params = Field(default={}, description="hyper-parameters of the feature layer, like {p: 0.5}")
    init_seed: int | None = Field(
        default=None, ge=0, description="seed of the random start; default train.seed. Models to average share it"
    )


class ObjectiveConfig(Section):
    """The loss of one step."""

    name: str = Field(default="erm", description="a name of 'qtdog list objectives'")
    params: Params = Field(default={}, description="hyper-parameters of the objective, like {weight: 1.0}")
    consistency: float = Field(
        default=0.0, ge=0, description="weight of AugMix's consistency of an image and two views of it (paper: 12)"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of a label that is spread evenly over all classes"
    )
    teacher: str = Field(
        default="", description="model file, or backbone, whose answers are learned too; see 'qtdog distill'"
    )
    teacher_sha256: str = Field(default="", description="of the teacher's file; filled in by the run")
    teacher_mode: Literal["logits", "cosine", "l2"] = Field(
        default="logits",
        description="what a backbone teaches: logits of a head fitted on the sources, or features by a distance",
    )
    teacher_view: Literal["same", "clean"] = Field(
        default="same",
        description="a backbone sees what the student sees, or each clean image once (kept in the cache)",
    )
    teacher_image_size: int = Field(default=0, ge=0, le=1024, description="pixels; 0 for those it was made for")
    teacher_weights: str = Field(default="imagenet", description="of a backbone as teacher, as model.weights")
    teacher_weight: float = Field(
        default=0.9, ge=0, le=1, description="weight of the teacher's answers; the objective has the rest"
    )
    teacher_temperature: float = Field(default=2.0, gt=0, le=100, description="softens teacher and student alike")


class StepRuleConfig(Section):
    """How the loss becomes an update."""

    name: str = Field(default="plain", description="a name of 'qtdog list step-rules'")
    params: Params = Field(default={}, description="hyper-parameters of the step rule, like {rho: 0.05}")


class AveragerConfig(Section):
    """Which weights are kept."""

    name: str = Field(default="none", description="a name of 'qtdog list averagers'")
    params: Params = Field(default={}, description="hyper-parameters of the averager, like {start: 100}")


class QuantizerConfig(Section):
    """The grid the weights live on, and from which step."""

    name: str = Field(default="lsq", description="a name of 'qtdog list quantizers'; 'none' for a float model")
    bits: int = Field(default=7, ge=MIN_BITS, le=MAX_BITS, description="bits per weight")
    layer_bits: dict[str, int] = Field(
        default={},
        description="bits of the layers that a glob pattern or a kind (depthwise, pointwise) means, like "
        "{'*.blocks.0': 8}; later ones win",
    )
    activation_bits: int = Field(
        default=0,
        ge=0,
        le=MAX_BITS,
        description="bits of the inputs of quantized layers, rounded in training; 0: float",
    )
    activation_range: Literal["learned", "moving"] = Field(
        default="learned", description="their step size is learned, or follows the largest values"
    )
    start_step: int | None = Field(default=None, ge=0, description="first quantized step; default: by start_frac")
    start_frac: float = Field(
        default=START_FRAC, gt=0, lt=1, description="where start_step is not given, as a share of the steps"
    )
    start_from: Literal["weights", "average"] = Field(
        default="weights",
        description="what quantization begins with: the weights, or the averager's average of the float steps",
    )
    granularity: Literal["channel", "layer"] = Field(
        default="channel", description="one step size per output channel or layer"
    )
    range: Literal["asymmetric", "symmetric"] = Field(
        default="asymmetric", description="codes -2^(b-1) … 2^(b-1)-1 as the paper has them, or without the lowest one"
    )
    init: Literal["lsq", "lsq_plus", "minmax", "mse"] = Field(
        default="lsq", description="where the step sizes start, and with that how strong the rounding is"
    )
    step_mode: Literal["log", "raw", "frozen"] = Field(
        default="log", description="how the step size is learned: on a log scale, as it is (raw LSQ), or not at all"
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest", description="of training; what is measured and saved is always rounded to nearest"
    )
    amplitude: float = Field(default=5e-5, gt=0, description="a of the noise U(-a, a) that noise-* adds to a weight")
    noise_width: float = Field(
        default=1.0, gt=0, description="of the noise of noise-matched and noise-then-round, in step sizes of their grid"
    )
    stages: tuple[float, ...] = Field(
        default=(0.5, 0.75, 0.875, 1.0), description="share of the weights that inq has frozen after each stage"
    )
    calibration_images: int = Field(
        default=1000, ge=1, description="training images of the sources from which obc and gptq learn"
    )
    damping: float = Field(
        default=0.01, gt=0, description="added to the Hessians of obc and gptq, as a share of the mean diagonal"
    )
    include: tuple[str, ...] = Field(default=(), description="glob patterns of layer names, or kinds; empty: all")
    exclude: tuple[str, ...] = Field(
        default=("classifier",), description="glob patterns of layer names, or kinds, left in float"
    )


class OptimizerConfig(Section):
    """The optimizer; the published protocol is plain Adam without decay or schedule."""

    name: Literal["adam", "sgd"] = Field(default="adam", description="adam or sgd")
    lr: float = Field(default=5e-5, gt=0, lt=10, description="learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="of the weights; step sizes never decay")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="of sgd")
    implementation: Literal["auto", "loop", "foreach", "fused"] = Field(
        default="auto",
        description="torch's code for an update: its own choice (foreach on a GPU, a loop on the CPU), a loop over the "
        "parameters, lists of them, or one kernel, which is the fastest and rounds differently",
    )
    step_size_lr: float = Field(default=1.0, gt=0, description="learning rate of the step sizes, as a multiple of lr")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="how lr falls to zero at the end of the run; the protocol's is constant"
    )
    decay_from: int | None = Field(
        default=None,
        ge=0,
        description="first step of the fall; default: where quantization starts, or 40 %",
    )


class TrainConfig(Section):
    """Length, validation, seeds and precision."""

    steps: int = Field(default=5000, ge=1, description="number of updates")
    eval_every: int = Field(default=300, ge=1, description="steps between evaluations")
    checkpoint_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints; default eval_every"
    )
    seed: int = Field(default=0, ge=0, description="of initialization, batches and augmentation; it changes no split")
    selection: Literal["source", "last", "oracle"] = Field(
        default="source",
        description="which checkpoint is saved: best source validation, the last, or best on the target",
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        default="fp32",
        description="of the arithmetic: float32 (torch's own default rounds the inputs of convolutions on GPUs), "
        "products in TensorFloat-32, autocast to bfloat16, or to float16 with a scale of the loss (for GPUs without "
        "bfloat16)",
    )
    cudnn: Literal["heuristic", "benchmark", "deterministic"] = Field(
        default="heuristic",
        description="how cuDNN picks a convolution on a GPU: by its heuristic, the fastest of a trial, or only among "
        "those that give the same bits each time",
    )
    compile: Literal["off", "inductor", "aot_eager"] = Field(
        default="off",
        description="compile the training pass with torch.compile: 'inductor' for speed, 'aot_eager' to try it without "
        "a compiler; results differ by rounding",
    )
    accumulate: int = Field(
        default=1, ge=1, description="parts of a batch that are computed one after another, for less memory"
    )
    probe_steps: int = Field(default=0, ge=0, description="first steps, in which the classifier alone trains")
    abstain: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share of the validation images that the stored threshold does not answer",
    )


class PluginsConfig(Section):
    """The plug-ins that a run was made with; filled in by the run, and never a reason to run one."""

    files: tuple[str, ...] = Field(default=(), description="where each came from; filled in by the run")
    sha256: tuple[str, ...] = Field(default=(), description="of each one's text; filled in by the run")

    @model_validator(mode="after")
    def _one_hash_each(self) -> PluginsConfig:
        if len(self.files) != len(self.sha256):
            raise ValueError("plugins.files and plugins.sha256 belong together; name a plug-in with --plugin FILE.py")
        return self


class Config(Section):
    """The whole configuration of one run.

    Example:
        >>> config = Config.make("lsq-sma", bits=4, steps=1000)
        >>> config.quantizer.bits, config.averager.name, config.optimizer.lr
        (4, 'sma', 5e-05)
    """

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    step_rule: StepRuleConfig = StepRuleConfig()
    averager: AveragerConfig = AveragerConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    plugins: PluginsConfig = PluginsConfig()

    @classmethod
    def make(cls, *presets: str, **options: Any) -> Config:
        """Return the configuration of some presets (later ones win) with options on top.

        Args:
            presets: names (`qtdog list presets`) or YAML files.
            options: by name, as `qtdog.train` takes them: `steps=1000`, `quantizer="lsq"`, `train={"eval_every": 50}`.

        Raises:
            ConfigError: a name that there is not, with the nearest one, or a value out of range.
        """
        from qtdog.core.config_io import build_config, load_preset, option_tree

        return build_config([*(load_preset(name) for name in presets), option_tree(options)])

    @classmethod
    def read(cls, path: str | Path) -> Config:
        """Return the configuration in a YAML file, or that of a run folder (ConfigError if there is none)."""
        from qtdog.core.config_io import build_config, load_preset

        path = Path(path)
        return build_config([load_preset(str(path / "config.yaml" if path.is_dir() else path))])

    def save(self, path: str | Path) -> None:
        """Write the configuration as YAML, every value spelled out; `--preset FILE.yaml` and `read` take it."""
        from qtdog.core.config_io import to_yaml
        from qtdog.core.files import write_atomic

        write_atomic(Path(path), to_yaml(self))

    @model_validator(mode="after")
    def _start_lies_inside_the_run(self) -> Config:
        start = self.quantizer.start_step
        if self.quantizer.name != "none" and start is not None and start >= self.train.steps:
            raise ValueError(
                f"quantizer.start_step {start} is not before train.steps {self.train.steps}: nothing would be quantized"
            )
        return self

    @model_validator(mode="after")
    def _activations_can_be_rounded(self) -> Config:
        bits, name = self.quantizer.activation_bits, self.quantizer.name
        if bits == 1:
            raise ValueError(f"quantizer.activation_bits must be 0 (float) or {MIN_BITS} to {MAX_BITS}, not 1")
        if bits and name in AFTER_TRAINING:
            raise ValueError(f"quantizer '{name}' works after training and rounds no activations; take lsq, or 0 bits")
        return self

    @model_validator(mode="after")
    def _batch_can_be_cut(self) -> Config:
        parts = self.train.accumulate
        if parts > self.data.batch_size:
            raise ValueError(
                f"train.accumulate cuts the images of a domain into {parts} parts, and data.batch_size is "
                f"{self.data.batch_size}: take at most as many parts"
            )
        if parts > 1 and self.quantizer.activation_bits:
            raise ValueError(
                "train.accumulate and quantizer.activation_bits do not go together: the grids of activations move with "
                "the whole batch. Leave one out"
            )
        return self

    @model_validator(mode="after")
    def _every_stage_has_a_step(self) -> Config:
        start, n_stages = self.start_step, len(self.quantizer.stages)
        if self.quantizer.name == "inq" and start is not None and self.train.steps - start < n_stages:
            raise ValueError(
                f"quantizer.stages has {n_stages} stages, but only {self.train.steps - start} of train.steps "
                f"{self.train.steps} are quantized: some weights would stay in float. Train longer, start earlier, "
                "or give fewer stages"
            )
        return self

    @model_validator(mode="after")
    def _selection_has_images(self) -> Config:
        if self.data.train_on_heldout and self.train.selection == "source":
            raise ValueError(
                "data.train_on_heldout leaves no images to choose a checkpoint by: set train.selection=last, and "
                "train.steps to the step that a run without it chose"
            )
        return self

    @model_validator(mode="after")
    def _noise_has_labels(self) -> Config:
        if self.data.label_noise_validation and not self.data.label_noise:
            raise ValueError("data.label_noise_validation says where data.label_noise acts, and that is 0: set both")
        return self

    @model_validator(mode="after")
    def _oracle_has_a_target(self) -> Config:
        if self.train.selection == "oracle" and self.data.target == "none" and self.data.test_mode == "target":
            raise ValueError(
                "train.selection=oracle chooses by the accuracy on the target, and data.target is 'none': name a "
                "target, or take source or last"
            )
        return self

    @property
    def init_seed(self) -> int:
        """The seed of the random start (the classifier's, and the backbone's without pretraining)."""
        return self.train.seed if self.model.init_seed is None else self.model.init_seed

    @property
    def start_step(self) -> int | None:
        """The first quantized step (paper: 2,000 of 5,000), or None for a run that trains in float to the end."""
        if self.quantizer.name in ("none", *AFTER_TRAINING):
            return None
        given = self.quantizer.start_step
        return int(self.quantizer.start_frac * self.train.steps) if given is None else given

    @property
    def decay_from(self) -> int:
        """The first step at which the learning rate falls: given, or the start step, or where that would be."""
        if self.optimizer.decay_from is not None:
            return self.optimizer.decay_from
        return int(START_FRAC * self.train.steps) if self.start_step is None else self.start_step


def config_hash(config: Config) -> str:
    """Return the canonical hash of a configuration: 12 hex digits, the name of its run folder.

    Values at their defaults do not count, so that a new option with a default renames no old run; neither do values
    that change no result (`data.source`, `data.workers`; `data.content` stands for the data, and `weights_sha256` for
    weights in a file).
    """
    tree = config.model_dump(mode="json", exclude_defaults=True)
    for section, keys in NOT_HASHED.items():
        tree[section] = {key: value for key, value in tree.get(section, {}).items() if key not in keys}
    if config.data.augment != "domainbed":
        tree["data"].pop("crop", None)  # nothing is cropped
    if config.model.weights_sha256:
        tree["model"].pop("weights", None)  # the content of the file stands for it
    if config.quantizer.name == "none":
        tree["quantizer"] = {"name": "none"}  # a float run has no bits: `--quantizer none --bits 4` is the same run
    if config.quantizer.name in AFTER_TRAINING:
        for key in ("start_step", "start_frac", "start_from"):
            tree["quantizer"].pop(key, None)  # such a run has no start step
    tree = {name: section for name, section in tree.items() if section}
    text = json.dumps([HASH_VERSION, tree], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]

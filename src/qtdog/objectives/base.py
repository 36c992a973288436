"""What an objective is: the loss of one step over per-domain outputs; it knows nothing of optimizer, device or loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from qtdog.core.errors import ConfigError
from qtdog.core.feature_maps import Stage
from qtdog.core.registry import HyperParameters, Registry, Value, fill

N_VIEWS = 2
"""Augmented views beside the clean image where an objective compares them, as AugMix published it."""


@dataclass(frozen=True)
class DomainOutputs:
    """What the network said about the images of one source domain in a batch, or in a process's share of it.

    Attributes:
        features: penultimate features, shape (n, d).
        logits: class scores before softmax, shape (n, n_classes).
        labels: class indices, int64, shape (n,).
    """

    features: Tensor
    logits: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DomainBatch:
    """The images of one step, domain after domain, on the device.

    Attributes:
        images: normalized, shape (n, C, H, W).
        labels: int64, shape (n,).
        sizes: images per domain; they add up to n.
        step: updates made before this one.
        views: augmented versions of the images, each of their shape; () if nothing asked for them.
        indices: int64 (n,), which images of the data set these are; None where nobody knows.
    """

    images: Tensor
    labels: Tensor
    sizes: tuple[int, ...]
    step: int = 0
    views: tuple[Tensor, ...] = ()
    indices: Tensor | None = None

    def split(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of each domain."""
        return zip(self.images.split(self.sizes), self.labels.split(self.sizes), strict=True)

    def parts(self, n: int) -> Iterator[tuple[float, DomainBatch]]:
        """Yield `n` batches that together are this one, with every domain in each, and their shares of the images.

        Args:
            n: at most the images of the smallest domain.

        Example:
            >>> batch = DomainBatch(torch.zeros(5, 1, 2, 2), torch.tensor([0, 1, 2, 3, 4]), (3, 2))
            >>> [(share, part.labels.tolist(), part.sizes) for share, part in batch.parts(2)]
            [(0.6, [0, 2, 3], (2, 1)), (0.4, [1, 4], (1, 1))]
        """
        for index in range(n):
            part = DomainBatch(
                images=self._every(n, index, self.images),
                labels=self._every(n, index, self.labels),
                sizes=tuple(len(range(index, size, n)) for size in self.sizes),
                step=self.step,
                views=tuple(self._every(n, index, view) for view in self.views),
                indices=None if self.indices is None else self._every(n, index, self.indices),
            )
            yield len(part.labels) / len(self.labels), part

    def _every(self, n: int, start: int, rows: Tensor) -> Tensor:
        """Return each n-th row of every domain, without an index that would have to be copied to a device."""
        return torch.cat([domain[start::n] for domain in rows.split(self.sizes)])


def changing_buffers(model: nn.Module) -> Iterator[Tensor]:
    """Yield the buffers that a forward pass may change: all but those that a module names in `steady_buffers`.

    To put back one that Python reads, although it has not changed, would make a GPU wait until it is read again.
    """
    for module in model.modules():
        steady = getattr(module, "steady_buffers", ())
        yield from (buffer for name, buffer in module.named_buffers(recurse=False) if name not in steady)


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the buffers of `model` back at the end: what a pass that is repeated does to statistics counts once."""
    saved = [(buffer, buffer.clone()) for buffer in changing_buffers(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def run_in_parts(model: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return what `model` says of `images`, from `n` passes whose activations are computed again in the backward pass.

    Only one part's activations are in memory at a time. Gradients are those of one pass over all images, up to the
    rounding of sums, where the model treats each image alone (batch norm frozen, no dropout). Chen et al., *Training
    Deep Nets with Sublinear Memory Cost*, 2016, over images in place of layers.

    Args:
        model: images → (features, logits).
        images: shape (N, …).
        n: parts, of every n-th image, so that each has images of every domain.
    """

    def one(part: Tensor) -> tuple[Tensor, Tensor]:
        with parametrize.cached():
            return model(part)

    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        again = _buffers_kept(model) if isinstance(model, nn.Module) else contextlib.nullcontext()
        return contextlib.nullcontext(), again

    outputs = [checkpoint(one, images[index::n], use_reentrant=False, context_fn=contexts) for index in range(n)]
    order = torch.cat([torch.arange(len(images), device=images.device)[index::n] for index in range(n)]).argsort()
    features, logits = (torch.cat(values)[order] for values in zip(*outputs, strict=True))
    return features, logits


def _alone(rows: Tensor) -> Sequence[Tensor]:
    return [rows]


@dataclass(frozen=True)
class ModelView:
    """The model as functions of images, features or parameters.

    Attributes:
        model: images → (features, logits), as training runs it (possibly wrapped for several processes).
        network: the plain network inside, with `featurizer` and `classifier`; its own forward gives logits.
        of_all: rows of this process → those of every process that shares the batch, in their order.
        n_parts: passes in which the images go through the model, for less memory (`run_in_parts`).
    """

    model: nn.Module
    network: nn.Module
    of_all: Callable[[Tensor], Sequence[Tensor]] = _alone
    n_parts: int = 1

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (n, d) and logits (n, n_classes) of images (n, C, H, W)."""
        if self.n_parts > 1 and torch.is_grad_enabled():
            return run_in_parts(self.model, images, self.n_parts)
        return self.model(images)

    def outputs(self, batch: DomainBatch) -> list[DomainOutputs]:
        """Return the outputs of each domain over the images of all processes, from one pass of each over its own."""
        return self.joined(self.own_outputs(batch))

    def own_outputs(self, batch: DomainBatch) -> list[DomainOutputs]:
        """Return the outputs of each domain over the images of this process."""
        features, logits = self(batch.images)
        split = zip(*(tensor.split(batch.sizes) for tensor in (features, logits, batch.labels)), strict=True)
        return [DomainOutputs(*domain) for domain in split]

    def joined(self, own: Sequence[DomainOutputs]) -> list[DomainOutputs]:
        """Return the outputs of each domain over the images of all processes, in the order of the whole batch."""
        return [
            DomainOutputs(self._whole(domain.features), self._whole(domain.logits), self._whole(domain.labels))
            for domain in own
        ]

    def _whole(self, rows: Tensor) -> Tensor:
        parts = self.of_all(rows)  # process r of n has rows r, r + n, … of a domain
        return rows if len(parts) == 1 else torch.stack(list(parts), dim=1).flatten(0, 1)

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits (n, n_classes) of features (n, d)."""
        return self.network.get_submodule("classifier")(features)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what trains of the network by name: latent weights, step sizes and the rest."""
        return {name: value for name, value in self.network.named_parameters() if value.requires_grad}

    def logits_with(self, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Return the logits (n, n_classes) that the network would give with other values of its parameters."""
        return functional_call(self.network, dict(parameters), (images,))


def gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of `loss` for each parameter that it reaches, detached.

    Example:
        >>> w, unused = torch.tensor([3.0, 1.0], requires_grad=True).unbind()
        >>> gradients(w**2, {"w": w, "unused": unused})
        {'w': tensor(6.)}
    """
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}


@dataclass(frozen=True)
class ObjectiveSetting:
    """What an objective may need to know before training.

    Attributes:
        n_domains: source domains.
        n_classes: classes.
        n_features: d, the width of the penultimate features.
        batch_size: images per source domain and step, over all processes.
        network: the network as it starts, before quantizers are attached: `featurizer` and `classifier`.
        n_processes: processes that share the batch.
        seed: of the random start of an objective's own networks.
        stages: finds the stages of the network, first to last; raises ModelError where it has none.
        equal_shares: whether every domain has as many images in a batch.
    """

    n_domains: int
    n_classes: int
    n_features: int
    batch_size: int
    network: nn.Module
    n_processes: int = 1
    seed: int = 0
    stages: Callable[[], Sequence[Stage]] = tuple
    equal_shares: bool = True


class Objective(nn.Module):
    """The loss of one step; abstract.

    Most members are pure: they define `loss` over the outputs of each domain. One that must see images or the step, or
    run the model itself, overrides `forward` instead. State goes into buffers (it is saved in checkpoints, never in
    the model file), further networks into submodules: their parameters train with the run's optimizer, at `lr_factor`
    times the learning rate.

    Raises:
        ConfigError: an unknown hyper-parameter or value, too few source domains, too small a batch, unequal shares of
            it where they must be equal, or several processes where one is needed.

    Attributes:
        HYPERPARAMETERS: name → default, search range, meaning.
        MIN_DOMAINS: fewest source domains that make sense.
        MIN_BATCH: fewest images per domain and step.
        EQUAL_SHARES: whether every domain must have as many images in a batch.
        MEAN_CROSS_ENTROPY: what the cross-entropy in its `loss` is the mean over, "images" or "domains" (of their
            means), if nothing else in it reads labels, so that these can be smoothed (`objectives.wrappers`).
        ACCUMULATES: how a batch can be cut for `train.accumulate`: "images", the loss is a mean over images, so that
            the gradients of parts add up; "outputs", it looks at features and logits of the whole batch, which a second
            forward pass over each part allows; "", not at all. None: "outputs" if it overrides `loss` alone, else "".
        ONE_PROCESS: whether it cannot be shared by several processes: it runs the plain network itself, whose gradients
            nobody gathers, or has parameters of its own.
        OWN_GRADIENTS: whether it takes gradients through the network itself, whose losses nobody scales for float16.
        lr_factor: of the objective's own parameters.
        params: the values of the hyper-parameters.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {}
    MIN_DOMAINS: ClassVar[int] = 1
    MIN_BATCH: ClassVar[int] = 1
    EQUAL_SHARES: ClassVar[bool] = False
    MEAN_CROSS_ENTROPY: ClassVar[str] = ""
    ACCUMULATES: ClassVar[str | None] = None
    ONE_PROCESS: ClassVar[bool] = False
    OWN_GRADIENTS: ClassVar[bool] = False
    lr_factor: float = 1.0

    def __init__(self, setting: ObjectiveSetting, params: Mapping[str, Value]) -> None:
        super().__init__()
        name = OBJECTIVES.name_of(type(self))
        self.params = fill(f"objective '{name}'", self.HYPERPARAMETERS, params)
        self._seen_step: int | None = None
        if setting.n_domains < self.MIN_DOMAINS:
            text = f"objective '{name}' compares domains and needs at least {self.MIN_DOMAINS} source domains"
            raise ConfigError(f"{text}, found {setting.n_domains}. Add one, or use another objective, such as erm.")
        if self.ONE_PROCESS and setting.n_processes > 1:
            text = f"objective '{name}' works in one process only, and there are {setting.n_processes}"
            raise ConfigError(f"{text}. Start it without `accelerate launch`, or with --num_processes 1.")
        if setting.batch_size < self.MIN_BATCH:
            text = f"objective '{name}' needs at least {self.MIN_BATCH} images per domain and step"
            raise ConfigError(f"{text}, data.batch_size is {setting.batch_size}: use --batch-size {self.MIN_BATCH}.")
        if self.EQUAL_SHARES and not setting.equal_shares:
            text = f"objective '{name}' takes as many images of every domain, and data.focus gives one of them half"
            raise ConfigError(f"{text}. Leave data.focus out, or use another objective, such as erm.")

    @property
    def accumulates(self) -> str:
        """How a batch can be cut: "images", "outputs" or "", as in `ACCUMULATES`."""
        if self.ACCUMULATES is not None:
            return self.ACCUMULATES
        return "outputs" if type(self).forward is Objective.forward else ""

    def number(self, name: str) -> float:
        """Return the value of a numeric hyper-parameter."""
        return float(self.params[name])

    def new_step(self, batch: DomainBatch) -> bool:
        """Return whether this is the first pass over the batch of a step.

        A step rule may make several (SAM makes two); what an objective remembers moves once per step.
        """
        is_new = batch.step != self._seen_step
        self._seen_step = batch.step
        return is_new

    @torch.no_grad()
    def remember_(self, buffer: Tensor, value: Tensor) -> None:
        """Copy `value` into `buffer`, unless it is not finite: the run then stops, and its last good state is kept."""
        buffer.copy_(torch.where(value.isfinite().all(), value, buffer))

    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return the scalar loss of the outputs of all source domains.

        Raises:
            NotImplementedError: the member overrides `forward` instead.
        """
        raise NotImplementedError(f"{type(self).__name__} is a loss of more than outputs: call it as a module")

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        return self.loss(view.outputs(batch))


class WrappedObjective(Objective):
    """Something around the loss of another objective, which looks only at features, logits and labels; abstract.

    Hyper-parameters, their checks and the learning rate are those of the objective inside.

    Args:
        objective: the loss of the labels.
        limit: why an objective that runs the model itself cannot be inside, as the end of a sentence.

    Raises:
        ConfigError: the objective runs the model itself.
    """

    def __init__(self, objective: Objective, limit: str) -> None:
        nn.Module.__init__(self)
        if type(objective).forward is not Objective.forward:
            raise ConfigError(f"objective '{type(objective).__name__}' runs the model itself {limit}; use erm")
        self.objective = objective
        self.params = objective.params
        self.lr_factor = objective.lr_factor

    @property
    def accumulates(self) -> str:
        """That of the objective inside; what the wrappers add is a mean over images."""
        return self.objective.accumulates

    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return the loss of the objective inside."""
        return self.objective.loss(domains)


FAMILIES = {  # file: its objectives, so that a run imports the file of its own alone
    "risks": ("erm", "irm", "vrex", "groupdro"),
    "alignment": ("coral", "deep-coral", "mmd", "fishr"),
    "meta_learning": ("mldg", "fish", "arm"),
    "perturbation": ("mixup", "rsc", "sagnet", "ccfp"),
    "pretrained": ("miro", "mms"),
}
OBJECTIVES: Registry[type[Objective]] = Registry("objective", "qtdog.objectives", FAMILIES)

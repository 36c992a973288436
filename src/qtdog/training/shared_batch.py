"""A batch that several processes share, where a loss is of the whole of it."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator
from torch import Tensor


def of_all_processes(accelerator: Accelerator, rows: Tensor) -> Sequence[Tensor]:
    """Return the rows of every process, in their order; gradients flow into this process's own.

    Every process then computes the same loss, and the gradient of a parameter is the sum of what each finds through its
    own rows. Processes take the mean of their gradients, so that each is multiplied by their number.

    Args:
        accelerator: knows the processes.
        rows: shape (n, …), with the same n in all processes.

    Example:
        >>> import torch
        >>> of_all_processes(Accelerator(cpu=True), torch.ones(2))
        [tensor([1., 1.])]
    """
    n = accelerator.num_processes
    if n == 1:
        return [rows]
    gathered = accelerator.gather(rows.detach())
    assert isinstance(gathered, Tensor)
    parts = list(gathered.chunk(n))
    if rows.requires_grad:
        own = rows.view_as(rows)  # a node of its own: `rows` may be read elsewhere too
        own.register_hook(lambda gradient: gradient * n)
        parts[accelerator.process_index] = own
    return parts

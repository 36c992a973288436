"""Learning-rate schedules: a pure function of the step, so that a resumed run needs no state of it."""

from __future__ import annotations

import math


def lr_factor(schedule: str, step: int, *, decay_from: int, steps: int) -> float:
    """Return the multiple of the learning rate at one step.

    Constant is the protocol's (DomainBed). The others hold the rate until `decay_from` and then let it fall to zero at
    the end of the run: with t = (step - decay_from) / (steps - decay_from),

        linear: 1 - t        cosine: (1 + cos(π t)) / 2   (Loshchilov and Hutter, ICLR 2017, without restarts)

    Args:
        schedule: "constant", "linear" or "cosine".
        step: updates made so far.
        decay_from: first step of the fall.
        steps: of the run.

    Example:
        >>> [lr_factor("linear", step, decay_from=2, steps=6) for step in range(6)]
        [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
        >>> round(lr_factor("cosine", 4, decay_from=2, steps=6), 6), lr_factor("constant", 5, decay_from=2, steps=6)
        (0.5, 1.0)
    """
    if schedule == "constant" or step <= decay_from:
        return 1.0
    share = (step - decay_from) / (steps - decay_from)
    return 1 - share if schedule == "linear" else (1 + math.cos(math.pi * share)) / 2

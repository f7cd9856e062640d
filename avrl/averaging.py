"""A running mean of the weights (EMA), which is published in the place of the last ones.

The mean of a parameter lies among its moments in the optimizer's state: a snapshot keeps and restores it with them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.optim import Optimizer

MEAN = "mean"  # its name in the optimizer's state, which AdamW leaves alone


def decay_of(step: int, decay: float) -> float:
    """The decay at a step: small at first, so that a short run is not mostly its first weights.

    Source: TensorFlow's ``ExponentialMovingAverage(num_updates=...)``: min(decay, (1 + step) / (10 + step)).
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def average(optimizer: Optimizer, decay: float, step: int) -> None:
    """Move the means towards the weights that a step has just left; the first step begins them."""
    moved = [one for one, state in optimizer.state.items() if "step" in state]  # a parameter without gradient has none
    for one in moved:
        optimizer.state[one].setdefault(MEAN, one.detach().clone())
    means = [optimizer.state[one][MEAN] for one in moved]
    torch._foreach_lerp_(means, moved, 1 - decay_of(step, decay))


@torch.no_grad()
def adopt(optimizer: Optimizer) -> None:
    """Let the means be the weights."""
    for one, state in optimizer.state.items():
        if MEAN in state:
            one.copy_(state[MEAN])


@contextlib.contextmanager
def adopted(optimizer: Optimizer) -> Iterator[None]:
    """Let the means be the weights while the body looks at them; then both are what they were, bit for bit."""
    _exchange(optimizer)
    try:
        yield
    finally:
        _exchange(optimizer)


@torch.no_grad()
def _exchange(optimizer: Optimizer) -> None:
    """Values change places, not tensors: what holds on to a tensor (a graph that was captured) sees them too."""
    for one, state in optimizer.state.items():
        if MEAN in state:
            weight = one.clone()
            one.copy_(state[MEAN])
            state[MEAN].copy_(weight)

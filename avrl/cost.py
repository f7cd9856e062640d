"""What a network costs: parameters, and floating-point operations of a forward pass of one sample.

Counted by torch on tensors that hold no data, so the figures are those of any machine. A product of matrices (n, k)
and (k, m) is 2nkm operations; norms and activations are not counted.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from avrl.objectives import Network, create, modules

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from avrl.objectives import Objective


@cache
def cost(network: Network) -> dict[str, int]:
    """Cost of the whole objective, and of its encoder alone on a frame pair.

    Returns:
        ``parameters``, ``flops``, ``encoder_parameters``, ``encoder_flops``; flops are forward, a sample.
    """
    with torch.device("meta"):
        objective = create(network)
        frames = torch.zeros(1, network.num_frames, network.image_size, network.image_size, 3, dtype=torch.uint8)
        one = torch.ones(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as whole:
            objective.loss(frames, one, one)
        with FlopCounterMode(display=False) as alone:
            vectors = _readouts(objective)
    return {
        "parameters": _count(modules(objective).parameters()),
        "flops": whole.get_total_flops(),
        "encoder_parameters": _count(_behind(objective, vectors).values()),
        "encoder_flops": alone.get_total_flops(),
    }


def encoder_parameters(objective: Objective) -> dict[str, nn.Parameter]:
    """The parameters that some readout depends on, by name."""
    return _behind(objective, _readouts(objective))


def sentence(network: Network, figures: dict[str, int]) -> str:
    """The figures of `cost` in a line, to be printed before a run."""
    return (
        f"{network.name} {network.size}: {figures['parameters'] / 1e6:.1f} M parameters "
        f"({figures['encoder_parameters'] / 1e6:.1f} M in the encoder), {figures['flops'] / 1e9:.2f} GFLOP a sample "
        f"forward ({figures['encoder_flops'] / 1e9:.2f} to encode a pair)"
    ) + ("; it sees frame t alone: what changes cannot be known" if network.ablate == "p-only" else "")


def _readouts(objective: Objective) -> list[Tensor]:
    """All readouts of a pair of black frames."""
    encoder = objective.encoder()
    black = torch.zeros(1, 3, encoder.image_size, encoder.image_size)
    return list(encoder.read(black, black)[0].values())


def _behind(objective: Objective, vectors: list[Tensor]) -> dict[str, nn.Parameter]:
    """The parameters that autograd finds behind these vectors."""
    named = dict(modules(objective).named_parameters())
    found = torch.autograd.grad([one.sum() for one in vectors], list(named.values()), allow_unused=True)
    return {name: named[name] for name, grad in zip(named, found, strict=True) if grad is not None}


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(one.numel() for one in parameters)

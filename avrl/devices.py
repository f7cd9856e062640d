"""Devices: the accelerator that a run trains on, and the arithmetic that it does there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from avrl.errors import ConfigError
from avrl.ranks import patience

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_of(device: str, precision: str) -> Accelerator:
    """Devices, ranks and arithmetic; ranks wait for each other so long and no longer.

    Args:
        device: ``cpu``, or ``auto``: a GPU if there is one.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where the device has it.

    Raises:
        ConfigError: bf16 is asked for where there is none.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=_precision(device, precision),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=patience()),
            # Our buffers are tables that never change: to send them in each forward pass would be for nothing.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )


def _precision(device: str, precision: str) -> str:
    """Accelerate's word for the arithmetic. A GPU that only emulates bf16 (V100, T4) is slower with it."""
    here = device != "cpu" and torch.cuda.is_available()
    can = here and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not can:
        raise ConfigError("--precision bf16 needs a GPU that has it", "leave it at auto, or ask for fp32")
    return "bf16" if can and precision != "fp32" else "no"


def arithmetic(accelerator: Accelerator) -> str:
    """What a product of matrices really comes out as: an autocast that is off says so here."""
    one = torch.ones(1, 1, device=accelerator.device)
    with accelerator.autocast():
        return str((one @ one).dtype).removeprefix("torch.")


def device_name(accelerator: Accelerator) -> str:
    """Torch's name of the GPU, or ``cpu``."""
    return torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu"

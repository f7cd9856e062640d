"""Devices: the accelerator that a run trains on, the arithmetic that it does there, and compiled code for it."""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import TYPE_CHECKING

import torch

from avrl.errors import ConfigError, MissingError
from avrl.objectives import vit
from avrl.ranks import patience

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator
    from torch import nn

COMPILER = "inductor"  # torch's name for it


def accelerator_of(device: str, precision: str) -> Accelerator:
    """Devices, ranks and arithmetic; ranks wait for each other so long and no longer.

    Args:
        device: ``cpu``, or ``auto``: a GPU if there is one.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where the device has it.

    Raises:
        ConfigError: bf16 is asked for where there is none, or a process would have no GPU of its own.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        require_gpus(device, int(os.environ.get("LOCAL_RANK", "0")) + 1)
    # Torch 2.13's new word for it still sends them once, and Accelerate does not know it yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    made = Accelerator(
        cpu=device == "cpu",
        mixed_precision=_precision(device, precision),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=patience()),
            # Our buffers are tables that never change: to send them in each forward pass would be for nothing.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    made.wait_for_everyone()  # the first may still be bringing the run from S3, and NCCL would wait for nobody
    return made


def require_gpus(device: str, needed: int) -> None:
    """Refuse more processes than there are GPUs: Accelerate would let each train alone, or two share one.

    Raises:
        ConfigError: this machine has fewer than are needed.
    """
    seen = torch.cuda.device_count()
    if device != "cpu" and seen < needed:
        raise ConfigError(
            f"{needed} processes need a GPU each, and torch sees {seen} here",
            "nvidia-smi tells what is there; --device cpu trains without",
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


def compile_blocks(network: nn.Module) -> None:
    """Have the transformer blocks compiled when they first run, one for all: whole networks took over 400 s."""
    # Of torch's own making, as it looks at what it compiles for.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
    for part in network.modules():
        if isinstance(part, vit.Block):
            part.compile(backend=COMPILER, dynamic=False)


@contextlib.contextmanager
def fitting() -> Iterator[None]:
    """Tell in a line that the GPU's memory is too small; also a decorator.

    Raises:
        ConfigError: it is.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU's memory is too small: {str(error)[:120]}",
            "raise --accumulate: the same training, in smaller parts",
        ) from error


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Tell in a line that nothing can be compiled here.

    Raises:
        MissingError: there is no compiler, or it fails.
    """
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        said = " ".join(str(getattr(error, "inner_exception", error)).split())
        raise MissingError(
            f"--compile fails here: {said[:160]}", "leave --compile out, or see to a C++ compiler (and Triton for GPUs)"
        ) from error

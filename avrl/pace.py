"""Pace: how fast a run goes, and how much of the GPUs' peak that is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from avrl.cost import cost

if TYPE_CHECKING:
    from avrl.objectives import Network
    from avrl.pairs import Pairs

# Dense bf16 operations a second by torch's name of the device: NVIDIA's data sheets as remembered (no network here to
# read them again), without the doubling that A100 and later are given for sparsity; 4090: its Ada whitepaper, FP32
# accumulation. A part of a GPU (MIG) has another name, and no figure.
PEAK = {
    "NVIDIA A10G": 70e12,
    **dict.fromkeys((f"NVIDIA A100-{one}" for one in ("SXM4-40GB", "SXM4-80GB", "PCIE-40GB")), 312e12),
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


class Clock:
    """Times the steps of a run but the first, which waits for kernels to be chosen or compiled.

    Args:
        pairs: What the steps wait for.
    """

    def __init__(self, pairs: Pairs) -> None:
        self.pairs, self.steps = pairs, 0
        self._marks = [self._now()]  # the start, the end of the first step, the end of the last

    def tick(self) -> None:
        """A step is done."""
        self.steps += 1
        self._marks[2:] = []
        self._marks.append(self._now())

    def pace(self) -> tuple[float, float]:
        """Steps a second, and the share of the time that they waited for frames."""
        (begun, before), (ended, after) = self._marks[-2:]
        seconds = max(ended - begun, 1e-9)
        return max(self.steps - 1, 1) / seconds, (after - before) / seconds

    def _now(self) -> tuple[float, float]:
        return time.monotonic(), self.pairs.waited_s


def speed(network: Network, rate: float, device: str, arithmetic: str, processes: int) -> dict[str, float]:
    """How fast a run is, for its facts.

    Model FLOP utilisation is the share of the GPUs' peak that the network's own products of matrices take, counting a
    backward pass as two forward ones and nothing done twice. Source: Chowdhery et al. 2022 (PaLM), appendix B.

    Args:
        network: What is trained.
        rate: Samples a second, over all processes.
        device: Its name, of which a process has one.
        arithmetic: What a product of matrices comes out as.
        processes: How many.

    Returns:
        ``samples_per_second``, and ``model_flop_utilisation`` where the peak is known and the arithmetic is bf16.
    """
    found = {"samples_per_second": round(rate, 1)}
    if device in PEAK and arithmetic == "bfloat16":
        found["model_flop_utilisation"] = round(3 * cost(network)["flops"] * rate / (PEAK[device] * processes), 4)
    return found

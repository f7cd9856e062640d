"""The pixel difference: what a probe reaches without any network. Every encoder has to beat it.

Shapes: B samples, T=2 frames (t, t+gap), H W pixels, C=3 RGB, n places a side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from avrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


class PixelDifference(nn.Module):
    """Frame t+gap minus frame t, averaged over n x n equal areas, -1..1. Readout ``difference``: 3 n n."""

    paired = True

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.image_size = 224  # of no effect: areas are exact at any size
        self.readouts: Mapping[str, int] = {"difference": 3 * side * side}
        self.eval()

    def encode(self, frames_BTHWC: Tensor) -> dict[str, Tensor]:
        """uint8 0..255 (B, 2, H, W, 3) -> ``difference``, float32 (B, 3 n n), place by place.

        Raises:
            TypeError: the frames are not uint8.
            ValueError: the frames are not two a sample.
        """
        return {"difference": self.patches(frames_BTHWC).flatten(1)}

    @torch.inference_mode()
    def patches(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 0..255 (B, 2, H, W, 3) -> float32 (B, n, n, 3). Raises as `encode`."""
        if frames_BTHWC.dtype != torch.uint8:
            raise TypeError(f"frames must be uint8 0..255, got {frames_BTHWC.dtype}")
        _, T, H, W, C = frames_BTHWC.shape
        if (T, C) != (2, 3):
            raise ValueError(f"frames must be (B, 2, H, W, 3), got {tuple(frames_BTHWC.shape)}")
        rows_nH = areas(H, self.side).to(frames_BTHWC.device)
        columns_nW = areas(W, self.side).to(frames_BTHWC.device)
        # Exact, as they are bytes; a sample at a time, which stays in a processor's cache: a quarter of the time.
        x_nWC = (rows_nH @ (b_HWC.float() - a_HWC).flatten(1) for a_HWC, b_HWC in frames_BTHWC)
        x_BnWC = torch.stack([*x_nWC]).view(-1, self.side, W, C)  # one side at a time: 16 times less to add up
        return torch.einsum("mw,bnwc->bnmc", columns_nW, x_BnWC) / 255


def areas(length: int, n: int) -> Tensor:
    """The share of each pixel in each of n equal stretches, (n, length), rows summing to 1.

    Fractional where n does not divide the length: adaptive pooling would count border pixels twice there.
    """
    edges = torch.arange(n + 1, dtype=torch.float64) * length / n
    pixels = torch.arange(length, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (overlap.clamp(min=0) * n / length).float()


def load(argument: str, init: str, weights_file: Path | None = None) -> PixelDifference:
    """The difference at ``8`` or ``16`` places a side.

    Raises:
        ConfigError: weights or a random twin are asked of something that has none.
    """
    if init != "pretrained" or weights_file is not None:
        raise ConfigError(f"pixels-{argument} has no weights, so neither a file of them nor a random twin")
    return PixelDifference(int(argument))

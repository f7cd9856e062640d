"""Augmentation: one crop, one flip and one change of colours for all frames of a sample.

So what changes between them is still motion alone. (A crop for each frame had the public attempt's change channels
see the crop.)
A function of the frames and the sample's own seed: a resumed run, or one on other ranks, sees the same pictures.

Legend: B samples, T frames, H W pixels, C=3 RGB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from avrl.pairs import sent, uniform

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 0.7  # side of the smallest crop over the frame's: half of the area
JITTER = 0.3  # contrast, saturation and brightness are factors in 1 - JITTER .. 1 + JITTER
HUE = np.pi / 9  # largest turn of the colours, radians
GREY = 127.5  # what contrast turns about: each frame's own mean would be another change for each


def augment(frames_BTHWC: Tensor, seed_B: Tensor) -> Tensor:
    """Crop, flip and recolour each sample by its seed, on the device that its frames are on.

    Args:
        frames_BTHWC: uint8 0..255.
        seed_B: int64, `avrl.pairs.Batch`'s; on the CPU it costs no wait.

    Returns:
        uint8 0..255, the same shape.
    """
    return _change(frames_BTHWC, sent(torch.from_numpy(_look(seed_B.cpu().numpy())), frames_BTHWC.device))


def _change(frames_BTHWC: Tensor, look_B8: Tensor) -> Tensor:
    """Do what `_look` says."""
    b, t, h, w, c = frames_BTHWC.shape
    across_B1, down_B1, x_B1, y_B1 = look_B8[:, :4, None].unbind(1)
    columns_BW = x_B1 + across_B1 * _centres(w, frames_BTHWC.device)
    rows_BH = y_B1 + down_B1 * _centres(h, frames_BTHWC.device)
    grid_BHW2 = torch.stack([columns_BW[:, None].expand(b, h, w), rows_BH[:, :, None].expand(b, h, w)], 3)
    pixels = frames_BTHWC.permute(0, 1, 4, 2, 3).reshape(b, t * c, h, w).float()
    pixels = F.grid_sample(pixels, grid_BHW2, padding_mode="border", align_corners=False).view(b, t, c, h, w)
    own, following, last, offset = look_B8[:, 4:].view(b, 4, 1, 1, 1, 1).unbind(1)
    pixels = own * pixels + following * pixels.roll(-1, 2) + last * pixels.roll(-2, 2) + offset
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 1, 3, 4, 2)


def _look(seed_B: np.ndarray) -> np.ndarray:
    """What is done to each sample, float32 (B, 8).

    The crop in halves of the frame: its width (negative: mirrored), height, centre x and y. Then the weight of each
    colour itself and of the two that follow it, and an offset.

    Saturation is the distance from the grey axis and hue the turn about it, which commute with contrast and
    brightness; together they are one circulant matrix (Rodrigues' rotation about (1, 1, 1)) and an offset.
    """
    side, x, y, mirror, hue, *factors = (uniform(0, 0, seed_B, stream) for stream in range(8))
    side = 1 - (1 - SMALLEST) * side
    saturation, contrast, brightness = (1 + JITTER * (2 * one - 1) for one in factors)
    turns = HUE * (2 * hue - 1) + 2 * np.pi / 3 * np.arange(3)[:, None]
    colours = brightness * contrast * (1 + 2 * saturation * np.cos(turns)) / 3
    centre_x, centre_y = (1 - side) * (2 * x - 1), (1 - side) * (2 * y - 1)
    across = np.where(mirror < 0.5, -side, side)
    offset = GREY * brightness * (1 - contrast)
    return np.stack([across, side, centre_x, centre_y, *colours, offset], 1).astype(np.float32)


def _centres(n: int, device: torch.device) -> Tensor:
    """Centres of n pixels over -1..1 (n,)."""
    return (2 * torch.arange(n, device=device) + 1) / n - 1

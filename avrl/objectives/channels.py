"""What the two streams see: M (magno, change) and P (parvo, form). Frames in [0, 1], no ImageNet statistics.

Legend: B samples, C channels, H W pixels. P is made of frame t alone: with frame t+k in it, the target of the
prediction would lie in its own input.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

M_CHANNELS, P_CHANNELS = 4, 5
LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709-6, item 3.2
CLAMP = 3.0  # standard deviations of luma: beyond lie specular highlights
TINY = 1e-6
IN_CACHE = 4  # frames of 224 px that a processor turns into numbers without going to memory each time


def unit(frames_BTHWC: Tensor, image_size: int) -> Tensor:
    """uint8 0..255 (B, T, H, W, 3) -> float32 [0, 1] (B, T, 3, image_size, image_size), by area averaging.

    Raises:
        TypeError: the frames are not uint8; a frame that is already scaled would be scaled twice.
    """
    if frames_BTHWC.dtype != torch.uint8:
        raise TypeError(f"frames must be uint8, got {frames_BTHWC.dtype}")
    flat_NCHW = frames_BTHWC.flatten(0, 1).permute(0, 3, 1, 2)
    few = IN_CACHE if flat_NCHW.device.type == "cpu" else len(flat_NCHW)
    parts = [_averaged(part_NCHW.float(), image_size) / 255 for part_NCHW in torch.split(flat_NCHW, few)]
    return torch.cat(parts).reshape(*frames_BTHWC.shape[:2], 3, image_size, image_size)


def _averaged(frames_NCHW: Tensor, image_size: int) -> Tensor:
    side = frames_NCHW.shape[-1]
    if side == image_size:
        return frames_NCHW
    if side % image_size == 0:  # whole pixels to a cell: three times as fast as the general case below on a CPU
        return F.avg_pool2d(frames_NCHW, side // image_size)
    return F.interpolate(frames_NCHW, size=(image_size, image_size), mode="area")


def luma(rgb_BCHW: Tensor) -> Tensor:
    """BT.709 luma (B, 1, H, W)."""
    red, green, blue = (share * one for share, one in zip(LUMA, rgb_BCHW.chunk(3, 1), strict=True))
    light: Tensor = red + green + blue
    return light


def magno(img_t_BCHW: Tensor, img_tk_BCHW: Tensor) -> Tensor:
    """Change: frame t+k minus frame t as (dL, dR, dG, dB), in [-1, 1]."""
    change = img_tk_BCHW - img_t_BCHW
    return torch.cat([luma(change), change], 1)


def parvo(img_t_BCHW: Tensor) -> Tensor:
    """Form: Sobel x and y of per-image z-scored luma, over the image's largest magnitude, and RGB, of frame t.

    By shifted pictures rather than a convolution, which autocast would do in bfloat16: off by a twentieth where a
    picture is smooth, and another P in training than the one that looks and probes see.
    """
    light = luma(img_t_BCHW)
    mean, std = light.mean((2, 3), keepdim=True), light.std((2, 3), keepdim=True)
    z = F.pad(((light - mean) / (std + TINY)).clamp(-CLAMP, CLAMP), (1, 1, 1, 1), mode="replicate")
    down = z[..., :-2, :] + 2 * z[..., 1:-1, :] + z[..., 2:, :]
    right = z[..., :-2] + 2 * z[..., 1:-1] + z[..., 2:]
    edges = torch.cat([down[..., 2:] - down[..., :-2], right[..., 2:, :] - right[..., :-2, :]], 1)
    largest = edges.square().sum(1, keepdim=True).sqrt().amax((2, 3), keepdim=True)
    return torch.cat([edges / (largest + TINY), img_t_BCHW], 1)

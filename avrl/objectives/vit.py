"""Vision transformer parts that all three objectives share: sizes, tokens, positions. The blocks are timm's.

Legend: B samples, C channels, H W pixels, N patches, D embed_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from avrl.torchvision_ops import timm

PATCH_SIZE = 16
Block = timm.models.vision_transformer.Block
M = TypeVar("M", bound=nn.Module)
# As timm's transformer and MAE have it. torch's own adds 1e-5, and timm's blocks have had both.
norm = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class Size:
    """Width and depth of a stream, and of the decoder that is thrown away after pretraining."""

    embed_dim: int
    depth: int
    num_heads: int
    decoder_dim: int
    decoder_depth: int


# tiny is ours, for a CPU: smaller than timm's vit_tiny (192, 12, 3). small and base are ViT-S/16 and ViT-B/16.
SIZES = {
    "tiny": Size(128, 6, 4, 128, 2),
    "small": Size(384, 12, 6, 256, 4),
    "base": Size(768, 12, 12, 384, 4),
}


def blocks(embed_dim: int, num_heads: int, depth: int) -> nn.Sequential:
    """`depth` pre-norm transformer blocks, MLP ratio 4."""
    return nn.Sequential(*(Block(embed_dim, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))


def positions(embed_dim: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (side * side, embed_dim).

    Source: He et al. 2022 (MAE), appendix A.1, after Vaswani et al. 2017: half the dimensions for each axis.
    """
    omega = 10000 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten().double().unsqueeze(1) * omega for axis in (row, column)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()


def times(embed_dim: int, count: int) -> Tensor:
    """Fixed 1-D sine-cosine positions (count, embed_dim); zeros where there is only one.

    Source: Vaswani et al. 2017, section 3.5. Added to `positions`, as in Feichtenhofer et al. 2022 (MAE of video),
    where both are learned.
    """
    if count == 1:
        return torch.zeros(1, embed_dim)
    omega = 10000 ** -(torch.arange(embed_dim // 2, dtype=torch.float64) / (embed_dim // 2))
    angles = torch.arange(count).double().unsqueeze(1) * omega
    return torch.cat([angles.sin(), angles.cos()], 1).float()


class Tokens(nn.Module):
    """Pictures to tokens: (B, C, H, W) -> CLS + patches with positions (B, 1+N, D)."""

    def __init__(self, channels: int, image_size: int, embed_dim: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, embed_dim, PATCH_SIZE, PATCH_SIZE)
        self.cls = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.position: Tensor
        self.register_buffer("position", positions(embed_dim, image_size // PATCH_SIZE), persistent=False)

    def forward(self, picture_BCHW: Tensor) -> Tensor:
        """See the class."""
        patches = self.patches(picture_BCHW)
        return torch.cat([self.cls.expand(len(patches), -1, -1), patches], 1)

    def patches(self, picture_BCHW: Tensor) -> Tensor:
        """Patches with positions, without CLS: (B, N, D)."""
        patches: Tensor = self.project(picture_BCHW).flatten(2).mT
        return patches + self.position


@dataclass(frozen=True)
class Plain:
    """A vision transformer like timm's own inside an objective's network: what `avrl.export` can write for timm.

    Attributes:
        channels: What the channels of its picture are, in order.
    """

    tokens: Tokens
    blocks: nn.Sequential
    norm: nn.LayerNorm
    channels: str


def patchify(pictures_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C * PATCH_SIZE^2), channel first within a patch."""
    size = PATCH_SIZE
    b, c, h, w = pictures_BCHW.shape
    tiles = pictures_BCHW.reshape(b, c, h // size, size, w // size, size)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // size) * (w // size), c * size * size)


def unpatchify(patches_BND: Tensor, channels: int = 3) -> Tensor:
    """Inverse of `patchify` for a square picture."""
    b, n, _ = patches_BND.shape
    side, size = round(n**0.5), PATCH_SIZE
    tiles = patches_BND.reshape(b, side, side, channels, size, size)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(b, channels, side * size, side * size)


def initialise(module: nn.Module) -> None:
    """Xavier-uniform linear layers, zero biases, CLS of small normal noise (MAE's initialisation)."""
    for name, parameter in module.named_parameters():
        if name.endswith("cls") or name.endswith("mask_token"):
            nn.init.normal_(parameter, std=0.02)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def initialised(module: M) -> M:
    """A part that is added to a network whose weights are drawn already."""
    initialise(module)
    return module


def grid(patches_BND: Tensor, cells: int = 3) -> Tensor:
    """Patches pooled to cells x cells and laid end to end: (B, cells^2 * D)."""
    side = round(patches_BND.shape[1] ** 0.5)
    map_BDhw = patches_BND.mT.reshape(len(patches_BND), -1, side, side)
    return nn.functional.adaptive_avg_pool2d(map_BDhw, cells).flatten(1)

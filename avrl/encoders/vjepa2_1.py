"""V-JEPA 2.1 (ViT-B and ViT-L, distilled from ViT-G, 384 px): the encoder alone, as a network of our own.

transformers has none of it. Unlike V-JEPA 2 it has norms behind four depths (the last is the output's), a vector that
tells videos from pictures, angles that stand two by two, and places counted on a 16x16 grid whatever the side: any side
of whole patches is legal, and 384 px is what the files are published for.
A pair is one tubelet, the first, which no angle of time turns. The part for single pictures is loaded and not run.
Source: Mur-Labadia et al. 2026; github.com/facebookresearch/vjepa2 at 204698b (app/vjepa_2_1, src/hub/backbones.py),
whose code and weights are MIT but for parts not used here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from avrl.encoders import name_of, timm_image, video, vjepa2, weights
from avrl.errors import ConfigError
from avrl.torchvision_ops import timm

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

PATCH, TUBELET, DEPTHS_READ = 16, 2, 4
HOME = 16  # places a side of the grid that places are counted on
BASE = 10_000.0  # of the angles


@dataclass(frozen=True)
class Size:
    """A ViT's width, blocks and heads."""

    dim: int
    depth: int
    heads: int


SIZES = {"base": Size(768, 12, 12), "large": Size(1024, 24, 16)}


class Network(nn.Module):
    """The encoder, with the published names of its parts.

    Shapes: B pairs, C=3 RGB, H=W pixels, N places, D dimensions.
    """

    num_prefix_tokens = 0

    def __init__(self, size: Size) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = _patches(size.dim, TUBELET)
        self.patch_embed_img = _patches(size.dim, 1)
        self.img_mod_embed = nn.Parameter(torch.randn(1, 1, size.dim) * 1e-6)
        self.video_mod_embed = nn.Parameter(torch.randn(1, 1, size.dim) * 1e-6)
        self.blocks = nn.ModuleList(
            timm.models.eva.EvaBlock(size.dim, size.heads, num_prefix_tokens=0, attn_type="rope", norm_layer=norm)
            for _ in range(size.depth)
        )
        self.norms_block = nn.ModuleList(norm(size.dim) for _ in range(DEPTHS_READ))
        self.head_dim = size.dim // size.heads
        self._begin()

    def _begin(self) -> None:
        """Random weights as pretraining began with: the untrained twin's."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv3d):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.get_parameter("bias"))
        with torch.no_grad():
            for depth, block in enumerate(self.blocks, 1):
                for last in ("attn.proj.weight", "mlp.fc2.weight"):
                    block.get_parameter(last).div_(math.sqrt(2 * depth))

    def forward_features(self, x_NCHW: Tensor) -> Tensor:
        """The frames of the pairs one after the other, (2 B, C, H, W) -> (B, N, D)."""
        tubelet_BCTHW = x_NCHW.reshape(-1, TUBELET, *x_NCHW.shape[1:]).transpose(1, 2)
        x_BND = self.patch_embed["proj"](tubelet_BCTHW).flatten(2).transpose(1, 2) + self.video_mod_embed
        rope = rotation(x_NCHW.shape[-1] // PATCH, self.head_dim).to(x_NCHW.device)
        for block in self.blocks:
            x_BND = block(x_BND, rope=rope)
        out: Tensor = self.norms_block[-1](x_BND)
        return out


def _patches(dim: int, frames: int) -> nn.ModuleDict:
    shape = (frames, PATCH, PATCH)
    return nn.ModuleDict({"proj": nn.Conv3d(3, dim, shape, shape)})


def rotation(side: int, head_dim: int) -> Tensor:
    """Sines and cosines by which the queries and keys of each place are turned, as timm takes them.

    A head's dimensions are thirds, for time, row and column, and what is left over, which is not turned.

    Args:
        side: Places a side.
        head_dim: Dimensions of a head.

    Returns:
        (side * side, 2 * head_dim): sines, then cosines; each angle twice, for a pair of neighbours.
    """
    turned = head_dim // 6  # pairs a third
    angle_F = BASE ** -(torch.arange(turned) / turned)
    place_S = torch.linspace(0, HOME - 1, side)
    row_N, column_N = (one.flatten() for one in torch.meshgrid(place_S, place_S, indexing="ij"))
    angles_ND = torch.zeros(side * side, head_dim // 2)  # time's are zero: a pair is the first tubelet
    angles_ND[:, turned : 2 * turned] = row_N[:, None] * angle_F
    angles_ND[:, 2 * turned : 3 * turned] = column_N[:, None] * angle_F
    angles_ND = angles_ND.repeat_interleave(2, 1)
    return torch.cat([angles_ND.sin(), angles_ND.cos()], 1)


def load(argument: str, init: str, weights_file: Path | None = None) -> video.PairEncoder:
    """One of `SIZES`: readouts ``patch-mean`` (768, 1,024) and ``grid``.

    Raises:
        ConfigError: no such network, or `init` is neither ``pretrained`` nor ``random``.
        MissingError: the weights are not at hand.
        IntegrityError: the weights do not fit.
    """
    if argument not in SIZES:
        raise ConfigError(f"no network {argument!r}", f"known: {', '.join(SIZES)}")
    name = name_of(__name__, argument)
    path = weights.find(name, weights_file) if timm_image.is_pretrained(init) else None
    return encoder(SIZES[argument], 384, weights.read(path) if path else None, f"{name} ({path})")


def encoder(size: Size, image_size: int, state: dict[str, Tensor] | None = None, what: str = "it") -> video.PairEncoder:
    """The encoder of that size and side (px), with published weights or, without, seeded random ones.

    Raises:
        IntegrityError: the weights do not fit `what`.
    """
    with timm_image.seeded():
        network = Network(size)
    if state is not None:
        published = {key.removeprefix("module.").removeprefix("backbone."): one for key, one in state.items()}
        weights.fit(network, published, what)
    return video.PairEncoder(network, vjepa2.DATA | {"input_size": (3, image_size, image_size)})

"""VC-1, MVP and SPA: plain ViTs of patch 16, pretrained by masking for robots and published in MAE's key layout.

All take ImageNet's statistics, and their papers read the CLS token behind the last norm. Each cuts 224 px out of 256 px
or trains on squares already; our frames are cut square before (`avrl.encoders.timm_image`), so nothing is cut again.
Sources, read at the commits named: VC-1, Majumdar et al. 2023, github.com/facebookresearch/eai-vc 17a27ae
(`load_mae_encoder`, `vit_transforms`); MVP, Radosavovic et al. 2022, github.com/ir413/mvp c985653 and 27cd7b3
(`vit_s16` has 12 heads, not timm's 6); SPA, Zhu et al. 2025, github.com/HaoyiZhu/SPA 4d56487 (`load_pretrained`), whose
authors say that its features differ from torch 2.6 on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from avrl.encoders import name_of, timm_image, weights
from avrl.errors import ConfigError
from avrl.torchvision_ops import timm

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class Size:
    """A ViT's width, blocks, heads and input side in px, under timm's names."""

    embed_dim: int
    depth: int
    num_heads: int
    img_size: int = 224


BASE, LARGE = Size(768, 12, 12), Size(1024, 24, 16)
SIZES = {
    "vc-1": BASE,
    "vc-1-l": LARGE,
    "mvp": BASE,
    "mvp-s": Size(384, 12, 12),
    "mvp-l": Size(1024, 24, 16, 256),
    "spa": BASE,
    "spa-l": LARGE,
}
SPA = "model.img_backbone."
# What pretraining needed besides the encoder: the authors' loaders leave out the same.
DECODERS = ("decoder_", "mask_token", "upsample.", "readout_project.", "head.")


def load(argument: str, init: str, weights_file: Path | None = None) -> timm_image.ImageEncoder:
    """One of `SIZES`: readouts ``cls``, ``patch-mean`` and ``grid``.

    Raises:
        ConfigError: no such network, or `init` is neither ``pretrained`` nor ``random``.
        MissingError: the weights are not at hand.
        IntegrityError: the weights do not fit.
    """
    if argument not in SIZES:
        raise ConfigError(f"no network {argument!r}", f"known: {', '.join(SIZES)}")
    name = name_of(__name__, argument)
    path = weights.find(name, weights_file) if timm_image.is_pretrained(init) else None
    return encoder(SIZES[argument], weights.read(path) if path else None, f"{name} ({path})")


def encoder(size: Size, state: dict[str, Tensor] | None = None, what: str = "it") -> timm_image.ImageEncoder:
    """The encoder of that size, with weights in the published layout or, without, seeded random ones.

    Raises:
        IntegrityError: the weights do not fit `what`.
    """
    with timm_image.seeded():
        network = timm.models.VisionTransformer(
            patch_size=16, num_classes=0, norm_layer=partial(nn.LayerNorm, eps=1e-6), **asdict(size)
        )
    if state is not None:
        weights.fit(network, published(state), what, surplus=DECODERS)
    data = timm_image.IMAGENET | {"input_size": (3, size.img_size, size.img_size), "interpolation": "bicubic"}
    return timm_image.ImageEncoder(network, data)


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """MAE's keys are timm's. SPA's encoder is a part of its training module: ``model.img_backbone.cls_token``."""
    spa = {key.removeprefix(SPA): one for key, one in state.items() if key.startswith(SPA)}
    return spa or state

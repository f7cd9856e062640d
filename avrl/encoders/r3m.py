"""R3M: a ResNet trained on Ego4D video and language, the usual baseline of robot learning.

It takes bytes: divided by 255, then ImageNet's mean and standard deviation, inside. The language half of the
published checkpoints is left out; any other key that the ResNet does not know is refused.
Source: Nair et al. 2022, https://github.com/facebookresearch/r3m; file layouts as in its
`remove_language_head` and in the authors' port for transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avrl.encoders import name_of, timm_image, weights
from avrl.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

# R3M resizes to 256 px and cuts 224 out of the middle when frames are not 224 px. Ours are cut square
# already, so they are resized to 224 px whole; at 224 px, the frame store's size, nothing is resampled and
# the two agree exactly.
DATA = timm_image.IMAGENET | {"input_size": (3, 224, 224), "interpolation": "bilinear"}
LANGUAGE = ("lang_enc.", "lang_rew.")


def load(argument: str, init: str, weights_file: Path | None = None) -> timm_image.ImageEncoder:
    """R3M on ``resnet50``, ``resnet34`` or ``resnet18``: readouts ``pool`` (2048, 512, 512) and ``grid``.

    Raises:
        ConfigError: another network, or `init` is neither ``pretrained`` nor ``random``.
        MissingError: the weights are not at hand.
        IntegrityError: the weights do not fit.
    """
    name = name_of(__name__, argument)
    if not name:
        raise ConfigError(f"R3M has no {argument!r}", "known: resnet18, resnet34, resnet50")
    path = weights.find(name, weights_file) if timm_image.is_pretrained(init) else None
    network = timm_image.build(argument)
    if path is not None:
        # The fc of torchvision's ResNet is replaced by the identity in R3M; bare ResNet files may still have
        # one.
        weights.fit(network, convnet(weights.read(path)), f"{name} ({path})", surplus=("fc.", *LANGUAGE))
    return timm_image.ImageEncoder(network, DATA)


def convnet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> torchvision's: ``[module.]convnet.conv1.weight`` -> ``conv1.weight``."""
    return {key.removeprefix("module.").removeprefix("convnet."): one for key, one in state.items()}

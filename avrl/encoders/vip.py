"""VIP: a ResNet-50 whose 1,024 outputs measure how far a frame is from a goal; trained on Ego4D.

It takes bytes: divided by 255, then ImageNet's mean and standard deviation, inside. Its own code enlarges every frame
to 256 px and cuts 224 out of the middle, also where it is 224 px already (a `torch.Size` is compared with a list);
not here, see `avrl.encoders.timm_image`.
Source: Ma et al. 2022, github.com/facebookresearch/vip 0b6c9df (`VIP.forward`, `load_vip`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from avrl.encoders import name_of, r3m, timm_image, weights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

WIDTH = 1024  # of the published checkpoint's last layer


class VipEncoder(timm_image.ImageEncoder):
    """Readouts ``embedding``, in which VIP measures distance, and the ResNet's ``pool`` and ``grid``."""

    def _readouts(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        found = super()._readouts(x_BCHW)
        return {"embedding": self.network.get_submodule("fc")(found["pool"]).float(), **found}


def load(argument: str, init: str, weights_file: Path | None = None) -> VipEncoder:
    """VIP on ``resnet50``, the only one published.

    Raises:
        ConfigError: `init` is neither ``pretrained`` nor ``random``.
        MissingError: the weights are not at hand.
        IntegrityError: the weights do not fit.
    """
    name = name_of(__name__, argument)
    path = weights.find(name, weights_file) if timm_image.is_pretrained(init) else None
    return encoder(argument, weights.read(path) if path else None, f"{name} ({path})")


def encoder(argument: str, state: dict[str, Tensor] | None = None, what: str = "it") -> VipEncoder:
    """VIP on one of timm's ResNets, with weights in the published layout or, without, seeded random ones.

    Raises:
        IntegrityError: the weights do not fit `what`.
    """
    network = timm_image.build(argument)
    with timm_image.seeded():
        network.fc = nn.Linear(network.num_features, WIDTH)
    if state is not None:
        weights.fit(network, r3m.convnet(state), what)
    return VipEncoder(network, r3m.DATA)

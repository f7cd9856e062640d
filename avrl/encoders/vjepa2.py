"""V-JEPA 2 (ViT-L, 256 px): the encoder alone; the predictor of its pretraining is left out.

A pair is one tubelet: two frames that each token sees at once, as in pretraining, but with no more time around it
(there, 64 frames). Positions are rotations, so a clip of any length is legal.
V-JEPA 2.1 is another network: `avrl.encoders.vjepa2_1`.
Source: Assran et al. 2025 (arXiv:2506.09985); huggingface.co/facebook/vjepa2-vitl-fpc64-256, code in transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avrl.encoders import timm_image, video, weights

if TYPE_CHECKING:
    from pathlib import Path

NAME = "vjepa2"
SETTINGS: dict[str, Any] = {}  # transformers' defaults are ViT-L at 256 px
DATA = {
    "input_size": (3, 256, 256),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
}


def load(argument: str, init: str, weights_file: Path | None = None) -> video.PairEncoder:
    """V-JEPA 2: readouts ``patch-mean`` (1,024) and ``grid``.

    Raises:
        ConfigError: `init` is neither ``pretrained`` nor ``random``.
        MissingError: transformers or the weights are not at hand.
        IntegrityError: the weights do not fit.
    """
    path = weights.find(NAME, weights_file) if timm_image.is_pretrained(init) else None
    return assemble(path, SETTINGS, DATA)


def assemble(path: Path | None, settings: dict[str, Any], data: dict[str, Any]) -> video.PairEncoder:
    """The encoder of a config, with the weights of a file.

    Raises:
        MissingError: transformers is not installed.
        IntegrityError: the weights do not fit.
    """
    encoder = video.build(NAME, "VJEPA2Model", "VJEPA2Config", settings).encoder
    if path:
        state = {key.removeprefix("encoder."): one for key, one in weights.read(path).items()}
        weights.fit(encoder, state, f"{NAME} ({path})", surplus=("predictor.",))
    return video.PairEncoder(video.Clip(encoder, 1, 2), data)

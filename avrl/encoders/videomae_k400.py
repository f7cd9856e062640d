"""The published VideoMAE (ViT-B, Kinetics-400, 16 frames), beside our objective ``videomae``, which is another.

It was trained on 16 frames that are 4 apart at 25 to 30 fps. A pair has two: frame t is shown eight times, then
frame t+gap eight times; of the eight time steps (tubelets of 2 frames) four see only t and four only t+gap, and what
changed is left to attention. It costs what a whole clip costs: 1,568 tokens a pair.
Source: Tong et al. 2022 (arXiv:2203.12602); huggingface.co/MCG-NJU/videomae-base, code in transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avrl.encoders import timm_image, video, weights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

NAME = "videomae-k400"
SETTINGS: dict[str, Any] = {"use_mean_pooling": False}  # the rest of ViT-B, 16 frames, is transformers' default
TUBELET, REPEATS = 2, 8
DATA = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
}
# The half of the pretraining that rebuilds pixels.
SURPLUS = ("decoder.", "encoder_to_decoder.", "mask_token")


def load(argument: str, init: str, weights_file: Path | None = None) -> video.PairEncoder:
    """VideoMAE: readouts ``patch-mean`` (768) and ``grid``.

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
    network = video.build(NAME, "VideoMAEModel", "VideoMAEConfig", settings)
    if path:
        weights.fit(network, translate(weights.read(path)), f"{NAME} ({path})", surplus=SURPLUS)
    return video.PairEncoder(video.Clip(network, REPEATS, TUBELET), data)


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published keys -> those of today's transformers.

    The file has its biases as ``q_bias`` and ``v_bias``; releases that did not know them loaded it without a word,
    with biases of zero.
    """
    renamed = {".attention.q_bias": ".attention.query.bias", ".attention.v_bias": ".attention.value.bias"}
    out = {}
    for key, one in state.items():
        name = key.removeprefix("videomae.")
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        out[name] = one
    return out

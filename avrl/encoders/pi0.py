"""pi0's eye: PaliGemma's SigLIP tower (So400m, 14 px patches at 224 px), as training on robot actions left it.

timm's network, with the GELU that PaliGemma has (the tanh form; timm's SigLIP has the exact one), without a pooling
head, which PaliGemma has not: the policy reads the patch tokens behind the final norm, and so do we.
Frames go in as -1..1; they are square, so the policy's padding has nothing to do, and a resize is PIL's bilinear
one, as openpi's client has it.
Source: Black et al. 2024 (arXiv:2410.24164); src/lerobot/policies/pi0/modeling_pi0.py in huggingface/lerobot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from avrl.encoders import ENCODERS, timm_image, towers, weights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

NAME = "pi0"
NETWORK = "vit_so400m_patch14_siglip_224"
SETTINGS = {"global_pool": "", "act_layer": "gelu_tanh"}
DATA = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
RENAMED = {
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "embeddings.position_embedding.weight": "pos_embed",
    "encoder.layers.": "blocks.",
    ".layer_norm": ".norm",
    ".self_attn.out_proj.": ".attn.proj.",
    "post_layernorm.": "norm.",
}


def load(argument: str, init: str, weights_file: Path | None = None) -> timm_image.ImageEncoder:
    """pi0's vision tower: readouts ``patch-mean`` (1,152) and ``grid``.

    Raises:
        ConfigError: `init` is neither ``pretrained`` nor ``random``.
        MissingError: the weights are not at hand.
        IntegrityError: they do not fit.
    """
    path = weights.find(NAME, weights_file) if timm_image.is_pretrained(init) else None
    return assemble(path, timm_image.build(NETWORK, **SETTINGS))


def assemble(path: Path | None, network: Any) -> timm_image.ImageEncoder:
    """The encoder of a network, with the weights of a file.

    Raises:
        IntegrityError: they do not fit.
    """
    if path:
        weights.fit(network, translate(towers.read(path, ENCODERS[NAME].part)), f"{NAME} ({path})")
    return timm_image.ImageEncoder(network, DATA)


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of transformers' SigLIP -> timm's; what is not known keeps its name, and is refused by it.

    Files that transformers 5 wrote lack the ``vision_model.`` that earlier ones have.
    """
    out: dict[str, Tensor] = {}
    for key, one in state.items():
        name = key.removeprefix("vision_model.")
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        out[name] = one[None] if name == "pos_embed" else one
    for query in [key for key in out if ".self_attn.q_proj." in key]:
        three = [query.replace(".q_proj.", f".{one}_proj.") for one in "qkv"]
        if all(key in out for key in three):
            out[query.replace(".self_attn.q_proj.", ".attn.qkv.")] = torch.cat([out.pop(key) for key in three])
    return out

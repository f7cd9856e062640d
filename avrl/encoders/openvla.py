"""OpenVLA's eyes: DINOv2 and SigLIP side by side, as training on robot actions left them.

Each tower gives the patch tokens of its second-last block, without the final norm; the two are joined place by
place: 1,024 + 1,152 dimensions at 16x16 places. What lies behind that block (the last block, the norm, SigLIP's
pooling) is published, and used by nobody.
Source: Kim et al. 2024 (arXiv:2406.09246); `PrismaticVisionBackbone` in openvla/openvla,
prismatic/extern/hf/modeling_prismatic.py, and the preprocessor_config.json published with openvla/openvla-7b.
Shapes: B frames, C=3 RGB, H=W=224 px, N=256 places, D dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from avrl.encoders import ENCODERS, timm_image, towers, weights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

NAME = "openvla"
# timm's name -> what is asked of it. The exact GELU was trained on, and is stated: SigLIP's own is the tanh form.
NETWORKS: dict[str, dict[str, Any]] = {
    "vit_large_patch14_reg4_dinov2.lvd142m": {},
    "vit_so400m_patch14_siglip_224": {"act_layer": "gelu"},
}
# ImageNet's, as the published processor has them: rounded to bfloat16. So the network was trained.
DINO_MEAN, DINO_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
# Frames go in as 0..1; each tower has its own mean and deviation.
DATA = {"input_size": (3, 224, 224), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bicubic"}


class FusedTower(nn.Module):
    """Two transformers that see the same picture; its parts have the published names.

    Args:
        featurizer: timm's network of the DINO half; it is cut off behind its second-last block.
        fused_featurizer: The same of the SigLIP half.
    """

    num_prefix_tokens = 0  # class token and registers are gone
    mean: Tensor
    std: Tensor

    def __init__(self, featurizer: Any, fused_featurizer: Any) -> None:
        super().__init__()
        # Keys of what lies behind the block, which files have and we have not.
        self.surplus = tuple(
            f"{half}.{part}"
            for half, network in (("featurizer", featurizer), ("fused_featurizer", fused_featurizer))
            for part in (f"blocks.{len(network.blocks) - 1}.", "norm.", "attn_pool.")
        )
        for network in (featurizer, fused_featurizer):
            network.prune_intermediate_layers([len(network.blocks) - 2], prune_norm=True)
        self.featurizer, self.fused_featurizer = featurizer, fused_featurizer
        values = {"mean": (DINO_MEAN, SIGLIP_MEAN), "std": (DINO_STD, SIGLIP_STD)}
        for name, halves in values.items():
            self.register_buffer(name, torch.tensor(halves).reshape(2, 3, 1, 1), persistent=False)

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """0..1 (B, 3, 224, 224) -> (B, N, D), both halves of a place together."""
        halves = zip((self.featurizer, self.fused_featurizer), self.mean, self.std, strict=True)
        tokens = [
            network.forward_features((x_BCHW - mean) / std)[:, network.num_prefix_tokens :]
            for network, mean, std in halves
        ]
        return torch.cat(tokens, 2)


def load(argument: str, init: str, weights_file: Path | None = None) -> timm_image.ImageEncoder:
    """OpenVLA's towers: readouts ``patch-mean`` (2,176) and ``grid``.

    Raises:
        ConfigError: `init` is neither ``pretrained`` nor ``random``.
        MissingError: the weights are not at hand.
        IntegrityError: they do not fit.
    """
    path = weights.find(NAME, weights_file) if timm_image.is_pretrained(init) else None
    return assemble(path, *(timm_image.build(name, **settings) for name, settings in NETWORKS.items()))


def assemble(path: Path | None, featurizer: Any, fused_featurizer: Any) -> timm_image.ImageEncoder:
    """The encoder of two networks, with the weights of a file.

    Raises:
        IntegrityError: they do not fit.
    """
    tower = FusedTower(featurizer, fused_featurizer)
    if path:
        state = towers.read(path, ENCODERS[NAME].part)
        # transformers renames every `gamma` it meets, so LayerScale's was published under another name.
        state = {key.replace(".scale_factor", ".gamma"): one for key, one in state.items()}
        weights.fit(tower, state, f"{NAME} ({path})", surplus=tower.surplus)
    return timm_image.ImageEncoder(tower, DATA)

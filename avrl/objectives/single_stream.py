"""Single-Stream: the same nine channels (M and P) into one transformer, with Two-Stream's decoder and loss.

The decoder's tokens of frame t come from a patch embedding of P alone: the transformer's own patches have seen
M, and M's patches in the decoder would give the target away (see `avrl.objectives.prediction`).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from avrl.objectives import vit
from avrl.objectives.channels import M_CHANNELS, P_CHANNELS, magno, parvo
from avrl.objectives.prediction import PairEncoder, Prediction


class SingleStream(nn.Module):
    """(img_t, img_tk) in [0, 1] -> tokens of frame t (B, N, D) and ``change_emb`` (B, D)."""

    def __init__(self, size: vit.Size, image_size: int) -> None:
        super().__init__()
        dim = size.embed_dim
        self.tokens = vit.Tokens(M_CHANNELS + P_CHANNELS, image_size, dim)
        self.blocks = vit.blocks(dim, size.num_heads, size.depth)
        self.norm = vit.norm(dim)
        self.form = nn.Conv2d(P_CHANNELS, dim, vit.PATCH_SIZE, vit.PATCH_SIZE)
        self.change = nn.Linear(dim, dim)

    def stream(self, img_t_BCHW: Tensor, img_tk_BCHW: Tensor) -> Tensor:
        """Final tokens, CLS first: (B, 1+N, D)."""
        channels = torch.cat([magno(img_t_BCHW, img_tk_BCHW), parvo(img_t_BCHW)], 1)
        return cast("Tensor", self.norm(self.blocks(self.tokens(channels))))

    def forward(self, img_t_BCHW: Tensor, img_tk_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        cls = self.stream(img_t_BCHW, img_tk_BCHW)[:, 0]
        return self.form(parvo(img_t_BCHW)).flatten(2).mT, self.change(cls)

    def plain(self) -> vit.Plain:
        """See `avrl.objectives.Objective.plain`."""
        channels = "dL, dR, dG, dB (frame t+k minus frame t), Sobel x, Sobel y, R, G, B (of frame t)"
        return vit.Plain(self.tokens, self.blocks, self.norm, channels)


def _encoder(network: nn.Module) -> PairEncoder:
    model = cast("SingleStream", network)
    dim = model.change.out_features

    def read(img_t: Tensor, img_tk: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tokens = model.stream(img_t, img_tk)
        cls, patches = tokens[:, 0], tokens[:, 1:]
        vectors = {
            "cls": cls,
            "change": model.change(cls),
            "patch-mean": patches.mean(1),
            "grid": vit.grid(patches),
        }
        return vectors, patches

    side = round(len(model.tokens.position) ** 0.5)
    readouts = {"cls": dim, "change": dim, "patch-mean": dim, "grid": 9 * dim}
    return PairEncoder(read, readouts, side * vit.PATCH_SIZE)


def create(size: str, image_size: int, *, loss_decay: float, mask_ratio: float) -> Prediction:
    """Single-Stream of a size in `vit.SIZES`; it masks nothing, so ``mask_ratio`` has no part in it."""
    shape = vit.SIZES[size]
    return Prediction(SingleStream(shape, image_size), _encoder, shape, image_size, loss_decay)

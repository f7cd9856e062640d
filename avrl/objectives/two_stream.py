"""Two-Stream: one transformer sees change (M), one sees form (P); their CLS tokens exchange after stages 1 and 2.

Shapes: B samples, N patches, D embed_dim. ``img_pred, change_emb = model.predict(img_t, img_tk)``.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from avrl.objectives import vit
from avrl.objectives.channels import M_CHANNELS, P_CHANNELS, magno, parvo
from avrl.objectives.prediction import PairEncoder, Prediction

STAGES = 3


class TwoStream(nn.Module):
    """(img_t, img_tk) in [0, 1] -> tokens of frame t (B, N, D) and ``change_emb`` (B, D)."""

    def __init__(self, size: vit.Size, image_size: int) -> None:
        super().__init__()
        dim, depth = size.embed_dim, size.depth // STAGES
        self.m_tokens = vit.Tokens(M_CHANNELS, image_size, dim)
        self.p_tokens = vit.Tokens(P_CHANNELS, image_size, dim)
        self.m_stages = nn.ModuleList(vit.blocks(dim, size.num_heads, depth) for _ in range(STAGES))
        self.p_stages = nn.ModuleList(vit.blocks(dim, size.num_heads, depth) for _ in range(STAGES))
        self.exchanges = nn.ModuleList(vit.blocks(dim, size.num_heads, 1) for _ in range(STAGES - 1))
        self.m_norm, self.p_norm = vit.norm(dim), vit.norm(dim)
        self.fuse = nn.Linear(2 * dim, dim)

    def streams(self, img_t_BCHW: Tensor, img_tk_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Final tokens of both streams, CLS first: two (B, 1+N, D)."""
        m = self.m_tokens(magno(img_t_BCHW, img_tk_BCHW))
        p = self.p_tokens(parvo(img_t_BCHW))
        for stage in range(STAGES):
            m, p = self.m_stages[stage](m), self.p_stages[stage](p)
            if stage < STAGES - 1:
                both = self.exchanges[stage](torch.stack([m[:, 0], p[:, 0]], 1))
                m = torch.cat([both[:, :1], m[:, 1:]], 1)
                p = torch.cat([both[:, 1:], p[:, 1:]], 1)
        return self.m_norm(m), self.p_norm(p)

    def forward(self, img_t_BCHW: Tensor, img_tk_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        m, p = self.streams(img_t_BCHW, img_tk_BCHW)
        return p[:, 1:], self.fuse(torch.cat([m[:, 0], p[:, 0]], 1))


def _encoder(network: nn.Module) -> PairEncoder:
    model = cast("TwoStream", network)
    dim = model.fuse.out_features

    def read(img_t: Tensor, img_tk: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        m, p = model.streams(img_t, img_tk)
        patches = torch.cat([m[:, 1:], p[:, 1:]], 2)
        cls = torch.cat([m[:, 0], p[:, 0]], 1)
        vectors = {
            "cls": cls,
            "m": m[:, 0],
            "p": p[:, 0],
            "change": model.fuse(cls),
            "patch-mean": patches.mean(1),
            "grid": vit.grid(patches),
        }
        return vectors, patches

    readouts = {"cls": 2 * dim, "m": dim, "p": dim, "change": dim, "patch-mean": 2 * dim, "grid": 18 * dim}
    side = round(len(model.m_tokens.position) ** 0.5)
    return PairEncoder(read, readouts, side * vit.PATCH_SIZE)


def create(size: str, image_size: int, *, loss_decay: float, mask_ratio: float) -> Prediction:
    """Two-Stream of a size in `vit.SIZES`; it masks nothing, so ``mask_ratio`` has no part in it."""
    shape = vit.SIZES[size]
    return Prediction(TwoStream(shape, image_size), _encoder, shape, image_size, loss_decay)

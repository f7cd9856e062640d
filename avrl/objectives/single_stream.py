"""Single-Stream: the same nine channels (M and P) into one transformer, with Two-Stream's decoder and loss.

In the bottleneck wiring the decoder's tokens of frame t come from a patch embedding of P alone: the transformer's
own patches have seen M, and M's patches in the decoder would give the target away (see `avrl.objectives.prediction`).
In the fused wiring they are those patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from avrl.objectives import vit
from avrl.objectives.channels import P_CHANNELS, magno, parvo
from avrl.objectives.prediction import PairEncoder, Prediction

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from avrl.objectives import Network

    See = Callable[[Tensor, Tensor], Tensor]


NINE = (
    *(f"d{one} (frame t+k minus frame t)" for one in "LRGB"),
    *(f"{one} of frame t" for one in ("Sobel x", "Sobel y", "R", "G", "B")),
)


class Form(nn.Conv2d):
    """Patch embedding of P, made of frame t (B, 3, H, W): tokens (B, N, D) for the decoder, without positions."""

    def __init__(self, dim: int) -> None:
        super().__init__(P_CHANNELS, dim, vit.PATCH_SIZE, vit.PATCH_SIZE)

    def forward(self, img_t_BCHW: Tensor) -> Tensor:
        """See the class."""
        return super().forward(parvo(img_t_BCHW)).flatten(2).mT


class SingleStream(nn.Module):
    """(img_t, img_tk) in [0, 1] -> tokens for the decoder (B, N, D) and ``change_emb`` (B, D).

    Args:
        size: Width and depth.
        image_size: Side of the square input, px.
        channels: What `see` gives, by name.
        see: ``(img_t, img_tk) -> (B, channels, H, W)``.
    """

    def __init__(self, size: vit.Size, image_size: int, channels: Sequence[str], see: See) -> None:
        super().__init__()
        dim = size.embed_dim
        self.channels, self.see = channels, see
        self.tokens = vit.Tokens(len(channels), image_size, dim)
        self.blocks = vit.blocks(dim, size.num_heads, size.depth)
        self.norm = vit.norm(dim)
        self.form: nn.Module | None = Form(dim)
        self.change = nn.Linear(dim, dim)

    def stream(self, img_t_BCHW: Tensor, img_tk_BCHW: Tensor) -> Tensor:
        """Final tokens, CLS first: (B, 1+N, D)."""
        return cast("Tensor", self.norm(self.blocks(self.tokens(self.see(img_t_BCHW, img_tk_BCHW)))))

    def forward(self, img_t_BCHW: Tensor, img_tk_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        tokens = self.stream(img_t_BCHW, img_tk_BCHW)
        return tokens[:, 1:] if self.form is None else self.form(img_t_BCHW), self.change(tokens[:, 0])

    def plain(self) -> vit.Plain:
        """See `avrl.objectives.Objective.plain`."""
        return vit.Plain(self.tokens, self.blocks, self.norm, ", ".join(self.channels))


def nine(img_t_BCHW: Tensor, img_tk_BCHW: Tensor) -> Tensor:
    """M and P, one after the other (B, 9, H, W)."""
    return torch.cat([magno(img_t_BCHW, img_tk_BCHW), parvo(img_t_BCHW)], 1)


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


def build(network: Network, channels: Sequence[str], see: See) -> Prediction:
    """One transformer on the channels that `see` makes of both frames."""
    size = vit.SIZES[network.size]
    model = SingleStream(size, network.image_size, channels, see)
    objective = Prediction(model, _encoder, size, network.image_size, network.loss_decay)
    if network.decoder == "fused":
        model.form = None  # after the weights are drawn: the rest starts as in the other wiring
    return objective


def create(network: Network) -> Prediction:
    """Single-Stream; it masks nothing, so ``mask_ratio`` has no part in it."""
    return build(network, NINE, nine)

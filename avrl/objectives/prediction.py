"""Predict frame t+k from frame t and one vector of change: the loss of Two-Stream and Single-Stream.

In the "bottleneck" wiring the decoder sees the tokens of frame t and ``change_emb``, nothing else of frame t+k: RGB(t)
plus the change channels *is* the target, so patches of the change in the decoder make the task trivial. In the "fused"
wiring it sees those patches and ``change_emb`` beside them, which is how ``change_emb`` gets a gradient there at all.
It predicts the change, so that copying frame t costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from avrl.objectives import vit
from avrl.objectives.channels import unit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Decoder(nn.Module):
    """Tokens by location (B, N, D) + change_emb (B, D) -> predicted frame t+k (B, 3, H, W), around frame t."""

    def __init__(self, size: vit.Size, image_size: int) -> None:
        super().__init__()
        dim = size.decoder_dim
        self.form = nn.Linear(size.embed_dim, dim)
        self.change = nn.Linear(size.embed_dim, dim)
        self.blocks = vit.blocks(dim, max(1, dim // 64), size.decoder_depth)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 3 * vit.PATCH_SIZE**2)
        self.register_buffer("position", vit.positions(dim, image_size // vit.PATCH_SIZE), persistent=False)

    def forward(self, form_BND: Tensor, change_emb_BD: Tensor, img_t_BCHW: Tensor) -> Tensor:
        """See the class."""
        tokens = self.form(form_BND) + self.position + self.change(change_emb_BD).unsqueeze(1)
        return img_t_BCHW + vit.unpatchify(self.head(self.norm(self.blocks(tokens))))


class Prediction(nn.Module):
    """Weighted squared error of the predicted frame t+k.

    Args:
        network: ``(img_t, img_tk) -> (tokens for the decoder (B, N, D), change_emb (B, D))``.
        encoder: Makes the encoder that shares the network's weights.
        size: Widths and depths.
        image_size: Side of the square input, px.
        loss_decay: Weight of gap k is loss_decay^(k-1).
    """

    baseline = "copy of frame t"

    def __init__(
        self,
        network: nn.Module,
        encoder: Callable[[nn.Module], PairEncoder],
        size: vit.Size,
        image_size: int,
        loss_decay: float,
    ) -> None:
        super().__init__()
        self.network, self.decoder = network, Decoder(size, image_size)
        self.image_size, self.loss_decay, self._encoder = image_size, loss_decay, encoder
        vit.initialise(self)
        nn.init.zeros_(self.decoder.head.weight)  # the first prediction is the copy of frame t: skill starts at 0

    def predict(self, img_t_BCHW: Tensor, img_tk_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted frame t+k and ``change_emb``, from two frames in [0, 1]."""
        form, change_emb = self.network(img_t_BCHW, img_tk_BCHW)
        return self.decoder(form, change_emb, img_t_BCHW), change_emb

    def loss(self, frames_BTHWC: Tensor, gap_B: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        """Mean over samples of loss_decay^(gap-1) times the squared error; see `avrl.objectives.Objective`."""
        img_t, img_tk = unit(frames_BTHWC, self.image_size).unbind(1)
        predicted, _ = self.predict(img_t, img_tk)
        error_B = (predicted.float() - img_tk).square().mean((1, 2, 3))
        copy_B = (img_t - img_tk).square().mean((1, 2, 3))
        weight_B = self.loss_decay ** (gap_B - 1).float()
        return {
            "loss": (weight_B * error_B).mean(),
            "error": error_B.detach().mean(),
            "reference": copy_B.mean(),
        }

    def forward(self, frames_BTHWC: Tensor, gap_B: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        """The loss: DDP hooks into ``forward``, so training calls nothing else."""
        return self.loss(frames_BTHWC, gap_B, seed_B)

    def panels(self, frames_BTHWC: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        """See `avrl.objectives.Objective`."""
        img_t, img_tk = unit(frames_BTHWC, self.image_size).unbind(1)
        return {"frame t": img_t, "prediction": self.predict(img_t, img_tk)[0].clamp(0, 1), "target": img_tk}

    def encoder(self) -> PairEncoder:
        """The encoder to keep."""
        return self._encoder(self.network)

    def plain(self) -> vit.Plain | None:
        """What the network has, if it is one plain transformer; see `avrl.objectives.Objective`."""
        offer = getattr(self.network, "plain", None)
        return offer() if offer else None


class PairEncoder:
    """A pretrained network as an `avrl.encoders.Encoder` of frame pairs.

    Args:
        read: ``(img_t, img_tk) -> name -> (B, D)`` and the patches (B, N, D); it may carry gradients.
        readouts: Names and dimensions of what `read` gives.
        image_size: px.
    """

    paired = True

    def __init__(
        self,
        read: Callable[[Tensor, Tensor], tuple[dict[str, Tensor], Tensor]],
        readouts: dict[str, int],
        image_size: int,
    ) -> None:
        self.read, self.image_size = read, image_size
        self.readouts: Mapping[str, int] = readouts

    @torch.inference_mode()
    def codes(self, frames_BTHWC: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What `encode` and `patches` give, of one pass: readouts (B, D), and patches in rows (B, N, D)."""
        readouts, patches = self.read(*self._unit(frames_BTHWC))
        return {name: z.float() for name, z in readouts.items()}, patches.float()

    def encode(self, frames_BTHWC: Tensor) -> dict[str, Tensor]:
        """See `avrl.encoders.Encoder`."""
        return self.codes(frames_BTHWC)[0]

    def patches(self, frames_BTHWC: Tensor) -> Tensor:
        """(B, h, w, D), see `avrl.encoders.Encoder`."""
        patches = self.codes(frames_BTHWC)[1]
        side = round(patches.shape[1] ** 0.5)
        return patches.view(len(patches), side, side, -1)

    def _unit(self, frames_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
        if frames_BTHWC.ndim != 5 or frames_BTHWC.shape[1] != 2:
            raise ValueError(f"frames must be (B, 2, H, W, 3), got {tuple(frames_BTHWC.shape)}")
        img_t, img_tk = unit(frames_BTHWC, self.image_size).unbind(1)
        return img_t, img_tk

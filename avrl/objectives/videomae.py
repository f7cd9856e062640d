"""VideoMAE on two frames: hide most patches of both frames, predict their pixels from the rest.

With two frames there is one tubelet in time, so tube masking is plain image masking of a 6-channel picture.
That is the plan's setting (mask ratio 0.75) and not the official recipe (16 frames, 0.9).
Source: Tong et al. 2022 (VideoMAE) and He et al. 2022 (MAE), whose CLS token we keep for the readout.

Legend: B samples, N patches, V visible patches, D embed_dim.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from avrl.objectives import vit
from avrl.objectives.channels import unit
from avrl.objectives.prediction import PairEncoder

FRAMES = 2
TINY = 1e-6


class VideoMAE(nn.Module):
    """Masked autoencoder of frame pairs; see the module.

    Args:
        size: Widths and depths.
        image_size: Side of the square input, px.
        mask_ratio: Share of patches hidden, (0, 1).
        loss_decay: Weight of gap k is loss_decay^(k-1).
    """

    baseline = "mean of each patch and colour"

    def __init__(self, size: vit.Size, image_size: int, mask_ratio: float, loss_decay: float) -> None:
        super().__init__()
        self.image_size, self.mask_ratio, self.loss_decay = image_size, mask_ratio, loss_decay
        dim, narrow = size.embed_dim, size.decoder_dim
        self.tokens = vit.Tokens(3 * FRAMES, image_size, dim)
        self.blocks = vit.blocks(dim, size.num_heads, size.depth)
        self.norm = vit.norm(dim)
        self.narrow = nn.Linear(dim, narrow)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, narrow))
        self.decoder = vit.blocks(narrow, max(1, narrow // 64), size.decoder_depth)
        self.decoder_norm = nn.LayerNorm(narrow)
        self.head = nn.Linear(narrow, 3 * FRAMES * vit.PATCH_SIZE**2)
        side = image_size // vit.PATCH_SIZE
        self.register_buffer("position", vit.positions(narrow, side), persistent=False)
        self.hidden = round(mask_ratio * side**2)
        vit.initialise(self)

    def loss(self, frames_BTHWC: Tensor, gap_B: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        """Squared error on hidden patches, each patch normalised; see `avrl.objectives.Objective`."""
        predicted, truth = self.predict(frames_BTHWC, seed_B)
        error_B = (predicted - truth).square().mean((1, 2))
        weight_B = self.loss_decay ** (gap_B - 1).float()
        return {
            "loss": (weight_B * error_B).mean(),
            "error": error_B.detach().mean(),
            "reference": truth.square().mean(),
        }

    def predict(self, frames_BTHWC: Tensor, seed_B: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted and true normalised pixels of the hidden patches: two (B, N - V, 2 * 3 * PATCH_SIZE^2)."""
        picture = unit(frames_BTHWC, self.image_size).flatten(1, 2)
        target = _normalised(vit.patchify(picture))
        order = noise(seed_B, target.shape[1]).argsort(dim=1, stable=True)
        hidden, visible = order[:, : self.hidden], order[:, self.hidden :]
        return self._reconstruct(picture, hidden, visible).float(), _pick(target, hidden)

    def _reconstruct(self, picture_BCHW: Tensor, hidden_BN: Tensor, visible_BV: Tensor) -> Tensor:
        """Predicted pixels of the hidden patches, from the visible ones and CLS."""
        patches = _pick(self.tokens.patches(picture_BCHW), visible_BV)
        cls = self.tokens.cls.expand(len(patches), -1, -1)
        seen = self.narrow(self.norm(self.blocks(torch.cat([cls, patches], 1))))
        where = cast("Tensor", self.position)
        tokens = torch.cat([seen[:, :1], seen[:, 1:] + where[visible_BV], self.mask_token + where[hidden_BN]], 1)
        decoded = self.decoder_norm(self.decoder(tokens))
        return cast("Tensor", self.head(decoded[:, -hidden_BN.shape[1] :]))

    def forward(self, frames_BTHWC: Tensor, gap_B: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        """The loss: DDP hooks into ``forward``, so training calls nothing else."""
        return self.loss(frames_BTHWC, gap_B, seed_B)

    def encoder(self) -> PairEncoder:
        """The encoder on all patches, nothing hidden."""
        dim = self.norm.normalized_shape[0]

        def read(img_t: Tensor, img_tk: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            tokens = self.norm(self.blocks(self.tokens(torch.cat([img_t, img_tk], 1))))
            cls, patches = tokens[:, 0], tokens[:, 1:]
            return {"cls": cls, "patch-mean": patches.mean(1), "grid": vit.grid(patches)}, patches

        return PairEncoder(read, {"cls": dim, "patch-mean": dim, "grid": 9 * dim}, self.image_size)

    def plain(self) -> vit.Plain:
        """See `avrl.objectives.Objective.plain`."""
        return vit.Plain(self.tokens, self.blocks, self.norm, "R, G, B of frame t, R, G, B of frame t+k, in [0, 1]")


def _normalised(patches_BND: Tensor) -> Tensor:
    """Each patch with zero mean and unit variance over its pixels of both frames, colour by colour.

    As VideoMAE has it: normalised over all colours at once, most of the variance is the patch's tint, and a
    network that knows no more than the mean picture has a skill of .4.
    """
    cubes = patches_BND.view(*patches_BND.shape[:2], FRAMES, 3, -1)
    var, mean = torch.var_mean(cubes, dim=(2, 4), keepdim=True)
    normalised: Tensor = ((cubes - mean) / (var + TINY).sqrt()).flatten(2)
    return normalised


def _pick(patches_BND: Tensor, index_BN: Tensor) -> Tensor:
    return patches_BND.gather(1, index_BN.unsqueeze(-1).expand(-1, -1, patches_BND.shape[-1]))


def noise(seed_B: Tensor, n: int) -> Tensor:
    """(B, n) integers that depend on each sample's seed alone: the mask is the same on any rank or device.

    A 31-bit multiply-xor mix (the finaliser of MurmurHash3) in int64, where no product can overflow.
    """
    x = (seed_B.unsqueeze(1) ^ (torch.arange(n, device=seed_B.device) * 0x9E3779B1)) & 0x7FFFFFFF
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0x7FFFFFFF
    return x


def create(size: str, image_size: int, *, loss_decay: float, mask_ratio: float) -> VideoMAE:
    """VideoMAE of a size in `vit.SIZES`."""
    return VideoMAE(vit.SIZES[size], image_size, mask_ratio, loss_decay)

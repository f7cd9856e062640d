"""VideoMAE: hide most patches of a clip, the same places in every frame, predict their pixels from the rest.

A token is a tubelet: a patch of two frames that follow each other. With two frames there is one in time, so tube
masking is plain image masking of a 6-channel picture: the plan's setting (mask ratio 0.75). With 16 frames there are
eight, masked as tubes (0.9): the official recipe, but for three things. Positions are a sine-cosine of the place plus
one of the time, where the official table counts tokens through; the target is of frames in [0, 1]; and there is a
CLS token, MAE's, for the readout.
Source: Tong et al. 2022 (VideoMAE) and He et al. 2022 (MAE).

An encoder of 16 frames is asked for pairs (t, t+gap) as well: its first eight frames are then t, the last eight t+gap,
each slot the nearer of the two in time. Blends of the two frames would be pictures that no camera has taken.

Legend: B samples, S tubelets in time, N places, V visible places, C=6 channels of a tubelet, D embed_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from avrl.objectives import vit
from avrl.objectives.channels import unit
from avrl.objectives.prediction import PairEncoder

if TYPE_CHECKING:
    from avrl.objectives import Network

FRAMES = 2  # of a tubelet
TINY = 1e-6


class VideoMAE(nn.Module):
    """Masked autoencoder of frame pairs, or of clips; see the module and `avrl.objectives.Network`."""

    baseline = "mean of each patch and colour"

    def __init__(self, network: Network) -> None:
        super().__init__()
        size, self.image_size, self.loss_decay = vit.SIZES[network.size], network.image_size, network.loss_decay
        dim, narrow = size.embed_dim, size.decoder_dim
        self.tubelets = network.num_frames // FRAMES
        self.tokens = vit.Tokens(3 * FRAMES, self.image_size, dim)
        self.blocks = vit.blocks(dim, size.num_heads, size.depth)
        self.norm = vit.norm(dim)
        self.narrow = nn.Linear(dim, narrow)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, narrow))
        self.decoder = vit.blocks(narrow, max(1, narrow // 64), size.decoder_depth)
        self.decoder_norm = nn.LayerNorm(narrow)
        self.head = nn.Linear(narrow, 3 * FRAMES * vit.PATCH_SIZE**2)
        side = self.image_size // vit.PATCH_SIZE
        self.position: Tensor
        self.time: Tensor
        self.narrow_time: Tensor
        self.register_buffer("position", vit.positions(narrow, side), persistent=False)
        for name, width in (("time", dim), ("narrow_time", narrow)):  # (S, 1, width): zeros for one tubelet
            self.register_buffer(name, vit.times(width, self.tubelets).unsqueeze(1), persistent=False)
        self.hidden = min(round(network.mask_ratio * side**2), side**2 - 1)  # one place is seen, however few there are
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
        """Predicted and true normalised pixels of the hidden tubelets: two (B, S * (N - V), 2 * 3 * PATCH_SIZE^2).

        Tubelets lie in the order of time, and within a time in the order of the sample's noise.
        """
        clip = self._tubelets(unit(frames_BTHWC, self.image_size))
        target = _normalised(vit.patchify(clip.flatten(0, 1)))
        target = target.view(*clip.shape[:2], *target.shape[1:])
        hidden, visible = self._places(seed_B)
        return self._reconstruct(clip, hidden, visible).float(), _pick(target, hidden)

    def _places(self, seed_B: Tensor) -> tuple[Tensor, Tensor]:
        """Which places of each sample are hidden, and which are seen."""
        order = noise(seed_B, len(self.position)).argsort(dim=1, stable=True)
        return order[:, : self.hidden], order[:, self.hidden :]

    def _tubelets(self, frames_BTCHW: Tensor) -> Tensor:
        """Frames in [0, 1] (B, T, 3, H, W), two at a time as one picture of six channels: (B, S, 6, H, W)."""
        return frames_BTCHW.reshape(len(frames_BTCHW), self.tubelets, -1, *frames_BTCHW.shape[3:])

    def _patches(self, clip_BSCHW: Tensor) -> Tensor:
        """Tokens of all tubelets with their positions: (B, S, N, D)."""
        patches: Tensor = self.tokens.patches(clip_BSCHW.flatten(0, 1))
        return patches.view(*clip_BSCHW.shape[:2], *patches.shape[1:]) + self.time

    def _encoded(self, patches_BND: Tensor) -> Tensor:
        """Final tokens, CLS first."""
        cls = self.tokens.cls.expand(len(patches_BND), -1, -1)
        return cast("Tensor", self.norm(self.blocks(torch.cat([cls, patches_BND], 1))))

    def _reconstruct(self, clip_BSCHW: Tensor, hidden_BN: Tensor, visible_BV: Tensor) -> Tensor:
        """Predicted pixels of the hidden tubelets, from the visible ones and CLS."""
        visible = _pick(self._patches(clip_BSCHW), visible_BV)
        seen = self.narrow(self._encoded(visible))
        cls, seen = seen.tensor_split([seen.shape[1] - visible.shape[1]], 1)
        where = (self.position + self.narrow_time).expand(len(seen), -1, -1, -1)
        tokens = torch.cat([cls, seen + _pick(where, visible_BV), self.mask_token + _pick(where, hidden_BN)], 1)
        decoded = self.decoder_norm(self.decoder(tokens))
        return cast("Tensor", self.head(decoded[:, -self.tubelets * hidden_BN.shape[1] :]))

    def forward(self, frames_BTHWC: Tensor, gap_B: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        """The loss: DDP hooks into ``forward``, so training calls nothing else."""
        return self.loss(frames_BTHWC, gap_B, seed_B)

    def panels(self, frames_BTHWC: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        """See `avrl.objectives.Objective`: the first two frames side by side, what is hidden in grey.

        A prediction has no tint and no contrast: it gets those of the true patch, as MAE's authors draw it.
        """
        patches = vit.patchify(unit(frames_BTHWC[:, :FRAMES], self.image_size).flatten(1, 2))
        where = self._places(seed_B)[0].unsqueeze(-1).expand(-1, -1, patches.shape[-1])
        cubes = patches.gather(1, where).view(*where.shape[:2], FRAMES, 3, -1)
        var, mean = _moments(cubes)
        predicted = self.predict(frames_BTHWC, seed_B)[0][:, : self.hidden].view_as(cubes)
        drawn = (predicted * (var + TINY).sqrt() + mean).clamp(0, 1).flatten(2)
        found = {
            "seen": patches.scatter(1, where, torch.full_like(drawn, 0.5)),
            "reconstruction": patches.scatter(1, where, drawn),
            "target": patches,
        }
        pictures = {name: vit.unpatchify(one, 3 * FRAMES) for name, one in found.items()}
        return {name: torch.cat(one.chunk(FRAMES, 1), 3) for name, one in pictures.items()}

    def encoder(self) -> PairEncoder:
        """The encoder on all patches, nothing hidden."""
        dim = self.norm.normalized_shape[0]

        def read(img_t: Tensor, img_tk: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            clip = torch.stack([img_t, img_tk], 1).repeat_interleave(self.tubelets, 1)
            tokens = self._encoded(self._patches(self._tubelets(clip)).flatten(1, 2))
            cls, patches = tokens[:, 0], tokens[:, 1:].reshape(len(tokens), self.tubelets, -1, dim).mean(1)
            return {"cls": cls, "patch-mean": patches.mean(1), "grid": vit.grid(patches)}, patches

        return PairEncoder(read, {"cls": dim, "patch-mean": dim, "grid": 9 * dim}, self.image_size)

    def plain(self) -> vit.Plain | None:
        """See `avrl.objectives.Objective.plain`; timm has no transformer of several tubelets in time."""
        if self.tubelets > 1:
            return None
        return vit.Plain(self.tokens, self.blocks, self.norm, "R, G, B of frame t, R, G, B of frame t+k, in [0, 1]")


def _normalised(patches_BND: Tensor) -> Tensor:
    """Each patch with zero mean and unit variance over its pixels of both frames, colour by colour.

    As VideoMAE has it: normalised over all colours at once, most of the variance is the patch's tint, and a
    network that knows no more than the mean picture has a skill of .4.
    """
    cubes = patches_BND.view(*patches_BND.shape[:2], FRAMES, 3, -1)
    var, mean = _moments(cubes)
    normalised: Tensor = ((cubes - mean) / (var + TINY).sqrt()).flatten(2)
    return normalised


def _moments(cubes: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean of (B, N, frames, colours, pixels), for each patch and colour."""
    var, mean = torch.var_mean(cubes, dim=(2, 4), keepdim=True)
    return var, mean


def _pick(patches_BSND: Tensor, index_BV: Tensor) -> Tensor:
    """The same places at every time, one time after the other: (B, S * V, D)."""
    index = index_BV[:, None, :, None].expand(-1, patches_BSND.shape[1], -1, patches_BSND.shape[3])
    return patches_BSND.gather(2, index).flatten(1, 2)


def noise(seed_B: Tensor, n: int) -> Tensor:
    """(B, n) integers that depend on each sample's seed alone: the mask is the same on any rank or device.

    A 31-bit multiply-xor mix (the finaliser of MurmurHash3) in int64, where no product can overflow.
    """
    x = (seed_B.unsqueeze(1) ^ (torch.arange(n, device=seed_B.device) * 0x9E3779B1)) & 0x7FFFFFFF
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0x7FFFFFFF
    return x


def create(network: Network) -> VideoMAE:
    """VideoMAE of 2 frames, or of 16."""
    return VideoMAE(network)

"""Wirings that `tests.benchmarks.learning` compares with those of avrl: other decoders, other M, hidden patches.

All start from avrl's own Two-Stream of the same seed, weight by weight, and change what this file says.

Legend: B samples, C channels, N patches, V patches that are seen, K motion tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from avrl.objectives import Network, create, vit
from avrl.objectives.channels import magno, parvo, unit
from avrl.objectives.prediction import Prediction
from avrl.objectives.two_stream import TwoStream
from avrl.objectives.videomae import noise

if TYPE_CHECKING:
    from avrl.objectives import Objective


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """What is compared.

    Attributes:
        network: Fields of `Network` that are not the default.
        condition: How the decoder hears of the change: ``add`` (avrl's), ``film`` or ``cross``.
        motion_tokens: 1 (``change_emb``), or so many, each a learned query over the patches of M.
        luma: M without dR, dG, dB.
        hide_m: Share of M's patches that are hidden in training; the loss is taken there. M's patches that are seen
            go to the decoder at their places.
        hide_p: Share of P's patches that are hidden as well.
        sample_decay: Of gaps.
        loss_decay: Of gaps.
        gaps: See `avrl.pairs.Sampling`.
        max_gap: Frames.
    """

    network: tuple[tuple[str, object], ...] = ()
    condition: str = "add"
    motion_tokens: int = 1
    luma: bool = False
    hide_m: float = 0.0
    hide_p: float = 0.0
    sample_decay: float = 1.0
    loss_decay: float = 1.0
    gaps: str = "ratio"
    max_gap: int = 10


def of(objective: str = "two-stream", **fields: object) -> tuple[tuple[str, object], ...]:
    """A network as a wiring keeps it."""
    return (("objective", objective), *fields.items())


TWO = of()
WIRINGS = {
    "bottleneck": Wiring(network=TWO),
    "fused": Wiring(network=of(decoder="fused")),
    "film, 1 token": Wiring(network=TWO, condition="film"),
    "film, 8 tokens": Wiring(network=TWO, condition="film", motion_tokens=8),
    "cross-attention, 1 token": Wiring(network=TWO, condition="cross"),
    "cross-attention, 8 tokens": Wiring(network=TWO, condition="cross", motion_tokens=8),
    "M without dRGB": Wiring(network=TWO, luma=True),
    "75% of M hidden": Wiring(network=TWO, hide_m=0.75),
    "95% of M hidden": Wiring(network=TWO, hide_m=0.95),
    "STP: 95% of M, 75% of P hidden": Wiring(network=TWO, hide_m=0.95, hide_p=0.75),
    "gaps .8, weights .5 (the plan's)": Wiring(network=TWO, sample_decay=0.8, loss_decay=0.5),
    "gaps .8": Wiring(network=TWO, sample_decay=0.8),
    "weights .5": Wiring(network=TWO, loss_decay=0.5),
    "gaps triangular": Wiring(network=TWO, gaps="triangular"),
    "gaps to 20": Wiring(network=TWO, max_gap=20),
    "m-only": Wiring(network=of(ablate="m-only")),
    "p-only": Wiring(network=of(ablate="p-only")),
    "no-exchange": Wiring(network=of(ablate="no-exchange")),
    "one exchange": Wiring(network=of(exchanges=1)),
    "three exchanges": Wiring(network=of(exchanges=3)),
    "early-fusion": Wiring(network=of(ablate="early-fusion")),
    "single-stream": Wiring(network=of("single-stream")),
    "single-stream, gaps to 20": Wiring(network=of("single-stream"), max_gap=20),
    "single-stream fused": Wiring(network=of("single-stream", decoder="fused")),
    "videomae": Wiring(network=of("videomae")),
    # The official recipe; a clip of 16 frames a gap of up to 3 apart is as long as the set's shortest allow.
    "videomae, 16 frames": Wiring(network=of("videomae", num_frames=16, mask_ratio=0.9), max_gap=3),
}


def build(wiring: Wiring, size: str, image_size: int, seed: int) -> Objective:
    """The objective with fresh weights of this seed."""
    torch.manual_seed(seed)
    fixed = {"size": size, "image_size": image_size, "loss_decay": wiring.loss_decay, "mask_ratio": 0.75, "seed": seed}
    objective = create(Network(**{**fixed, **dict(wiring.network)}))  # type: ignore[arg-type]
    if wiring.luma:
        network = cast("TwoStream", objective.network)  # type: ignore[attr-defined]
        network.m_tokens = vit.initialised(vit.Tokens(1, image_size, vit.SIZES[size].embed_dim))
        network.__class__ = LumaTwoStream
    if wiring.hide_m or wiring.condition != "add":
        objective = Rewired(cast("Prediction", objective), wiring, vit.SIZES[size])
    return objective


class LumaTwoStream(TwoStream):
    """Two-Stream whose M is dL alone."""

    def streams(self, img_t_BCHW: Tensor, img_tk_BCHW: Tensor) -> dict[str, Tensor]:
        """See `TwoStream`."""
        m = self.m_tokens(magno(img_t_BCHW, img_tk_BCHW)[:, :1])
        return self.through({"m": m, "p": self.p_tokens(parvo(img_t_BCHW))})


class Rewired(nn.Module):
    """A prediction of frame t+k by another decoder, or from streams with patches hidden."""

    baseline = Prediction.baseline

    def __init__(self, whole: Prediction, wiring: Wiring, size: vit.Size) -> None:
        super().__init__()
        self.network, self.image_size, self.loss_decay = whole.network, whole.image_size, whole.loss_decay
        self.encoder, self.plain, self.wiring = whole.encoder, whole.plain, wiring
        dim, wide = size.decoder_dim, size.embed_dim
        self.decoder = whole.decoder
        heads = max(1, dim // 64)
        count = wiring.motion_tokens
        if count > 1:
            self.queries = nn.Parameter(torch.randn(1, count, wide) * 0.02)
            self.pool = nn.MultiheadAttention(wide, heads, batch_first=True)
        if wiring.condition == "film":
            self.film = nn.ModuleList(nn.Linear(count * wide, 2 * dim) for _ in self.decoder.blocks)
            for one in self.film:
                nn.init.zeros_(one.weight)
                nn.init.zeros_(one.bias)
        if wiring.condition == "cross":
            self.key = nn.Linear(wide, dim)
            self.ask = nn.ModuleList(vit.norm(dim) for _ in self.decoder.blocks)
            self.cross = nn.ModuleList(nn.MultiheadAttention(dim, heads, batch_first=True) for _ in self.decoder.blocks)
        if wiring.hide_m:
            self.m_form = vit.initialised(nn.Linear(wide, dim))
            self.mask_tokens = nn.Parameter(torch.randn(2, dim) * 0.02)

    def motion(self, tokens: dict[str, Tensor]) -> Tensor:
        """Motion tokens (B, K, D): ``change_emb``, or what learned queries find among the patches of M."""
        if self.wiring.motion_tokens > 1:
            m_BND = tokens["m"]
            found: Tensor = self.pool(self.queries.expand(len(m_BND), -1, -1), m_BND, m_BND, need_weights=False)[0]
            return found
        change: Tensor = self.network.fuse(torch.cat([one[:, 0] for one in tokens.values()], 1))  # type: ignore[operator]
        return change.unsqueeze(1)

    def decode(self, form_BND: Tensor, motion_BKD: Tensor) -> Tensor:
        """Predicted change (B, 3, H, W)."""
        d, x = self.decoder, form_BND + self.decoder.position
        if self.wiring.condition == "add":
            x = x + d.change(motion_BKD[:, 0]).unsqueeze(1)
        for i, block in enumerate(d.blocks):
            if self.wiring.condition == "film":
                scale, shift = self.film[i](motion_BKD.flatten(1)).unsqueeze(1).chunk(2, 2)
                x = x * (1 + scale) + shift
            if self.wiring.condition == "cross":
                key = self.key(motion_BKD)
                x = x + self.cross[i](self.ask[i](x), key, key, need_weights=False)[0]
            x = block(x)
        return vit.unpatchify(d.head(d.norm(x)))

    def predict(self, img_t: Tensor, img_tk: Tensor, seed_B: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted frame t+k, and where the loss is taken (B, N) of 0 and 1."""
        network, wiring = cast("TwoStream", self.network), self.wiring
        everywhere = torch.ones(len(img_t), len(self.decoder.position), device=img_t.device)
        if not wiring.hide_m:
            tokens = network.streams(img_t, img_tk)
            form = self.decoder.form(tokens["p"][:, 1:])
            return img_t + self.decode(form, self.motion(tokens)), everywhere
        m, p = network.m_tokens(magno(img_t, img_tk)), network.p_tokens(parvo(img_t))
        m, m_seen = part(m, wiring.hide_m, seed_B)
        p, p_seen = part(p, wiring.hide_p, seed_B + 1)
        tokens = network.through({"m": m, "p": p})
        form = placed(self.decoder.form(tokens["p"][:, 1:]), p_seen, self.mask_tokens[0], everywhere.shape[1])
        form = form + placed(self.m_form(tokens["m"][:, 1:]), m_seen, self.mask_tokens[1], everywhere.shape[1])
        return img_t + self.decode(form, self.motion(tokens)), everywhere.scatter(1, m_seen, 0.0)

    def loss(self, frames_BTHWC: Tensor, gap_B: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        """As `Prediction.loss`, over the places where the loss is taken."""
        img_t, img_tk = unit(frames_BTHWC, self.image_size).unbind(1)
        predicted, where_BN = self.predict(img_t, img_tk, seed_B)
        share_BN = where_BN / where_BN.sum(1, keepdim=True)
        error_B = (vit.patchify(predicted - img_tk).square().mean(2) * share_BN).sum(1)
        copy_B = (vit.patchify(img_t - img_tk).square().mean(2) * share_BN).sum(1)
        weight_B = self.loss_decay ** (gap_B - 1).float()
        return {"loss": (weight_B * error_B).mean(), "error": error_B.detach().mean(), "reference": copy_B.mean()}

    def forward(self, frames_BTHWC: Tensor, gap_B: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        """The loss."""
        return self.loss(frames_BTHWC, gap_B, seed_B)


def part(tokens_BND: Tensor, hidden: float, seed_B: Tensor) -> tuple[Tensor, Tensor]:
    """CLS and the patches that are seen (B, 1+V, D), and which they are (B, V)."""
    n = tokens_BND.shape[1] - 1
    seen_BV = noise(seed_B, n).argsort(1)[:, : max(1, n - round(hidden * n))]
    at = seen_BV.unsqueeze(2).expand(-1, -1, tokens_BND.shape[2])
    return torch.cat([tokens_BND[:, :1], tokens_BND[:, 1:].gather(1, at)], 1), seen_BV


def placed(seen_BVD: Tensor, at_BV: Tensor, mask_D: Tensor, n: int) -> Tensor:
    """Patches at their places, the mask token at the others (B, N, D)."""
    blank = mask_D.expand(len(seen_BVD), n, -1)
    return blank.scatter(1, at_BV.unsqueeze(2).expand(-1, -1, seen_BVD.shape[2]), seen_BVD)

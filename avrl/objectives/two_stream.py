"""Two-Stream: one transformer sees change (M), one sees form (P); their CLS tokens exchange between the stages.

Ablations take parts away from one and the same network: all weights are drawn first, in an order that does not
depend on what will go, so what stays starts from the same values in each. What an ablation adds is drawn last.

Shapes: B samples, N patches, D embed_dim. ``img_pred, change_emb = model.predict(img_t, img_tk)``.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from avrl.objectives import single_stream, vit
from avrl.objectives.channels import M_CHANNELS, P_CHANNELS, magno, parvo
from avrl.objectives.prediction import PairEncoder, Prediction
from avrl.objectives.single_stream import NINE

if TYPE_CHECKING:
    from avrl.objectives import Network

STAGES = 3
BOTH = tuple(f"{one} of frame {when}" for when in ("t", "t+k") for one in "RGB")  # of the early fusion
ONE_STREAM = {"m-only": "m", "p-only": "p"}


class TwoStream(nn.Module):
    """(img_t, img_tk) in [0, 1] -> tokens for the decoder (B, N, D) and ``change_emb`` (B, D)."""

    def __init__(self, size: vit.Size, image_size: int) -> None:
        super().__init__()
        dim, depth = size.embed_dim, size.depth // STAGES
        self.names = ["m", "p"]
        self.m_tokens = vit.Tokens(M_CHANNELS, image_size, dim)
        self.p_tokens = vit.Tokens(P_CHANNELS, image_size, dim)
        self.m_stages = nn.ModuleList(vit.blocks(dim, size.num_heads, depth) for _ in range(STAGES))
        self.p_stages = nn.ModuleList(vit.blocks(dim, size.num_heads, depth) for _ in range(STAGES))
        self.exchanges = nn.ModuleList(vit.blocks(dim, size.num_heads, 1) for _ in range(STAGES - 1))
        self.m_norm, self.p_norm = vit.norm(dim), vit.norm(dim)
        self.fuse = nn.Linear(2 * dim, dim)
        self.form: nn.Module | None = None  # embeds P for a decoder that no stream serves
        self.fuse_patches: nn.Module | None = None

    def exchange(self, times: int, num_heads: int) -> None:
        """Let the CLS tokens exchange after the first so many stages."""
        if times > len(self.exchanges):
            self.exchanges.append(vit.initialised(vit.blocks(self.fuse.out_features, num_heads, 1)))
        del self.exchanges[times:]

    def keep(self, name: str) -> None:
        """Take the other stream away; what is left of the fusion is the half of its matrix for this one."""
        half = nn.Linear(self.fuse.out_features, self.fuse.out_features)
        half.load_state_dict({"weight": self.fuse.weight.chunk(2, 1)[self.names.index(name)], "bias": self.fuse.bias})
        (other,) = set(self.names) - {name}
        for part in ("tokens", "stages", "norm"):
            delattr(self, f"{other}_{part}")
        self.names, self.fuse = [name], half
        self.exchanges = nn.ModuleList()
        if name == "m":
            self.form = vit.initialised(single_stream.Form(half.out_features))

    def fuse_wiring(self) -> None:
        """Give the decoder the patches of all streams, fused location by location."""
        dim = self.fuse.out_features
        self.form, self.fuse_patches = None, vit.initialised(nn.Linear(len(self.names) * dim, dim))

    def streams(self, img_t_BCHW: Tensor, img_tk_BCHW: Tensor) -> dict[str, Tensor]:
        """Final tokens of each stream, CLS first: m, p -> (B, 1+N, D)."""
        tokens = {}
        if "m" in self.names:
            tokens["m"] = self.m_tokens(magno(img_t_BCHW, img_tk_BCHW))
        if "p" in self.names:
            tokens["p"] = self.p_tokens(parvo(img_t_BCHW))
        return self.through(tokens)

    def through(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tokens of each stream, CLS first, through the stages and what they exchange; some patches may be missing."""
        for stage in range(STAGES):
            tokens = {name: getattr(self, f"{name}_stages")[stage](one) for name, one in tokens.items()}
            if stage < len(self.exchanges):
                both = self.exchanges[stage](torch.stack([one[:, 0] for one in tokens.values()], 1))
                tokens = {
                    name: torch.cat([cls.unsqueeze(1), tokens[name][:, 1:]], 1)
                    for name, cls in zip(tokens, both.unbind(1), strict=True)
                }
        return {name: getattr(self, f"{name}_norm")(one) for name, one in tokens.items()}

    def forward(self, img_t_BCHW: Tensor, img_tk_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        tokens = self.streams(img_t_BCHW, img_tk_BCHW)
        change_emb = self.fuse(torch.cat([one[:, 0] for one in tokens.values()], 1))
        if self.fuse_patches is not None:
            return self.fuse_patches(torch.cat([one[:, 1:] for one in tokens.values()], 2)), change_emb
        return tokens["p"][:, 1:] if self.form is None else self.form(img_t_BCHW), change_emb

    def plain(self) -> vit.Plain | None:
        """See `avrl.objectives.Objective.plain`: one stream alone is one transformer, two that exchange are none."""
        if len(self.names) > 1:
            return None
        (name,) = self.names
        tokens, stages, norm = (getattr(self, f"{name}_{part}") for part in ("tokens", "stages", "norm"))
        channels = NINE[:M_CHANNELS] if name == "m" else NINE[M_CHANNELS:]
        return vit.Plain(tokens, nn.Sequential(*chain(*stages)), norm, ", ".join(channels))


def _encoder(network: nn.Module) -> PairEncoder:
    model = cast("TwoStream", network)
    dim, count = model.fuse.out_features, len(model.names)

    def read(img_t: Tensor, img_tk: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tokens = model.streams(img_t, img_tk)
        patches = torch.cat([one[:, 1:] for one in tokens.values()], 2)
        cls = torch.cat([one[:, 0] for one in tokens.values()], 1)
        vectors = {
            "cls": cls,
            **{name: one[:, 0] for name, one in tokens.items()},
            "change": model.fuse(cls),
            "patch-mean": patches.mean(1),
            "grid": vit.grid(patches),
        }
        return vectors, patches

    readouts = {"cls": count * dim, **dict.fromkeys(model.names, dim), "change": dim}
    readouts |= {"patch-mean": count * dim, "grid": 9 * count * dim}
    side = round(len(getattr(model, f"{model.names[0]}_tokens").position) ** 0.5)
    return PairEncoder(read, readouts, side * vit.PATCH_SIZE)


def _both(img_t_BCHW: Tensor, img_tk_BCHW: Tensor) -> Tensor:
    """The two frames, one after the other (B, 6, H, W)."""
    return torch.cat([img_t_BCHW, img_tk_BCHW], 1)


def create(network: Network) -> Prediction:
    """Two-Stream, or what an ablation leaves of it; it masks nothing, so ``mask_ratio`` has no part in it."""
    if network.ablate == "early-fusion":
        return single_stream.build(network, BOTH, _both)
    size = vit.SIZES[network.size]
    model = TwoStream(size, network.image_size)
    objective = Prediction(model, _encoder, size, network.image_size, network.loss_decay)
    if network.ablate in ONE_STREAM:
        model.keep(ONE_STREAM[network.ablate])
    else:
        model.exchange(0 if network.ablate == "no-exchange" else network.exchanges, size.num_heads)
    if network.decoder == "fused":
        model.fuse_wiring()
    return objective

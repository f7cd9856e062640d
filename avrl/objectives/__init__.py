"""Objectives: what an encoder is pretrained on. One file each; nothing here may know of labels or probes.

Shapes: B samples, T frames (2: t and t+gap; VideoMAE also 16, a gap apart each), H W pixels, C=3 RGB.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor, nn

    from avrl.objectives.prediction import PairEncoder
    from avrl.objectives.vit import Plain

OBJECTIVES = {
    "two-stream": "avrl.objectives.two_stream",
    "single-stream": "avrl.objectives.single_stream",
    "videomae": "avrl.objectives.videomae",
}


@dataclass(frozen=True, kw_only=True)
class Network:
    """What an objective is built from, and what ``config.json`` keeps: plain values.

    The defaults are what a ``config.json`` means that was written before the field was there.

    Attributes:
        objective: In `OBJECTIVES`.
        size: ``tiny``, ``small`` or ``base``.
        image_size: Side of the square input, a multiple of 16 px.
        loss_decay: Weight of gap k in the loss is loss_decay^(k-1).
        mask_ratio: Share of patches that VideoMAE hides.
        seed: Of the initial weights.
        decoder: ``bottleneck`` or ``fused``: which patches the decoder of a prediction sees.
        ablate: ``none``, ``m-only``, ``p-only``, ``no-exchange`` or ``early-fusion``: Two-Stream without a part.
        exchanges: After how many of Two-Stream's three stages the CLS tokens exchange.
        num_frames: Frames of a sample: 2, or 16 for VideoMAE.
    """

    objective: str
    size: str
    image_size: int
    loss_decay: float
    mask_ratio: float
    seed: int
    decoder: str = "bottleneck"
    ablate: str = "none"
    exchanges: int = 2
    num_frames: int = 2

    @property
    def name(self) -> str:
        """What a user calls it: ``two-stream``, ``two-stream-m-only``, ``videomae-16-frames``."""
        odd = {
            self.ablate: self.ablate != "none",
            self.decoder: self.decoder != "bottleneck",
            f"exchanges-{self.exchanges}": self.ablate == "none" and self.exchanges != 2,
            f"{self.num_frames}-frames": self.num_frames != 2,
        }
        return "-".join([self.objective, *(word for word, said in odd.items() if said)])


class Objective(Protocol):
    """A module whose ``forward`` is its loss, so that DDP and a single process run the very same path.

    Attributes:
        baseline: What ``skill`` is measured against, in words.
    """

    baseline: str

    def loss(self, frames_BTHWC: Tensor, gap_B: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            frames_BTHWC: uint8 0..255, any square size.
            gap_B: int64, frames of the store between one and the next.
            seed_B: int64, each sample's own randomness.

        Returns:
            Scalars: ``loss`` to minimise; ``error`` and ``reference``, whose ratio gives
            skill = 1 - error / reference over any number of batches.
        """
        ...

    def panels(self, frames_BTHWC: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        """What a person should see of a batch: name -> pictures (B, 3, H, W) in [0, 1], prediction and target last."""
        ...

    def encoder(self) -> PairEncoder:
        """The encoder to keep; it shares the objective's weights."""
        ...

    def plain(self) -> Plain | None:
        """The transformer that gives the encoder's tokens, if it is one that timm has too; None if it is another."""
        ...


def create(network: Network) -> Objective:
    """Build an objective with fresh weights from torch's current random state."""
    return cast("Objective", importlib.import_module(OBJECTIVES[network.objective]).create(network))


def modules(objective: Objective) -> nn.Module:
    """The objective as the torch module that it is."""
    return cast("nn.Module", objective)

"""Objectives: what an encoder is pretrained on. One file each; nothing here may know of labels or probes.

Shapes: B samples, T=2 frames (t, t+gap), H W pixels, C=3 RGB.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor, nn

    from avrl.encoders import Encoder
    from avrl.objectives.vit import Plain

OBJECTIVES = {
    "two-stream": "avrl.objectives.two_stream",
    "single-stream": "avrl.objectives.single_stream",
    "videomae": "avrl.objectives.videomae",
}


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
            gap_B: int64, frames between the two.
            seed_B: int64, each sample's own randomness.

        Returns:
            Scalars: ``loss`` to minimise; ``error`` and ``reference``, whose ratio gives
            skill = 1 - error / reference over any number of batches.
        """
        ...

    def encoder(self) -> Encoder:
        """The encoder to keep; it shares the objective's weights."""
        ...

    def plain(self) -> Plain | None:
        """The transformer that gives the encoder's tokens, if it is one that timm has too; None if it is another."""
        ...


def create(name: str, *, size: str, image_size: int, loss_decay: float, mask_ratio: float) -> Objective:
    """Build an objective with fresh weights from torch's current random state.

    Args:
        name: In `OBJECTIVES`.
        size: ``tiny``, ``small`` or ``base``.
        image_size: Side of the square input, a multiple of 16 px.
        loss_decay: Weight of gap k in the loss is loss_decay^(k-1).
        mask_ratio: Share of patches that VideoMAE hides.
    """
    module = importlib.import_module(OBJECTIVES[name])
    return cast("Objective", module.create(size, image_size, loss_decay=loss_decay, mask_ratio=mask_ratio))


def modules(objective: Objective) -> nn.Module:
    """The objective as the torch module that it is."""
    return cast("nn.Module", objective)

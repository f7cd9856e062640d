"""Probes: what is fitted on frozen features. One file each.

Legend: N samples, D feature dimensions, K target dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor


class Probe(Protocol):
    """A model of targets given features; it sees the rows that it is fitted on and no others."""

    def fit(self, z_ND: Tensor, y_NK: Tensor) -> Self:
        """Fit on training rows; standardises inside, by these rows alone."""
        ...

    def predict(self, z_ND: Tensor) -> Tensor:
        """Predictions (N, K) float64 in the units of the targets."""
        ...

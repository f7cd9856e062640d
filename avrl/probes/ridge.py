"""Ridge regression as a probe; its solver (`avrl.ridge`) is shared with the meters of pretraining.

Legend: N samples, D feature dimensions, K target dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from avrl.ridge import Path

if TYPE_CHECKING:
    from typing import Self


class Ridge:
    """See `avrl.ridge`.

    Args:
        alpha: One a target dimension, or one for all.
    """

    def __init__(self, alpha: Tensor | float = 1e-2) -> None:
        self.alpha = alpha

    def fit(self, z_ND: Tensor, y_NK: Tensor) -> Self:
        """See `avrl.probes.Probe`."""
        self._path = Path(z_ND, y_NK)
        self._weight_DK = self._path.weights(torch.as_tensor(self.alpha, dtype=torch.float64).expand(y_NK.shape[1]))
        return self

    def predict(self, z_ND: Tensor) -> Tensor:
        """See `avrl.probes.Probe`."""
        return self._path.predict(z_ND, self._weight_DK)

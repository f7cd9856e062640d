"""Ridge regression in closed form, float64: no optimiser, no epochs, nothing that can fail to converge.

Minimises ``|y - Xw|^2 + alpha * n * |w|^2`` on standardised columns. Source: Hoerl & Kennard 1970; the kernel
form for D > N is Saunders et al. 1998. Multiplying alpha by n makes one grid fit any number of samples.

Legend: N samples, D feature dimensions, K target dimensions, A alphas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self

ALPHAS = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 7))  # 1e-6 .. 1e3, two a decade
# A column that varies by less than this share of its own size, or of the typical column's spread, is rounding:
# blown up to unit variance it would let a probe score R2 = -12 (seen in the lab).
CONSTANT = 1e-6


class Ridge:
    """See the module.

    Args:
        alpha: One a target dimension, or one for all.
    """

    def __init__(self, alpha: Tensor | float = 1e-2) -> None:
        self.alpha = alpha

    def fit(self, z_ND: Tensor, y_NK: Tensor) -> Self:
        """See `avrl.probes.Probe`."""
        self._path = Path(z_ND, y_NK)
        alpha = torch.as_tensor(self.alpha, dtype=torch.float64).expand(y_NK.shape[1])
        self._weight_DK = torch.stack([self._path.weight(float(a))[:, k] for k, a in enumerate(alpha)], 1)
        return self

    def predict(self, z_ND: Tensor) -> Tensor:
        """See `avrl.probes.Probe`."""
        return self._path.predict(z_ND, self._weight_DK)


class Path:
    """All ridge solutions on one set of rows, from one eigendecomposition of the smaller Gram matrix."""

    def __init__(self, z_ND: Tensor, y_NK: Tensor) -> None:
        self._mean_D, self._scale_D = standardise(z_ND)
        self._y_mean_K, self._y_scale_K = standardise(y_NK)
        self._x_ND = (z_ND.double() - self._mean_D) * self._scale_D
        y_NK = (y_NK.double() - self._y_mean_K) * self._y_scale_K
        n, d = self._x_ND.shape
        self._dual = d > n
        gram = self._x_ND @ self._x_ND.T if self._dual else self._x_ND.T @ self._x_ND
        values, self._vectors = torch.linalg.eigh(gram / n)
        self._values = values.clamp_min(0)
        target = y_NK if self._dual else self._x_ND.T @ y_NK
        self._rotated = self._vectors.T @ target / n

    def weight(self, alpha: float) -> Tensor:
        """Weights (D, K) on standardised columns."""
        inner = self._vectors @ (self._rotated / (self._values + alpha).unsqueeze(1))
        return self._x_ND.T @ inner if self._dual else inner

    def predict(self, z_ND: Tensor, weight_DK: Tensor) -> Tensor:
        """Predictions (N, K) in the units of the targets; a constant target is predicted by its mean."""
        x_ND = (z_ND.double() - self._mean_D) * self._scale_D
        back = torch.where(self._y_scale_K > 0, 1 / self._y_scale_K.clamp_min(1e-300), 0.0)
        return x_ND @ weight_DK * back + self._y_mean_K


def standardise(z_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and factor of each column; the factor of a near-constant column is 0, which leaves it out."""
    z_ND = z_ND.double()
    mean, std = z_ND.mean(0), z_ND.std(0, unbiased=False)
    floor = CONSTANT * torch.maximum(mean.abs(), std.median())
    return mean, torch.where(std > floor.clamp_min(1e-12), 1 / std.clamp_min(1e-300), 0.0)


def choose_alpha(z_ND: Tensor, y_NK: Tensor, z_valid: Tensor, y_valid: Tensor) -> Tensor:
    """The alpha of `ALPHAS` that is best on validation rows, for each target dimension: (K,)."""
    path = Path(z_ND, y_NK)
    y_valid = y_valid.double()
    errors_AK = torch.stack(
        [(path.predict(z_valid, path.weight(alpha)) - y_valid).square().mean(0) for alpha in ALPHAS]
    )
    return torch.tensor(ALPHAS, dtype=torch.float64)[errors_AK.argmin(0)]

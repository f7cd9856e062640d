"""Ridge regression in closed form, float64: no optimiser, no epochs, nothing that can fail to converge.

Minimises ``|y - Xw|^2 + alpha * n * |w|^2`` on standardised columns. Source: Hoerl & Kennard 1970; the kernel
form for D > N is Saunders et al. 1998. Multiplying alpha by n makes one grid fit any number of samples.

Legend: N samples, D feature dimensions, K target dimensions, A alphas.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALPHAS = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 7))  # 1e-6 .. 1e3, two a decade
# No column is magnified more than this many times the typical one: a near-constant column blown up to unit variance
# let floors and untrained networks score R2 = -12 and -6.4 on a test episode where it moved.
MAGNIFIED = 10
CONSTANT = 1e-12  # a spread below this share of the column's size is rounding, and the column is left out


class Path:
    """All ridge solutions on one set of rows, from one eigendecomposition of the smaller Gram matrix."""

    def __init__(self, z_ND: Tensor, y_NK: Tensor) -> None:
        self._mean_D, self._scale_D = standardise(z_ND)
        self._y_mean_K = y_NK.double().mean(0)  # one alpha a target: its scale cancels
        self._x_ND = (z_ND.double() - self._mean_D) * self._scale_D
        y_NK = y_NK.double() - self._y_mean_K
        n, d = self._x_ND.shape
        self._dual = d > n
        gram = self._x_ND @ self._x_ND.T if self._dual else self._x_ND.T @ self._x_ND
        values, self._vectors = torch.linalg.eigh(gram / n)
        self._values = values.clamp_min(0)
        target = y_NK if self._dual else self._x_ND.T @ y_NK
        self._rotated = self._vectors.T @ target / n

    def weight(self, alpha: float) -> Tensor:
        """Weights (D, K) on standardised columns."""
        inner: Tensor = self._vectors @ (self._rotated / (self._values + alpha).unsqueeze(1))
        return self._x_ND.T @ inner if self._dual else inner

    def weights(self, alpha_K: Tensor) -> Tensor:
        """Weights (D, K), each target with its own alpha."""
        return torch.stack([self.weight(float(alpha))[:, k] for k, alpha in enumerate(alpha_K)], 1)

    def predict(self, z_ND: Tensor, weight_DK: Tensor) -> Tensor:
        """Predictions (N, K) in the units of the targets; a constant target is predicted by its mean."""
        x_ND = (z_ND.double() - self._mean_D) * self._scale_D
        return x_ND @ weight_DK + self._y_mean_K


def standardise(z_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and factor of each column: 1 / std, but at most `MAGNIFIED` over the root mean square of all stds."""
    z_ND = z_ND.double()
    mean, std = z_ND.mean(0), z_ND.std(0, unbiased=False)
    moves = std > CONSTANT * mean.abs().clamp_min(1e-300)
    typical = std.square().mean().sqrt()
    scale = 1 / torch.maximum(std, typical / MAGNIFIED).clamp_min(1e-300)
    return mean, torch.where(moves, scale, 0.0)


def choose_alpha(z_ND: Tensor, y_NK: Tensor, z_valid: Tensor, y_valid: Tensor) -> Tensor:
    """The alpha of `ALPHAS` that is best on validation rows, for each target dimension: (K,)."""
    path = Path(z_ND, y_NK)
    y_valid = y_valid.double()
    errors_AK = torch.stack(
        [(path.predict(z_valid, path.weight(alpha)) - y_valid).square().mean(0) for alpha in ALPHAS]
    )
    return torch.tensor(ALPHAS, dtype=torch.float64)[errors_AK.argmin(0)]

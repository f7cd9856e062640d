"""Ridge regression in closed form, float64: no optimiser, no epochs, nothing that can fail to converge.

Minimises ``|y - Xw|^2 + alpha * n * |w|^2`` on standardised columns. Source: Hoerl & Kennard 1970; the kernel
form for D > N is Saunders et al. 1998. Multiplying alpha by n makes one grid fit any number of samples.

Rows need not be in memory: `Moments` are sums over rows, of size D x D, that add up; the solution, its standardising
and its error on other rows all follow from them. Where D > N, rows are fewer than their moments: `Path` takes them.

Legend: N samples, D feature dimensions, K target dimensions, A alphas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self

ALPHAS = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 7))  # 1e-6 .. 1e3, two a decade
# No column is magnified more than this many times the typical one: a near-constant column blown up to unit variance
# let floors and untrained networks score R2 = -12 and -6.4 on a test episode where it moved.
MAGNIFIED = 10
CONSTANT = 1e-12  # a spread below this share of the column's size is rounding, and the column is left out
ROWS = 2048  # turned to float64 at once
ROUNDING = 1e-12  # of sums of squares: a difference of two that is a smaller share of them is none
SUMS = ("z_D", "zz_DD", "y_K", "yy_K", "zy_DK")


class Moments:
    """Sums over rows of features and targets, as far from an origin near their mean as rounding needs.

    Args:
        origin_D: Subtracted from features before they are multiplied: about their mean, the same for all moments that
            are to be added up. Without it a column of mean 1e4 and spread 1e-3 would be all rounding.
        k: Target dimensions.
    """

    def __init__(self, origin_D: Tensor, k: int) -> None:
        self.origin_D = origin_D.double()
        d = len(origin_D)
        self.n = 0
        self.z_D, self.zz_DD = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
        self.y_K, self.yy_K = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
        self.zy_DK = torch.zeros(d, k, dtype=torch.float64)

    def add(self, z_ND: Tensor, y_NK: Tensor) -> Self:
        """Take in rows."""
        for z, y in zip(torch.split(z_ND, ROWS), torch.split(y_NK.double(), ROWS), strict=True):
            z = z.to(torch.float64, copy=True).sub_(self.origin_D)
            self.n += len(z)
            self.z_D += z.sum(0)
            self.zz_DD.addmm_(z.T, z)
            self.y_K += y.sum(0)
            self.yy_K += y.square().sum(0)
            self.zy_DK.addmm_(z.T, y)
        return self

    def plus(self, other: Moments) -> Moments:
        """Of the rows of both, about the same origin."""
        return total([self, other])

    def taken_from(self, other: Moments) -> Self:
        """Become those of the rows of `other` that are not here, about the same origin: in place, for they are large.

        What is left is as exact as the sums of all: a fifth is taken away, so little cancels. But a column that moves
        nowhere else has nothing left but rounding, and is made the constant that it is.
        """
        self.n = other.n - self.n
        for name in SUMS:
            getattr(self, name).neg_().add_(getattr(other, name))
        constant_D, zz_D = self.z_D.square() / max(self.n, 1), self.zz_DD.diagonal()
        still_D = zz_D - constant_D <= ROUNDING * other.zz_DD.diagonal()
        zz_D[still_D] = constant_D[still_D]
        return self

    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean of the features from the origin, and the factor that standardises them (see `factor`)."""
        mean_D, square_D = self.z_D / self.n, self.zz_DD.diagonal() / self.n
        variance_D = square_D - mean_D.square()
        variance_D = torch.where(variance_D > ROUNDING * square_D, variance_D, 0.0)
        return mean_D, factor(variance_D.sqrt(), (mean_D + self.origin_D).abs())

    def standardised(self) -> tuple[Tensor, Tensor]:
        """Correlations of standardised features (D, D), and with the centred targets (D, K), both over n."""
        mean_D, scale_D = self.scale()
        zz_DD = (self.zz_DD / self.n).addr_(mean_D, mean_D, alpha=-1).mul_(scale_D).mul_(scale_D.unsqueeze(1))
        zy_DK = (self.zy_DK / self.n - torch.outer(mean_D, self.y_K / self.n)) * scale_D.unsqueeze(1)
        return zz_DD, zy_DK


def total(parts: list[Moments]) -> Moments:
    """Of the rows of all parts, about the same origin."""
    found = Moments(parts[0].origin_D, len(parts[0].y_K))
    for one in parts:
        found.n += one.n
        for name in SUMS:
            getattr(found, name).add_(getattr(one, name))
    return found


@dataclass(frozen=True)
class Fit:
    """A linear map: ``(z - mean) @ weight + y_mean``. Weights are those of plain features, not of standardised ones."""

    mean_D: Tensor
    weight_DK: Tensor
    y_mean_K: Tensor

    def predict(self, z_ND: Tensor) -> Tensor:
        """Predictions (N, K) float64 in the units of the targets; a constant target is predicted by its mean."""
        return (z_ND.double() - self.mean_D) @ self.weight_DK + self.y_mean_K

    def errors(self, rows: Moments) -> Tensor:
        """Mean squared error (K,) on the rows of these moments, which need not be at hand."""
        at_D = (rows.origin_D - self.mean_D).unsqueeze(0)
        offset_K = (at_D @ self.weight_DK)[0] + self.y_mean_K  # prediction = (z - origin) @ weight + offset
        w = self.weight_DK
        squared = (w * (rows.zz_DD @ w)).sum(0) + 2 * offset_K * (rows.z_D @ w) + rows.n * offset_K.square()
        crossed = (w * rows.zy_DK).sum(0) + offset_K * rows.y_K
        return (squared - 2 * crossed + rows.yy_K) / rows.n


class Path:
    """All ridge solutions on one set of rows, from one eigendecomposition of the smaller Gram matrix."""

    def __init__(self, z_ND: Tensor, y_NK: Tensor) -> None:
        n, d = z_ND.shape
        if n >= d:
            self._solve(Moments(z_ND[:ROWS].double().mean(0), y_NK.shape[1]).add(z_ND, y_NK))
            return
        self._mean_D, self._scale_D = standardise(z_ND)
        self._y_mean_K = y_NK.double().mean(0)  # one alpha a target: its scale cancels
        self._x_ND: Tensor | None = (z_ND.double() - self._mean_D) * self._scale_D
        values, self._vectors = torch.linalg.eigh(self._x_ND @ self._x_ND.T / n)
        self._values = values.clamp_min(0)
        self._rotated = self._vectors.T @ (y_NK.double() - self._y_mean_K) / n

    @classmethod
    def of(cls, moments: Moments) -> Path:
        """From sums over rows."""
        path = cls.__new__(cls)
        path._solve(moments)
        return path

    def _solve(self, moments: Moments) -> None:
        mean_D, self._scale_D = moments.scale()
        self._mean_D, self._y_mean_K, self._x_ND = mean_D + moments.origin_D, moments.y_K / moments.n, None
        zz_DD, zy_DK = moments.standardised()
        values, self._vectors = torch.linalg.eigh(zz_DD)
        self._values = values.clamp_min(0)
        self._rotated = self._vectors.T @ zy_DK

    def fit(self, alpha_K: Tensor | float) -> Fit:
        """The solution, each target with its own alpha."""
        alpha_K = torch.as_tensor(alpha_K, dtype=torch.float64).expand(len(self._y_mean_K))
        inner: Tensor = self._vectors @ (self._rotated / (self._values.unsqueeze(1) + alpha_K))
        weight_DK = inner if self._x_ND is None else self._x_ND.T @ inner
        return Fit(self._mean_D, weight_DK * self._scale_D.unsqueeze(1), self._y_mean_K)


def solve(moments: Moments, alpha_K: Tensor) -> Fit:
    """One solution without its path: a Cholesky factor for each alpha, a tenth of an eigendecomposition."""
    mean_D, scale_D = moments.scale()
    zz_DD, zy_DK = moments.standardised()
    weight_DK = torch.empty_like(zy_DK)
    for alpha in torch.unique(alpha_K):
        here = alpha_K == alpha
        shrunk_DD = zz_DD.clone()
        shrunk_DD.diagonal().add_(alpha)
        factored_DD, failed = torch.linalg.cholesky_ex(shrunk_DD)
        if failed:  # rounding below nothing, as of a column that hardly moves but in rows that were taken away
            return Path.of(moments).fit(alpha_K)
        weight_DK[:, here] = torch.cholesky_solve(zy_DK[:, here], factored_DD)
    return Fit(mean_D + moments.origin_D, weight_DK * scale_D.unsqueeze(1), moments.y_K / moments.n)


def standardise(z_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each column, and what standardises it (see `factor`)."""
    z_ND = z_ND.double()
    mean_D = z_ND.mean(0)
    return mean_D, factor(z_ND.std(0, unbiased=False), mean_D.abs())


def factor(std_D: Tensor, size_D: Tensor) -> Tensor:
    """1 / std, but at most `MAGNIFIED` over the root mean square of all stds; 0 for a column that does not move."""
    moves = std_D > CONSTANT * size_D.clamp_min(1e-300)
    typical = std_D.square().mean().sqrt()
    scale_D = 1 / torch.maximum(std_D, typical / MAGNIFIED).clamp_min(1e-300)
    return torch.where(moves, scale_D, 0.0)


def best(errors_AK: Tensor) -> Tensor:
    """The alpha of `ALPHAS` of the smallest error, for each target dimension: (K,)."""
    return torch.tensor(ALPHAS, dtype=torch.float64)[errors_AK.argmin(0)]


def choose_alpha(z_ND: Tensor, y_NK: Tensor, z_valid: Tensor, y_valid: Tensor) -> Tensor:
    """The alpha of `ALPHAS` that is best on validation rows, for each target dimension: (K,)."""
    path, y_valid = Path(z_ND, y_NK), y_valid.double()
    return best(torch.stack([(path.fit(one).predict(z_valid) - y_valid).square().mean(0) for one in ALPHAS]))


def choose_alpha_of(fitted: Moments, validated: Moments) -> Tensor:
    """As `choose_alpha`, from the moments of the two sets of rows."""
    path = Path.of(fitted)
    return best(torch.stack([path.fit(one).errors(validated) for one in ALPHAS]))

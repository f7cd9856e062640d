"""Ridge regression as a probe of any number of pairs: features are read in stretches and go into sums.

Sums are D x D (`avrl.ridge.Moments`), so memory does not grow with the pairs, and one pass over them serves several
training sets. Where dimensions are more than pairs, the pairs are few, and are taken into memory instead.

Legend: N pairs, D feature dimensions, K target dimensions, P masks, C kinds of rows, M a part of the pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from avrl import splits
from avrl.ridge import Fit, Moments, Path, choose_alpha, choose_alpha_of, solve
from avrl.splits import ALL, Part

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl

    from avrl.probes import Inputs
    from avrl.splits import Split

MEMORY = 2**27  # bytes of sums over left-out rows at once: all five folds of features of up to 1,295 dimensions


def fits(
    vectors: Inputs, y_NK: np.ndarray, parts: Split, episodes: pl.DataFrame, seed: int
) -> Iterator[tuple[Part, Fit, np.ndarray]]:
    """Every fit of one readout with its alpha (K,): first on all of train, then without a fold of tasks, then on a few.

    Test targets are not looked at, and no test row is read. Tasks are left out only where pairs are more than twice the
    dimensions.
    """
    y = torch.from_numpy(y_NK)
    whole = Part(ALL, parts.fit_N, parts.validate_N, parts.test_N)
    if whole.fit_N.sum() > vectors.dims:
        enough = whole.fit_N.sum() > 2 * vectors.dims  # a fold takes a fifth away and costs an eigendecomposition
        yield from _with_folds(vectors, y, whole, splits.folds(parts, episodes, seed) if enough else [])
    else:
        yield _fit_rows(vectors, y, whole)
    for part in splits.few(parts, seed):
        if part.fit_N.sum() > vectors.dims:
            yield _fit_sums(part, *_sums(vectors, y, [part.fit_N, part.validate_N]))
        else:
            yield _fit_rows(vectors, y, part)


def _with_folds(
    vectors: Inputs, y: torch.Tensor, whole: Part, pairs: list[tuple[Part, Part]]
) -> Iterator[tuple[Part, Fit, np.ndarray]]:
    """All of train, then without the tasks of each fold, then without as many episodes of any task."""
    sums = _sums(vectors, y, [whole.fit_N, whole.validate_N])
    yield _fit_sums(whole, *sums)
    alphas = []
    for given in _without(vectors, y, whole, sums, [new for new, _ in pairs]):
        found = _fit_sums(*given)
        del given  # before the next are made: sums are gigabytes where features are wide
        alphas.append(found[2])
        yield found
    # The same strength for the same test rows: the two differ in what they were trained on and in nothing else.
    for given in _without(vectors, y, whole, sums, [known for _, known in pairs]):
        found = _fit_sums(*given, alpha_K=alphas.pop(0))
        del given
        yield found


def _fit_sums(
    part: Part, fitted: Moments, validated: Moments, *, alpha_K: np.ndarray | None = None
) -> tuple[Part, Fit, np.ndarray]:
    """From moments; at the strength that is best on the validating rows, unless it is given."""
    alpha = choose_alpha_of(fitted, validated) if alpha_K is None else torch.from_numpy(alpha_K)
    return part, solve(fitted.plus(validated), alpha), alpha.numpy()


def _fit_rows(vectors: Inputs, y: torch.Tensor, part: Part) -> tuple[Part, Fit, np.ndarray]:
    """Fewer pairs than dimensions: they fit into memory."""
    train_N = np.flatnonzero(part.fit_N | part.validate_N)
    z = torch.from_numpy(np.concatenate([block for _, block in vectors.blocks(train_N)]))
    fit, y = torch.from_numpy(part.fit_N[train_N]), y[train_N]
    alpha_K = choose_alpha(z[fit], y[fit], z[~fit], y[~fit])
    return part, Path(z, y).fit(alpha_K), alpha_K.numpy()


def _without(
    vectors: Inputs, y: torch.Tensor, whole: Part, sums: list[Moments], parts: list[Part]
) -> Iterator[tuple[Part, Moments, Moments]]:
    """Moments of the fitted and of the validating rows of each part: those of the whole less what it leaves out.

    So many parts are taken at once as `MEMORY` allows: sums of wide features are gigabytes.
    """
    at_once = max(1, MEMORY // (2 * 8 * vectors.dims**2))
    for some in (parts[at : at + at_once] for at in range(0, len(parts), at_once)):
        masks = [mask for part in some for mask in (whole.fit_N & ~part.fit_N, whole.validate_N & ~part.validate_N)]
        left_out = _sums(vectors, y, masks, sums[0].origin_D)
        for part in some:
            yield part, left_out.pop(0).taken_from(sums[0]), left_out.pop(0).taken_from(sums[1])


def _sums(
    vectors: Inputs, y: torch.Tensor, masks: list[np.ndarray], origin_D: torch.Tensor | None = None
) -> list[Moments]:
    """Moments of some sets of rows in one pass over all."""
    found: list[Moments] = []
    for index, block in vectors.blocks(np.flatnonzero(np.any(masks, 0))):
        z = torch.from_numpy(block)
        if not found:
            found = [Moments(z.double().mean(0) if origin_D is None else origin_D, y.shape[1]) for _ in masks]
        for moments, mask_N in zip(found, masks, strict=True):
            here = torch.from_numpy(mask_N[index])
            moments.add(z[here], y[index][here])
    return found

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
from avrl.ridge import Fit, Moments, Path, choose_alpha, choose_alpha_of, solve, total
from avrl.splits import ALL, Part

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl

    from avrl.probes import Inputs
    from avrl.splits import Split


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
        pairs = splits.folds(parts, episodes, seed) if enough else []
        alphas = []
        for part, fitted, validated in _moments(vectors, y, [whole, *(new for new, _ in pairs)]):
            alphas.append(choose_alpha_of(fitted, validated))
            yield part, solve(fitted.plus(validated), alphas[-1]), alphas[-1].numpy()
        # The same strength for the same test rows: the two differ in what they were trained on and in nothing else.
        known = _moments(vectors, y, [known for _, known in pairs])
        for alpha_K, (part, fitted, validated) in zip(alphas[1:], known, strict=True):
            yield part, solve(fitted.plus(validated), alpha_K), alpha_K.numpy()
    else:
        yield _fit_rows(vectors, y, whole)
    for part in splits.few(parts, seed):
        if part.fit_N.sum() > vectors.dims:
            ((_, fitted, validated),) = _moments(vectors, y, [part])
            alpha_K = choose_alpha_of(fitted, validated)
            yield part, solve(fitted.plus(validated), alpha_K), alpha_K.numpy()
        else:
            yield _fit_rows(vectors, y, part)


def _fit_rows(vectors: Inputs, y: torch.Tensor, part: Part) -> tuple[Part, Fit, np.ndarray]:
    """Fewer pairs than dimensions: they fit into memory."""
    train_N = np.flatnonzero(part.fit_N | part.validate_N)
    z = torch.from_numpy(np.concatenate([block for _, block in vectors.blocks(train_N)]))
    fit, y = torch.from_numpy(part.fit_N[train_N]), y[train_N]
    alpha_K = choose_alpha(z[fit], y[fit], z[~fit], y[~fit])
    return part, Path(z, y).fit(alpha_K), alpha_K.numpy()


def _moments(vectors: Inputs, y: torch.Tensor, wanted: list[Part]) -> Iterator[tuple[Part, Moments, Moments]]:
    """Moments of the fitted and of the validating rows of each part, in one pass over the rows of all.

    Rows that all parts treat alike are added up once, as a cell; a part's moments are the sum of its cells.
    """
    if not wanted:
        return
    masks_NP = np.stack([mask for part in wanted for mask in (part.fit_N, part.validate_N)], 1)
    at = np.flatnonzero(masks_NP.any(1))
    kinds_CP, cell_M = np.unique(masks_NP[at], axis=0, return_inverse=True)
    cells: list[Moments] = []
    for index, block in vectors.blocks(at):
        z = torch.from_numpy(block)
        if not cells:
            cells = [Moments(z.double().mean(0), y.shape[1]) for _ in kinds_CP]
        of = cell_M.reshape(-1)[np.searchsorted(at, index)]
        for cell in np.unique(of):
            here = torch.from_numpy(of == cell)
            cells[cell].add(z[here], y[index][here])
    for p, part in enumerate(wanted):
        chosen = [
            [one for one, kind in zip(cells, kinds_CP[:, column], strict=True) if kind] for column in (2 * p, 2 * p + 1)
        ]
        yield part, total(chosen[0]), total(chosen[1])

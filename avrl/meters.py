"""Collapse meters: does a code still tell pictures apart? On CLS and on patches, as one may collapse without the other.

Legend: N samples, D feature dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 512  # patches that are looked at: the singular values of more would cost more than the forward pass


def meters(cls_ND: Tensor, patches_ND: Tensor) -> dict[str, float]:
    """All meters of both codes, under the names of the log's columns.

    Args:
        cls_ND: A vector a picture.
        patches_ND: A vector a patch; `ROWS` of them are taken, always the same.
    """
    chosen = torch.randperm(len(patches_ND), generator=torch.Generator().manual_seed(0))[:ROWS]
    found: dict[str, float] = {}
    for name, z_ND in (("cls", cls_ND.double().cpu()), ("patches", patches_ND.cpu()[chosen].double())):
        found |= {f"rank_{name}": effective_rank(z_ND), f"cosine_{name}": cosine(z_ND), f"std_{name}": spread(z_ND)}
    return found


def effective_rank(z_ND: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of the centred code, in [1, min(N, D)].

    Source: RankMe, Garrido et al. 2023, who do not centre; we do, as the report does, since the mean of the code
    would be its largest direction and hide a collapse of the rest.
    """
    values = torch.linalg.svdvals(z_ND - z_ND.mean(0))
    share = values / values.sum().clamp_min(1e-300)
    return float(torch.special.entr(share).sum().exp())


def cosine(z_ND: Tensor) -> float:
    """Mean cosine of two different rows, in [-1, 1]; 1: all rows point the same way."""
    unit = torch.nn.functional.normalize(z_ND, dim=1)
    n = len(unit)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1)))


def spread(z_ND: Tensor) -> float:
    """Mean over dimensions of the standard deviation over rows; the code comes out of a LayerNorm, so 1 is much."""
    return float(z_ND.std(0).mean())

"""Collapse meters: their values where they are known, and what they say of a code that collapses."""

import pytest
import torch

from avrl.meters import cosine, effective_rank, meters, spread


def code(n=64, d=16, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_effective_rank_is_the_number_of_equal_directions():
    axes = torch.eye(8, dtype=torch.float64)[:5].repeat(2, 1)
    axes[5:] *= -1  # five directions, mean zero
    assert effective_rank(axes + 3) == pytest.approx(5)
    assert effective_rank(code()[:, :1] @ code(1, 16)) == pytest.approx(1, abs=1e-6)
    assert effective_rank(code()) > 14


def test_the_mean_cosine_is_that_of_all_pairs():
    z = code() + 0.5
    unit = z / z.norm(dim=1, keepdim=True)
    table = unit @ unit.T
    pairs = table[~torch.eye(len(z), dtype=torch.bool)]
    assert cosine(z) == pytest.approx(float(pairs.mean()))


def test_spread_is_the_mean_deviation_of_a_dimension():
    z = torch.tensor([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    assert spread(z) == pytest.approx(1.0)


def test_patches_may_collapse_while_cls_does_not_and_the_columns_say_so():
    found = meters(code(), torch.ones(4096, 16) + 1e-7 * code(4096))
    assert found["rank_cls"] > 10
    assert abs(found["cosine_cls"]) < 0.1
    assert found["std_cls"] > 0.5
    assert found["cosine_patches"] == pytest.approx(1)
    assert found["std_patches"] < 1e-6
    assert meters(code(), torch.ones(64, 16))["rank_patches"] == pytest.approx(1)  # nothing varies at all

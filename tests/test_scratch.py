"""`avrl.scratch`: an array on disk is the array in memory, and nothing is left of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avrl import scratch


@pytest.mark.parametrize("n", [0, 1, 9, 10, 23])
def test_an_array_on_disk_is_that_in_memory_and_leaves_nothing(tmp_path, monkeypatch, n):
    monkeypatch.setattr(scratch, "BLOCK", 10)
    there, here = (scratch.array((n, 3), one, np.nan) for one in (tmp_path / "scratch", None))
    np.testing.assert_array_equal(there, here)
    for one in (there, here):
        assert one.dtype == np.float64
        one[n // 2 :] = 7
        assert float(torch.from_numpy(one).nansum()) == 21 * (n - n // 2)  # torch warns of what cannot be written to
    np.testing.assert_array_equal(there, here)
    assert list(tmp_path.rglob("*")) == [tmp_path / "scratch"]


def test_arrays_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "BLOCK", 10)
    one, two = np.random.default_rng(0).normal(size=(2, 23, 4))
    for folder in (tmp_path, None):
        np.testing.assert_array_equal(scratch.joined([one, two[:, :2]], folder), np.concatenate([one, two[:, :2]], 1))
    assert scratch.joined([one], tmp_path) is one

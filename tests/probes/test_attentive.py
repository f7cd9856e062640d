"""The attentive probe finds what is planted in patches, in place and in order, and never sees the test."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from made import frame_store

from avrl import splits
from avrl.features import rows_of
from avrl.labels import Target
from avrl.probes import Given, Task, attentive

TASK = {"probe": "bridge", "gap": 2, "target": "reached", "readouts": (), "seed": 0, "resamples": 100}
TASK |= {"solver": "attentive", "samples": 16_000, "data_digests": ("l", "f")}


class Means:
    """Mean colours of 4 x 4 places: enough to see a blob move."""

    readouts, image_size = {"mean": 3}, 32

    def __init__(self, *, paired):
        self.paired = paired

    def patches(self, frames_BTHWC):
        places = frames_BTHWC.float().unflatten(3, (4, 8)).unflatten(2, (4, 8)).mean((3, 5)) / 255
        return torch.cat(list(places.unbind(1)), 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    frames = frame_store(tmp_path_factory.mktemp("attentive") / "frames", [4] * 300, ["train"] * 250 + ["val"] * 50)
    episodes = pl.read_parquet(frames / "episodes.parquet")
    rows, at = rows_of(episodes, 2)
    patches = attentive.Patches(Means(paired=False), Given(frames), Target(rows, *[np.zeros((1, 1))] * 3, {}), 2)
    change = patches(np.arange(len(rows)))[..., 3:].unflatten(1, (4, 4)).double()
    y_NK = torch.stack([change[:, :, :2].sum((1, 2, 3)), change[:, :2].sum((1, 2, 3))], 1)  # left half, upper half
    assert np.array_equal(patches.row_N, at)
    target = Target(rows, y_NK.numpy(), y_NK.numpy(), y_NK.numpy(), {"position": ("x", "y")})
    return frames, target, splits.split(rows, episodes, 0)


def test_finds_what_changes_where(made):
    frames, target, parts = made
    given = Given(frames, encoder=Means(paired=False), batch_size=32)
    predicted, rate, dims = attentive.predict(given, target, parts, Task(**TASK))
    y = target.y_NK[parts.test_N]
    assert 1 - ((predicted - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum() > 0.5
    assert rate in attentive.RATES
    assert dims == 6


def test_test_targets_change_nothing_and_neither_does_another_run(made):
    frames, target, parts = made
    given, task = Given(frames, encoder=Means(paired=True), batch_size=64), Task(**{**TASK, "samples": 640})
    before, rate, _ = attentive.predict(given, target, parts, task)
    spoiled = target.y_NK.copy()
    spoiled[parts.test_N] = 1e6
    other = Target(target.rows, spoiled, target.state_NS, target.motion_NS, target.groups)
    after, other_rate, _ = attentive.predict(given, other, parts, task)
    assert np.array_equal(before, after)
    assert rate == other_rate
    fewer = replace(given, batch_size=16)  # how many are read at once is nobody's choice of a result
    np.testing.assert_allclose(attentive.predict(fewer, target, parts, task)[0], before, rtol=1e-4, atol=1e-5)

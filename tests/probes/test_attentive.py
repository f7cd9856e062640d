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
from avrl.store import FrameStore

LENGTHS, SPLITS = [4] * 300, ["train"] * 250 + ["val"] * 50
read = attentive._read
TASK = {"probe": "bridge", "gap": 2, "target": "reached", "readouts": (), "seed": 0, "resamples": 100}
TASK |= {"solver": "attentive", "samples": 12_000, "data_digests": ("l", "f")}


class Means:
    """Mean colours of 4 x 4 places: enough to see a blob move."""

    readouts, image_size = {"mean": 3}, 32

    def __init__(self, *, paired):
        self.paired = paired

    def patches(self, frames_BTHWC):
        places = frames_BTHWC.float().unflatten(3, (4, 8)).unflatten(2, (4, 8)).mean((3, 5)) / 255
        return torch.cat(list(places.unbind(1)), 3)


class Quiet(Means):
    """And a channel that says `said` of some frames, by their bytes, and hardly or not at all speaks of others."""

    def __init__(self, alive, *, said=0.01, whispered=0.0):
        super().__init__(paired=False)
        self.alive, self.said, self.whispered = alive, said, whispered

    def patches(self, frames_BTHWC):
        found = super().patches(frames_BTHWC)
        extra = [self.said if one.numpy().tobytes() in self.alive else self.whispered for one in frames_BTHWC[:, 0]]
        extra = torch.tensor(extra) * (1 + torch.arange(len(extra)) % 2)
        return torch.cat([found, extra.view(-1, 1, 1, 1).expand(*found.shape[:3], 1)], 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    frames = frame_store(tmp_path_factory.mktemp("attentive") / "frames", LENGTHS, SPLITS)
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
    given, task = Given(frames, encoder=Means(paired=True), batch_size=64), Task(**{**TASK, "samples": 384})
    before, rate, _ = attentive.predict(given, target, parts, task)
    spoiled = target.y_NK.copy()
    spoiled[parts.test_N] = 1e6
    other = Target(target.rows, spoiled, target.state_NS, target.motion_NS, target.groups)
    after, other_rate, _ = attentive.predict(given, other, parts, task)
    assert np.array_equal(before, after)
    assert rate == other_rate
    fewer = replace(given, batch_size=16)  # how many are read at once is nobody's choice of a result
    np.testing.assert_allclose(attentive.predict(fewer, target, parts, task)[0], before, rtol=1e-4, atol=1e-5)


def of_test(frames, parts):
    """The frames of test episodes, as an encoder sees them."""
    episodes = pl.read_parquet(frames / "episodes.parquet").filter(pl.col("split") == "val")
    rows = [first + t for first, n in episodes.select("dataset_from_index", "length").iter_rows() for t in range(n)]
    assert len(rows) == 4 * len(np.unique(parts.episode_N[parts.test_N]))
    return {one.tobytes() for one in FrameStore(frames).read(np.array(rows))}


@pytest.mark.parametrize(("whispered", "moved"), [(0.0, 0.0), (1e-7, 0.1)])
def test_a_channel_that_only_test_hears_moves_nothing(made, whispered, moved):
    """A dead ReLU that comes alive: magnified 1e6-fold, it took R2 from .906 to -8,388,234."""
    frames, target, parts = made
    task, loud = Task(**{**TASK, "samples": 384}), of_test(frames, parts)
    plain, spoken = (
        attentive.predict(Given(frames, encoder=Quiet(alive, whispered=whispered)), target, parts, task)[0]
        for alive in (set(), loud)
    )
    assert np.abs(plain - spoken).max() <= moved * target.y_NK.std()


def test_test_frames_change_no_fit(made, tmp_path, monkeypatch):
    """Test episodes of other pictures: heads and the choice of a rate stay as they are to the bit."""
    frames, target, parts = made
    other = frame_store(tmp_path / "frames", LENGTHS, SPLITS, still=range(250, 300))
    states, predicted = [], []
    monkeypatch.setattr(attentive, "_read", lambda *given: states.append(given[1:]) or read(*given))
    for store in (frames, other):
        given = Given(store, encoder=Means(paired=False))
        predicted.append(attentive.predict(given, target, parts, Task(**{**TASK, "samples": 384})))
    assert not np.array_equal(predicted[0][0], predicted[1][0])
    assert predicted[0][1:] == predicted[1][1:]
    for heads, others in zip(states[0][0] + states[1][0], states[2][0] + states[3][0], strict=True):
        for name, value in heads.state_dict().items():
            assert torch.equal(value, others.state_dict()[name])


def test_a_killed_fit_goes_on_to_the_same_end(made, tmp_path, monkeypatch):
    frames, target, parts = made
    monkeypatch.setattr(attentive, "KEPT", 4)
    given, task = (
        Given(frames, encoder=Means(paired=False), batch_size=32, scratch=tmp_path),
        Task(**{**TASK, "samples": 384}),
    )
    whole = attentive.predict(replace(given, scratch=None), target, parts, task)
    made_of, calls = attentive.Patches.__call__, []

    def until(patches, index, *, last):
        calls.append(len(index))
        if len(calls) > last:
            raise KeyboardInterrupt
        return made_of(patches, index)

    monkeypatch.setattr(attentive.Patches, "__call__", lambda patches, index: until(patches, index, last=9))
    with pytest.raises(KeyboardInterrupt):
        attentive.predict(given, target, parts, task)
    assert len(list(tmp_path.iterdir())) == 1
    calls.clear()
    monkeypatch.setattr(attentive.Patches, "__call__", lambda patches, index: until(patches, index, last=99))
    again = attentive.predict(given, target, parts, task)
    assert np.array_equal(again[0], whole[0])
    assert again[1:] == whole[1:]
    assert calls[: 4 + 2].count(64) == 4 + 2  # statistics, and the two steps of six that were not kept
    assert calls[4 + 2] != 64

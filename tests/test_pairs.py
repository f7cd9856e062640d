import hashlib
import multiprocessing
from threading import get_ident

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import frame_store
from test_store import in_a_fork

from avrl.errors import ConfigError
from avrl.pairs import Pairs, Sampling, hashed, uniform
from avrl.store import FrameStore

SAMPLING = Sampling(seed=3, max_gap=4, sample_decay=0.8, pairs_per_episode=50)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return FrameStore(frame_store(tmp_path_factory.mktemp("store"), [2, 5, 9, 1, 30]))


def test_every_pair_lies_within_one_episode_and_both_frames_are_the_right_ones(store):
    pairs = Pairs(store, SAMPLING, 10)
    ends = dict(store.episodes.select("dataset_from_index", "dataset_to_index").iter_rows())
    for step in range(3 * pairs.steps_per_epoch):
        row, gap, _ = pairs.draw(step)
        for first, k in zip(row, gap, strict=True):
            start = max(one for one in ends if one <= first)
            assert 1 <= k <= SAMPLING.max_gap
            assert first + k < ends[start]
    row, gap, _ = pairs.draw(0)
    batch = pairs.batch(0)
    assert np.array_equal(batch.frames_BTHWC[:, 0].numpy(), store.read(row))
    assert np.array_equal(batch.frames_BTHWC[:, 1].numpy(), store.read(row + gap))


def test_an_epoch_visits_each_usable_episode_as_often_as_asked(store):
    pairs = Pairs(store, SAMPLING, 10)
    seen = np.concatenate([pairs.draw(step)[0] for step in range(pairs.steps_per_epoch)])
    firsts = store.episodes["dataset_from_index"].to_numpy()
    counts = np.bincount(np.searchsorted(firsts, seen, side="right") - 1, minlength=5)
    assert counts.tolist() == [50, 50, 50, 0, 50]  # the one-frame episode gives no pair


def test_gaps_follow_the_asked_ratio_between_neighbours(tmp_path):
    store = FrameStore(frame_store(tmp_path, [60]))
    pairs = Pairs(store, Sampling(0, 4, 0.5, 20_000), 1000)
    gaps = np.concatenate([pairs.draw(step)[1] for step in range(20)])
    share = np.bincount(gaps, minlength=5)[1:] / len(gaps)
    assert share == pytest.approx(np.array([8, 4, 2, 1]) / 15, abs=0.015)


TRIANGLE = {6: [1, 2, 3, 2, 1, 0.03], 5: [0.4, 0.8, 0.8, 0.4, 0.01], 1: [1]}  # max_gap -> shares


@pytest.mark.parametrize(("gaps", "max_gap"), [("ratio", 6), ("uniform", 6), *(("triangular", k) for k in TRIANGLE)])
@pytest.mark.parametrize("length", [2, 3, 5, 40])
def test_gaps_follow_the_asked_shape_among_those_that_fit(tmp_path, gaps, max_gap, length):
    """Chi-square: 20 for at most 5 degrees of freedom is chance in one of 800 runs; the seed makes it one run."""
    pairs = Pairs(FrameStore(frame_store(tmp_path, [length])), Sampling(1, max_gap, 0.7, 20_000, gaps), 20_000)
    shape = {"ratio": 0.7 ** np.arange(6), "uniform": np.ones(6), "triangular": TRIANGLE.get(max_gap)}[gaps]
    wanted = np.array(shape[: length - 1]) / sum(shape[: length - 1]) * 20_000
    counts = np.bincount(pairs.draw(0)[1], minlength=len(wanted) + 1)
    assert counts[0] == 0
    assert len(counts) == len(wanted) + 1
    assert ((counts[1:] - wanted) ** 2 / wanted).sum() < 20


@pytest.mark.parametrize("gaps", ["ratio", "uniform", "triangular"])
def test_a_gap_depends_on_seed_epoch_and_index_alone(store, gaps):
    """Not on the batch that it is drawn in, nor on what was drawn before."""
    sampling = Sampling(3, 6, 0.8, 50, gaps)
    whole, few = Pairs(store, sampling, 100), Pairs(store, sampling, 10)
    straight = np.concatenate([few.draw(step) for step in range(40)], axis=1)
    back = np.concatenate([whole.draw(step) for step in (3, 2, 1, 0)][::-1], axis=1)
    assert np.array_equal(straight, back)
    assert not np.array_equal(straight[1, :200], straight[1, 200:])


def test_the_plans_gaps_are_what_they_always_were(store):
    """Other gaps would be another checkpoint: the stage would need a new version."""
    pairs = Pairs(store, SAMPLING, 20)
    assert pairs.draw(4)[1].tolist() == [4, 1, 1, 3, 1, 1, 1, 1, 4, 2, 2, 1, 1, 1, 4, 1, 1, 1, 3, 1]


def test_starts_are_uniform_over_what_the_gap_leaves(tmp_path):
    pairs = Pairs(FrameStore(frame_store(tmp_path, [6])), Sampling(0, 2, 1.0, 10_000), 1000)
    rows, gaps = zip(*(pairs.draw(step)[:2] for step in range(10)), strict=True)
    rows, gaps = np.concatenate(rows), np.concatenate(gaps)
    assert np.bincount(rows[gaps == 2], minlength=4) / (gaps == 2).sum() == pytest.approx([0.25] * 4, abs=0.03)


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_part_the_global_batch(store, world):
    pairs = Pairs(store, SAMPLING, 10)
    whole = pairs.batch(7)
    parts = [pairs.batch(7, rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate([one.frames_BTHWC for one in parts]), whole.frames_BTHWC)
    assert np.concatenate([one.seed_B for one in parts]).tolist() == whole.seed_B.tolist()
    assert np.concatenate([one.gap_B for one in parts]).tolist() == whole.gap_B.tolist()


def test_the_stream_may_begin_anywhere(store):
    whole = [one.seed_B.tolist() for one in Pairs(store, SAMPLING, 10).stream(0, 30)]
    later = [one.seed_B.tolist() for one in Pairs(store, SAMPLING, 10).stream(17, 30)]
    assert later == whole[17:]
    assert len({tuple(one) for one in whole}) == 30


def test_other_seeds_and_epochs_give_other_orders(store):
    pairs = Pairs(store, SAMPLING, 10)
    other = Pairs(store, Sampling(4, 4, 0.8, 50), 10)
    assert pairs.draw(0)[2].tolist() != pairs.draw(pairs.steps_per_epoch)[2].tolist()
    assert pairs.draw(0)[2].tolist() != other.draw(0)[2].tolist()


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 8])
def test_the_number_of_threads_changes_nothing(store, threads):
    few, many = Pairs(store, SAMPLING, 19), Pairs(FrameStore(store.root, threads), SAMPLING, 19)
    assert all(map(same, few.stream(3, 25), many.stream(3, 25)))


@pytest.mark.parametrize("threads", [0, 2])
def test_without_threads_frames_are_decoded_where_they_are_used(threads, store, monkeypatch):
    pairs, seen, real = Pairs(FrameStore(store.root, threads), SAMPLING, 19), set(), FrameStore.read
    monkeypatch.setattr(FrameStore, "read", lambda *args, **more: seen.add(get_ident()) or real(*args, **more))
    assert len(list(pairs.stream(0, 5))) == 5
    assert (get_ident() in seen) == (threads == 0)
    assert len(seen) <= max(1, threads)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_pairs_in_use_work_after_a_fork_and_in_a_spawned_process(store):
    pairs = Pairs(store, SAMPLING, 10)
    want = list(pairs.stream(0, 5))
    assert in_a_fork(lambda: all(map(same, pairs.stream(0, 5), want)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert same(pool.apply(pairs.batch, (3,)), want[3])
    assert same(pairs.batch(4), want[4])


@pytest.mark.parametrize("per_episode", [5, 50, 20_000])
def test_the_order_is_numpys_permutation_of_the_epoch(store, per_episode):
    """In fewer bytes. Another order would be another checkpoint: the stage would need a new version."""
    pairs = Pairs(store, Sampling(3, 4, 0.8, per_episode), 10)
    want = np.random.Generator(np.random.Philox(key=[3, 2])).permutation(pairs.indices)
    assert np.array_equal(pairs._epoch(2), want)
    assert pairs._epoch(2).itemsize <= 4


def test_too_few_pairs_for_a_batch_is_said(store):
    with pytest.raises(ConfigError, match="less than one batch"):
        Pairs(store, SAMPLING, 1000)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(0, 2**40))
def test_a_draw_depends_on_its_own_index_only(seed, epoch, index):
    alone = uniform(seed, epoch, np.array([index]), 1)[0]
    among = uniform(seed, epoch, np.array([5, index, 7]), 1)[1]
    assert alone == among
    assert 0 <= alone < 1


def test_draws_are_uniform_and_streams_independent():
    index = np.arange(20_000)
    one, other = uniform(0, 0, index, 1), uniform(0, 0, index, 2)
    assert np.histogram(one, 10, (0, 1))[0] / 2000 == pytest.approx(np.ones(10), abs=0.08)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.03
    assert len(np.unique(hashed(0, 0, index, 1))) == len(index)


def test_a_clip_is_frames_a_gap_apart_and_short_episodes_have_none(tmp_path):
    store = FrameStore(frame_store(tmp_path, [15, 16, 40, 100]))
    pairs = Pairs(store, Sampling(seed=1, max_gap=4, sample_decay=0.8, pairs_per_episode=200, num_frames=16), 100)
    row, gap, _ = (np.concatenate(one) for one in zip(*(pairs.draw(step) for step in range(6)), strict=True))
    episode = np.searchsorted([15, 31, 71], row, side="right")
    assert np.bincount(episode, minlength=4).tolist() == [0, 200, 200, 200]
    assert all((row + 15 * gap) < np.array([15, 31, 71, 171])[episode])
    assert [set(gap[episode == one]) for one in (1, 2, 3)] == [{1}, {1, 2}, {1, 2, 3, 4}]
    batch = pairs.batch(0)
    assert batch.frames_BTHWC.shape == (100, 16, 32, 32, 3)
    row, gap, _ = pairs.draw(0)
    for time in (0, 7, 15):
        assert np.array_equal(batch.frames_BTHWC[:, time].numpy(), store.read(row + time * gap))


def test_no_episode_as_long_as_a_clip_is_said(store):
    with pytest.raises(ConfigError, match="no episode has 31 frames"):
        Pairs(store, Sampling(0, 4, 0.8, 5, num_frames=31), 1)


def test_the_draws_of_pairs_stay_what_they_were(store):
    """Checkpoints hang on them: a change here is a new version of the stage."""
    pairs = Pairs(store, SAMPLING, 10)
    drawn = np.stack([np.stack(pairs.draw(step)) for step in range(25)])
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "69cd97b309492624"

"""Which episodes fit, choose and test."""

import time
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from avrl import splits
from avrl.errors import ConfigError

TASKS = [f"task {i % 7}" for i in range(70)]


def made(called=None):
    """Episodes of 3 to 5 rows each; the rows, the episodes and their split."""
    called = called or ["train"] * 50 + ["val"] * 20
    episodes = pl.DataFrame({"episode_index": range(70), "task": TASKS, "split": called})
    rows = pl.DataFrame({"episode_index": np.repeat(np.arange(70), [3 + i % 3 for i in range(70)])})
    return episodes, splits.split(rows, episodes, 0)


def of(parts, mask):
    return set(parts.episode_N[mask].tolist())


def test_every_episode_has_one_place():
    _, parts = made()
    fit, validate, test = (of(parts, mask) for mask in (parts.fit_N, parts.validate_N, parts.test_N))
    assert (len(fit), len(validate), len(test)) == (40, 10, 20)
    assert test == set(range(50, 70))
    assert fit | validate == set(range(50))
    assert parts.seen_N.all()


def test_a_source_that_holds_nothing_out_has_a_fifth_of_each_task_held_out_whatever_the_seed():
    episodes, parts = made(["train"] * 70)
    chosen = splits.is_test(episodes)
    assert [sum(chosen[np.array(TASKS) == task]) for task in sorted(set(TASKS))] == [2] * 7
    rows = pl.DataFrame({"episode_index": parts.episode_N})
    assert np.array_equal(splits.split(rows, episodes, 5).test_N, parts.test_N)
    lonely = pl.DataFrame({"episode_index": [0, 1, 2], "task": ["a", "b", "b"], "split": ["train"] * 3})
    assert splits.is_test(lonely).tolist().count(True) == 1
    assert not splits.is_test(lonely)[0]  # of a single episode nothing can be held out


@pytest.mark.parametrize(("alike", "alone", "tested"), [(0, 100, (0, 20)), (10, 90, (2, 18)), (80, 20, (16, 4))])
def test_episodes_alone_of_their_task_are_held_out_as_one_where_tasks_give_too_few(alike, alone, tested):
    """None of 100 instructions was held out and the data refused; of 90 and 10 alike, two episodes tested."""
    tasks = ["alike"] * alike + [f"{i}" for i in range(alone)]
    episodes = pl.DataFrame({"episode_index": range(100), "task": tasks, "split": ["train"] * 100})
    chosen = splits.is_test(episodes)
    assert (chosen[:alike].sum(), chosen[alike:].sum()) == tested
    assert np.array_equal(splits.is_test(episodes), chosen)
    parts = splits.split(episodes, episodes, 0)
    assert not parts.seen_N[alike:][chosen[alike:]].any()


def test_as_many_instructions_as_episodes_take_no_time():
    """Episodes were looked through for each instruction: 4 s for 20,000."""
    episodes = pl.DataFrame({"episode_index": range(20_000), "task": [f"{i}" for i in range(20_000)]})
    begun = time.monotonic()
    assert splits.is_test(episodes.with_columns(split=pl.lit("train"))).sum() == 4_000
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    ("ref", "called", "advice"),
    [
        ("lerobot-droid", "train", "prep more episodes"),
        ("lerobot-droid", "test", "meta/info.json"),
        ("bridge-x", "val", "avrl fetch bridge --part train,val"),
        ("egodex-x", "test", "avrl fetch --part 1,test"),
    ],
)
def test_a_refusal_says_what_helps_with_this_data(tmp_path, ref, called, advice):
    episodes = pl.DataFrame({"length": [9, 9], "split": [called] * 2, "task": ["a", "b"]})
    episodes.write_parquet(tmp_path / "episodes.parquet")
    with pytest.raises(ConfigError) as refused:
        splits.require_split(SimpleNamespace(root=tmp_path, ref=ref), (1,))
    assert advice in refused.value.next_step
    assert ("bridge" in refused.value.next_step) == (ref == "bridge-x")


def test_few_are_nested_and_choose_their_strength_among_themselves():
    _, parts = made(["train"] * 69 + ["val"])
    found = list(splits.few(parts, 0))
    assert [one.train for one in found] == ["10%"]  # 1% of 69 is too few to fit on
    (one,) = found
    assert len(of(parts, one.fit_N)) == 6
    assert len(of(parts, one.validate_N)) == 1
    assert not of(parts, one.fit_N | one.validate_N) & of(parts, one.test_N)


def test_smaller_shares_lie_within_larger_ones():
    episodes = pl.DataFrame({"episode_index": range(1000), "task": ["a"] * 1000, "split": ["train"] * 999 + ["val"]})
    parts = splits.split(pl.DataFrame({"episode_index": range(1000)}), episodes, 0)
    one, ten = (of(parts, part.fit_N | part.validate_N) for part in splits.few(parts, 0))
    assert (len(one), len(ten)) == (10, 100)
    assert one < ten


def test_a_new_task_and_a_known_one_are_tested_on_the_same_rows_after_as_much_training():
    episodes, parts = made()
    task = dict(zip(range(70), TASKS, strict=True))
    tested = []
    for new, known in splits.folds(parts, episodes, 0):
        train = [of(parts, one.fit_N | one.validate_N) for one in (new, known)]
        rows = [(one.fit_N | one.validate_N).sum() for one in (new, known)]
        assert 0 <= rows[1] - rows[0] < 3  # rows, as nearly as whole episodes of 3 and more allow
        assert np.array_equal(new.test_N, known.test_N)
        here = {task[one] for one in of(parts, new.test_N)}
        assert not here & {task[one] for one in train[0]}
        assert here <= {task[one] for one in train[1]}
        assert not (train[0] | train[1]) & of(parts, new.test_N)
        tested += sorted(of(parts, new.test_N))
    assert sorted(tested) == list(range(50, 70))  # each once


def test_a_known_task_keeps_an_episode_and_long_episodes_count_as_what_they_are():
    """Of Bridge's kind, an episode or two a sentence: 296 of 1500 had none left. And 560 pairs stood beside 1210."""
    tasks = [f"sentence {i // 2}" for i in range(600)] + ["long"] * 40
    lengths = [10] * 600 + [60] * 40
    episodes = pl.DataFrame({"episode_index": range(640), "task": tasks, "split": ["train", "val"] * 320})
    parts = splits.split(pl.DataFrame({"episode_index": np.repeat(np.arange(640), lengths)}), episodes, 0)
    found = splits.folds(parts, episodes, 0)
    assert len(found) == splits.FOLDS
    for new, known in found:
        train = [one.fit_N | one.validate_N for one in (new, known)]
        assert 0 <= train[1].sum() - train[0].sum() < 10
        learned = {tasks[one] for one in of(parts, train[1])}
        assert {tasks[one] for one in of(parts, known.test_N)} <= learned


def test_as_many_tasks_as_bridge_has_take_no_time():
    """A set of the tasks left out was made anew for each episode: 17 s at Bridge's size, for every readout."""
    tasks = [f"task {i % 9_999}" for i in range(20_000)]
    called = ["val" if i % 10 == 0 else "train" for i in range(20_000)]
    episodes = pl.DataFrame({"episode_index": range(20_000), "task": tasks, "split": called})
    parts = splits.split(episodes, episodes, 0)
    begun = time.process_time()
    assert len(splits.folds(parts, episodes, 0)) == splits.FOLDS
    assert time.process_time() - begun < 1  # .1; it was 3


def test_one_task_cannot_be_left_out():
    episodes = pl.DataFrame({"episode_index": range(9), "task": ["a"] * 9, "split": ["train"] * 7 + ["val"] * 2})
    parts = splits.split(pl.DataFrame({"episode_index": range(9)}), episodes, 0)
    assert splits.folds(parts, episodes, 0) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_moves_what_validates_and_nothing_that_tests(seed):
    episodes, parts = made()
    other = splits.split(pl.DataFrame({"episode_index": parts.episode_N}), episodes, seed)
    assert np.array_equal(other.test_N, parts.test_N)
    assert np.array_equal(other.validate_N, parts.validate_N) == (seed == 0)

"""Alarms: each kind once, from the rows of the log alone, and none for a run that goes well."""

import pytest

from avrl.alarms import SPAN, Alarms
from avrl.curve import FOUND


def rows(losses, **found):
    return [{"step": n + 1, "loss": loss, **dict.fromkeys(FOUND), **found} for n, loss in enumerate(losses)]


def told(all_rows):
    alarms = Alarms()
    return [words for row in all_rows for words in alarms.heard(row)]


def test_a_run_whose_loss_falls_with_noise_is_left_alone():
    losses = [(1 + 2 * (n % 3 == 0)) / (1 + n / 50) for n in range(500)]
    assert told(rows(losses, rank_cls=9.0, std_cls=0.1, rank_patches=40.0, std_patches=0.3)) == []


def test_a_loss_that_stays_high_is_told_once_and_a_single_bad_batch_is_not():
    assert told(rows([1.0] * 100 + [10.0] + [1.0] * 50)) == []
    (words,) = told(rows([1.0] * 100 + [3.0] * 100))
    assert words == "step 111: the loss rose to 2.1 from 1; a lower --lr may cure it"


def test_a_run_that_diverges_in_its_first_rows_is_told_as_soon_as_there_is_a_span():
    (words,) = told(rows([0.1] * SPAN + [5.0]))
    assert words.startswith(f"step {SPAN + 1}: the loss rose")


def test_a_run_that_learns_nothing_after_its_warm_up_is_told():
    idle = rows([1.0] * 10, held_out_skill=0.003)
    assert [row for row in map(Alarms(7).heard, idle[:9]) if row] == []
    alarms = Alarms(6)
    (words,) = [one for row in idle for one in alarms.heard(row)]
    assert words.startswith("step 9: held-out skill is 0.003, no better than its baseline so far")


def test_a_skill_that_comes_and_goes_is_left_alone():
    assert told([row for skill in (0.0, 0.0, 0.02) * 5 for row in rows([1.0], held_out_skill=skill)]) == []


@pytest.mark.parametrize("code", ["cls", "patches"])
def test_a_code_that_collapses_is_told_by_name_and_kind(code):
    flat = rows([1.0] * 3, **{f"rank_{code}": 1.1, f"std_{code}": 0.2})
    gone = rows([1.0] * 3, **{f"rank_{code}": 1.1, f"std_{code}": 1e-5})
    assert told(flat + gone) == [
        f"step 1: {code} collapses: its effective rank is 1.10",
        f"step 1: {code} collapses: it is the same for all pictures (std 1e-05)",
    ]

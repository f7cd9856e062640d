"""Which vectors a closed form is offered: by what it has to solve, for every encoder alike."""

import json

import polars as pl
import pytest

from avrl.errors import IntegrityError
from avrl.features import LARGEST
from avrl.vectors import offers, places

BASE = {"cls": 768, "grid": 6912}  # ViT-B
PAIR = ("pair", "antisymmetric")


def artifact(root, readouts, *, paired, left_out=()):
    facts = {"readouts": readouts, "paired": paired, "left_out": dict(left_out)}
    (root / "manifest.json").write_text(json.dumps({"facts": facts}))
    return root


def test_it_is_the_width_of_a_pairs_vector_that_counts(tmp_path):
    """A frame's grid is doubled by concatenation and not by the difference; that of a pair is what it is."""
    found, left_out = offers(artifact(tmp_path, BASE, paired=False), (), PAIR, 2_000_000)
    assert found == [("cls", "concat"), ("cls", "diff"), ("grid", "diff")]
    assert left_out == {"grid, concat": "13,824 dimensions of 2,000,000 rows, a closed form takes 8,192 of either"}
    found, left_out = offers(artifact(tmp_path, BASE, paired=True), (), PAIR, 2_000_000)
    assert found == [(readout, pairing) for readout in BASE for pairing in PAIR]
    assert not left_out


def test_few_rows_bound_it_as_few_dimensions_do(tmp_path):
    root = artifact(tmp_path, {"grid": 10**6}, paired=False)
    assert len(offers(root, (), PAIR, LARGEST)[0]) == 2
    assert offers(root, (), PAIR, LARGEST + 1)[0] == []


def test_what_was_not_written_or_is_not_there_is_named_with_the_reason(tmp_path):
    root = artifact(tmp_path, {"cls": 3}, paired=True, left_out={"grid": "too wide"})
    assert offers(root, (), ("pair",), 9) == ([("cls", "pair")], {"grid": "too wide"})
    assert offers(root, (), ("pair",), 9, but="grid")[1] == {}
    assert offers(root, ("grid", "m"), ("pair",), 9, but="grid") == ([], {"grid": "too wide", "m": "it has cls"})


@pytest.mark.parametrize(("gap", "place"), [(0, [0, 2]), (1, [0, 0])])
def test_a_pair_is_found_in_one_place_or_in_two(tmp_path, gap, place):
    table = pl.DataFrame({"episode_index": [4, 4, 4], "frame_index": [1, 2, 7], "gap": [gap] * 3})
    table.write_parquet(tmp_path / "pairs.parquet")
    asked = pl.DataFrame({"episode_index": [4], "frame_index": [1]})
    assert places(tmp_path, asked, 6).tolist() == [place]
    with pytest.raises(IntegrityError, match="1 pairs have no features"):
        places(tmp_path, asked.with_columns(frame_index=pl.lit(3)), 6)

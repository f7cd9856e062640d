"""Verdicts on hypotheses, and who wins on what: each can come out either way, or says why it is not known."""

import re
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scored import FLOORS, Row, Training, demo, score, train

from avrl import contrast, drawing, pictures, typeset
from avrl.budgets import encoders, unlike
from avrl.cache import Cache
from avrl.comparison import Protocol, comparable, read
from avrl.effects import FAIL, NOT_COMPARABLE, PASS, UNDECIDED, judged
from avrl.flow_verdict import percent_below
from avrl.hypotheses import judge, tally
from avrl.intervals import FEWEST
from avrl.leaders import BEST, BETTER, TIED, WORSE, marked, winners
from avrl.tables import NOT_MEASURED, main
from avrl.verdicts import ABOVE, OUTSIDE, TWIN, Paired, differences

ACTIONS, CONVERGE, PARTS = "Actions are told", "The three models", "Two-Stream is better"
OURS = Row(encoder="two-stream", checkpoint="c", noise=0.4)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def compares(cache, *rows):
    return [Paired(one, 300) for one in comparable(*read(score(cache, *rows)))]


def found(table, hypothesis):
    rows = table.numbers.filter(pl.col("hypothesis").str.starts_with(hypothesis))
    return dict(rows.select("who", "verdict").iter_rows())


def test_nothing_measured_is_said_with_what_to_type(cache):
    table = judge(compares(cache, *FLOORS), [])
    assert set(table.numbers["verdict"]) == {NOT_MEASURED}
    assert all(one.startswith("avrl ") for one in table.numbers["decides"])
    assert table.numbers["value"].null_count() == table.numbers.height
    assert len(tally(table)) == 6


@pytest.mark.parametrize(("noise", "verdict"), [(1.2, PASS), (0.15, FAIL)])
def test_actions_beside_an_outside_encoder(cache, noise, verdict):
    outside = Row(encoder="dinov2", init="pretrained", pairing="concat", noise=noise)
    rows = found(judge(compares(cache, OURS, outside, *FLOORS), []), ACTIONS)
    assert rows["two-stream - DINOv2"] == verdict
    assert rows["videomae - DINOv2"] == rows["CLIP"] == NOT_MEASURED


def test_an_encoder_probed_under_another_protocol_is_not_comparable(cache):
    outside = Row(encoder="clip-l", init="pretrained", pairing="concat", fingerprint="b" * 12)
    rows = found(judge(compares(cache, OURS, outside, *FLOORS), []), ACTIONS)
    assert rows["two-stream - CLIP"] == NOT_COMPARABLE


def test_of_an_outside_encoder_the_best_row_speaks_whatever_its_size(cache):
    small = Row(encoder="r3m-18", init="pretrained", pairing="diff", noise=1.2)
    large = Row(encoder="r3m", init="pretrained", pairing="concat", noise=0.1)
    table = judge(compares(cache, OURS, small, large), [])
    row = table.numbers.filter(who="two-stream - R3M").row(0, named=True)
    assert row["verdict"] == FAIL
    assert "r3m · cls, concat" in row["effect"]


def test_other_weights_are_no_reference_and_have_the_twin_of_their_network(cache):
    """DINOv2 with a file of one's own, the published one nowhere: nothing is measured against DINOv2."""
    own = Row(encoder="dinov2 (weights 1a2b3c4d)", init="pretrained", pairing="concat", noise=0.1)
    small = replace(own, encoder="dinov2-s (weights 99999999)")
    twin = replace(own, encoder="dinov2", init="random", noise=1.5)
    (compare,) = compares(cache, OURS, own, small, twin)
    rows = found(judge([compare], []), ACTIONS)
    assert rows["DINOv2"] == NOT_MEASURED
    table = differences(compare)
    of = {(one["name"], one["against"]): one for one in table.numbers.filter(split="val").to_dicts()}
    assert of[own.encoder, TWIN]["verdict"] == ABOVE
    assert of["two-stream", OUTSIDE]["note"] == "no outside encoder"
    assert dict.fromkeys(compare.protocol.scores["name"]) == dict.fromkeys(
        ["two-stream", own.encoder, "dinov2", small.encoder]
    )  # a twin beside whom it is the twin of
    (compare,) = compares(cache, OURS, own, twin, replace(own, encoder="dinov2", noise=1.2))
    assert found(judge([compare], []), ACTIONS)["two-stream - DINOv2"] == PASS


def test_an_ablation_is_compared_with_the_whole_of_the_same_budget(cache):
    (whole,) = train(cache, Training(objective="two-stream"))
    part = replace(whole, root=shutil.copytree(whole.root, whole.root.with_name("part")))
    rows = [replace(OURS, checkpoint=whole.ref), Row(encoder="two-stream-m-only", checkpoint="part", noise=1.2)]
    verdicts = found(judge(compares(cache, *rows), [whole, part]), PARTS)
    assert verdicts == {"m-only": PASS, **dict.fromkeys(["p-only", "no-exchange", "early-fusion"], NOT_MEASURED)}
    longer = replace(part, manifest=replace(part.manifest, config={**part.manifest.config, "steps": 9}))
    assert found(judge(compares(cache, *rows), [whole, longer]), PARTS)["m-only"] == NOT_COMPARABLE


@pytest.mark.parametrize(
    ("training", "verdict"),
    [
        (Training(steps=2000), PASS),
        (Training(steps=300), UNDECIDED),  # still rising
        (Training(steps=2000, skill=-0.2), FAIL),
        (Training(steps=2000, looks=0), UNDECIDED),
        (Training(steps=5), UNDECIDED),
    ],
)
def test_converged_is_at_rest_above_the_baseline(cache, training, verdict):
    table = judge(compares(cache, *FLOORS), train(cache, training))
    assert found(table, CONVERGE) == {"two-stream": verdict, "single-stream": NOT_MEASURED, "videomae": NOT_MEASURED}


def test_a_collapsed_code_has_not_converged(cache):
    (one,) = train(cache, Training(steps=2000))
    path = one.root / "looks/held-out.parquet"
    pl.read_parquet(path).with_columns(rank_cls=1.2).write_parquet(path)
    assert found(judge(compares(cache, *FLOORS), [one]), CONVERGE)["two-stream"] == FAIL


def test_undecided_says_how_many_episodes_would_decide():
    one = judged("R²", (0.05, -0.05, 0.15), 30)
    assert one.verdict == UNDECIDED
    assert "120" in one.decides  # half-width .10 must fall to .05: four times the episodes
    assert "100 times" in judged("R²", (0.0001, -0.1, 0.1), 30).decides
    assert judged("R²", (0.95, 0.91, 0.99), 30, 0.9).verdict == PASS
    assert judged("R²", (0.5, 0.4, 0.6), 30, 0.9).verdict == FAIL


def test_best_and_tied_are_marked_and_the_ceiling_never_wins(cache):
    ceiling = Row(encoder="oracle", init="none", readouts=("state",), pairing="none", noise=0.0)
    worse = Row(encoder="videomae", checkpoint="d", noise=1.4)
    (compare,) = compares(cache, OURS, replace(OURS, encoder="single-stream"), worse, ceiling, *FLOORS)
    table = marked(main(compare.protocol), compare)
    marks = dict(table.numbers.select("encoder", "position_mean_r2_val_mark").unique().iter_rows())
    assert marks["oracle"] == marks["videomae"] == ""
    assert {marks["two-stream"], marks["single-stream"]} == {BEST, TIED}
    assert sorted(one.rsplit(" ", 1)[1] for one in table.view["position R²"] if one[-1] != "]") == [BEST, TIED]


def test_winners_stand_beside_the_pixel_floor(cache):
    rows = winners(compares(cache, OURS, *FLOORS)).numbers
    position = rows.filter(pl.col("question").str.ends_with(": position R²")).row(0, named=True)
    assert (position["best"], position["beside_floor"], position["tied"]) == ("two-stream", BETTER, "")
    rows = winners(compares(cache, replace(OURS, noise=1.5), *FLOORS)).numbers
    assert rows["beside_floor"][0] == WORSE
    assert winners(compares(cache, *FLOORS)).numbers.is_empty()


def test_budgets_that_differ_are_warned_of_and_priced(cache):
    scores, checkpoints = demo(cache)
    protocols = comparable(*read(scores))
    table = encoders(protocols, checkpoints, [], 0)
    assert unlike(table) == []
    first = checkpoints[0]
    facts = {**first.manifest.facts, "samples": 90_000, "samples_per_second": 10.0, "device": "A10G", "processes": 4}
    dear = replace(first, manifest=replace(first.manifest, facts=facts))
    table = encoders(protocols, [dear, *checkpoints[1:]], [], 1.5)
    (said,) = unlike(table)
    assert "90,000" in said
    row = table.numbers.filter(checkpoint=first.ref).row(0, named=True)
    assert row["gpu_hours"] == pytest.approx(90_000 / 10 * 4 / 3600)
    assert row["dollars"] == pytest.approx(1.5 * row["gpu_hours"])
    assert table.view.filter(encoder="efficientnet-lite0")["GPU hours"].to_list() == ["not known"]


@pytest.mark.parametrize("ends", [(0.95, 0.95, 0.95), (0.2, None, None), (0.2, float("nan"), float("nan"))])
def test_nothing_is_decided_without_an_interval(ends):
    """One test episode had an interval of no width, and passed or failed by it."""
    for wanted in (0.0, 0.5):
        one = judged("R²", ends, 1, wanted)
        assert (one.verdict, one.ends) == (UNDECIDED, (ends[0], None, None))
        assert f"{FEWEST} test episodes" in one.decides
        assert one.as_row()["effect"] == f"{ends[0]:+.3f} R²"


def test_a_report_of_one_test_episode_decides_nothing_and_shows_no_nan(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("scored.N_EPISODES", 1)
    monkeypatch.setattr("scored.SEEN", np.array([False]))
    outside = Row(encoder="dinov2", init="pretrained", pairing="concat", noise=1.2)
    every = [replace(OURS, encoder=one, readouts=("cls",)) for one in ("two-stream", "videomae")]
    (compare,) = compares(cache, *every, replace(OURS, init="random", noise=0.9), outside, *FLOORS)
    tables = [marked(main(compare.protocol), compare), differences(compare), judge([compare], []), winners([compare])]
    beside = Cache(tmp_path / "other")
    score(beside, replace(OURS, noise=0.1))
    one, other = (contrast.side(cache, str(there.root)) for there in (cache, beside))
    tables.append(contrast.contrast(one, other, 100, every=True).table)
    texts = [typeset.markdown(one) + typeset.latex(one) + one.numbers.write_csv() for one in tables]
    assert not [text for text in texts if re.search(r"\b(nan|NaN)\b", text)]
    scores, apart, verdicts, won, contrasted = (one.numbers for one in tables)
    assert set(scores["position_mean_r2_val_mark"]) == {""}
    assert set(apart["verdict"]) == {NOT_MEASURED}
    assert "too few test episodes" in apart["note"].to_list()
    assert not set(verdicts["verdict"]) & {PASS, FAIL}
    assert won["beside_floor"][0] == UNDECIDED
    assert set(contrasted["verdict"]) == {contrast.ALONE}
    assert drawing.svg(pictures.forest(compare.protocol)).count("NaN") == 0


def test_flow_of_one_test_episode_is_undecided():
    ident = {"checkpoint": "", "readout": "cls", "pairing": "pair", "scores": "s"}
    rows = [{"encoder": "two-stream", "init": "trained"}, {"encoder": "dinov2", "init": "pretrained"}]
    scores = pl.DataFrame([{**ident, **one, "metric": "epe", "kind": "", "label": one["encoder"]} for one in rows])
    sums = [{**ident, **one, "sum_y": 4.0 + at} for at, one in enumerate(rows)]
    sums = [{**one, "dimension": kind, "episode_index": 0, "n": 9.0} for one in sums for kind in ("all", "residual")]
    table = percent_below(Protocol("f", "flow", "", "", scores, scores.clear(), pl.DataFrame(sums)), 50)
    assert table.view.row(0)[2:] == ("+20.0% undecided",) * 2
    assert table.numbers.select("verdict", "low", "high").row(0) == (UNDECIDED, None, None)

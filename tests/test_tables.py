"""What is compared with what: numbers arrive unchanged, protocols stay apart, differences are paired."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scored import FLOORS, N_EPISODES, SEEN, Row, demo, frames, score, sums, train

from avrl.answers import headline, sentences
from avrl.cache import Cache
from avrl.comparison import comparable, read
from avrl.errors import IntegrityError
from avrl.intervals import Sums, difference, weights
from avrl.tables import LABEL, NOT_MEASURED, UNDEFINED, columns, dimensions, main, training, training_sets
from avrl.typeset import escape_latex, latex, markdown, plain
from avrl.verdicts import ABOVE, BELOW, OUTSIDE, PIXELS, TWIN, UNDECIDED, Paired, differences

TRAINED = Row(checkpoint="two-stream-tiny-ab12", noise=0.5)
RANDOM = Row(checkpoint="two-stream-tiny-ab12", init="random", noise=0.8)
HOSTILE = "<script>alert(1)</script>|a_b%c{로봇}\\"


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def protocols(cache, *rows):
    return comparable(*read(score(cache, *rows)))


def test_numbers_are_those_put_in(cache):
    (protocol,) = protocols(cache, TRAINED, RANDOM, *FLOORS)
    table = main(protocol)
    given, _ = frames(TRAINED)
    for split in ("val", "val-unseen"):
        expected = given.filter(group="position", dimension="mean", split=split).row(0, named=True)
        got = table.numbers.filter(init="trained").row(0, named=True)
        name = f"position_mean_r2_{split.replace('-', '_')}"
        assert (got[name], got[name + "_low"]) == (expected["value"], expected["low"])
        cell = table.view["position R²" + (", unseen tasks" if "unseen" in split else "")][0]
        assert cell == "{value:.3f} [{low:.3f}, {high:.3f}]".format(**expected)
    x = given.filter(dimension="x", split="val")["value"].item()
    assert dimensions(protocol).view["x R²"][0].startswith(f"{x:.3f} ")


def test_targets_of_other_names_stand_in_their_own_order(cache):
    """A hand: its wrist is what the headline is about, its fingertips are pooled too, dimensions stay as they came."""
    (protocol,) = protocols(cache, TRAINED, RANDOM, *FLOORS)
    groups = {"position": "right wrist", "rotation": "right fingertips"}
    dimensions_of = {"x": "wrist x", "y": "wrist b", "z": "wrist a", "roll": "thumb x"}
    hand = replace(
        protocol,
        scores=protocol.scores.filter(pl.col("group") != "gripper").with_columns(
            pl.col("group").replace(groups), pl.col("dimension").replace(dimensions_of)
        ),
        episodes=protocol.episodes.with_columns(pl.col("dimension").replace(dimensions_of)),
    )
    titles = ["right wrist R²", "right wrist R², unseen tasks", "right fingertips R²"]
    assert main(hand).view.columns == [LABEL, "kind", *titles, "dims"]
    order = ["wrist x", "wrist b", "wrist a", "thumb x", "pitch", "yaw"]
    assert dimensions(hand).view.columns == [LABEL, "kind", *(f"{one} R²" for one in order), "dims"]
    table, same = differences(Paired(hand, 50)), differences(Paired(protocol, 50))
    assert table.caption.startswith("Right wrist R² of a row")
    assert table.numbers["difference"].drop_nulls().to_list() == pytest.approx(
        same.numbers["difference"].drop_nulls().to_list()
    )
    assert "above the untrained twin in right wrist R²" in sentences(hand, table)[0]


def test_headline_columns_hold_no_r2_of_a_binary_gripper():
    rows = [
        ("position", "mean", "r2"),
        ("position", "x", "r2"),
        ("rotation", "mean", "r2"),
        ("rotation", "roll", "r2"),
    ]
    rows += [("gripper", "gripper", metric) for metric in ("r2", "accuracy", "auc")]
    rows += [("features", "all", "effective-rank")]
    scores = pl.DataFrame(rows, schema=["group", "dimension", "metric"], orient="row").with_columns(split=pl.lit("val"))
    both = pl.concat([scores, scores.with_columns(split=pl.lit("val-unseen"))])
    assert [one.title for one in columns(both)] == [
        "position R²",
        "position R², unseen tasks",
        "rotation R²",
        "gripper AUC",
        "gripper accuracy",
        "features effective rank",
    ]


def test_twins_stand_beside_trained_rows_and_floors_last(cache):
    scores, _ = demo(cache)
    (protocol,) = comparable(*read(scores))
    labels = main(protocol).view[LABEL].to_list()
    for place, label in enumerate(labels[:18:2]):
        assert labels[2 * place + 1] == f"{label} (untrained)"
    assert labels[18:20] == ["efficientnet-lite0 · pool, concat", "efficientnet-lite0 · pool, diff"]
    assert labels[20:] == ["mean", "state", "pixels-8", "pixels-16"]
    assert set(headline(protocol)["label"]) >= {
        "two-stream · cls",
        "two-stream · cls (untrained)",
        "pixels-16",
    }


def test_an_attentive_probe_is_named_so_whatever_its_floors_were_fitted_by(cache):
    """Two solvers on the same pairs were told apart by digests alone."""
    other = [Row(fingerprint="b" * 12), Row(encoder="mean", init="none", fingerprint="b" * 12)]
    scores, episodes = read(score(cache, TRAINED, RANDOM, *FLOORS, *other))
    attentive = (pl.col("fingerprint") == "b" * 12) & (pl.col("encoder") == "two-stream")
    scores = scores.with_columns(solver=pl.when(attentive).then(pl.lit("attentive")).otherwise(pl.lit("ridge")))
    named = {one.fingerprint[0]: (one.slug, one.title) for one in comparable(scores, episodes)}
    assert named["a"] == ("bridge-reached-gap3", "bridge: reached motion over 0.6 s (gap 3)")
    assert named["b"] == (f"{named['a'][0]}-attentive", f"{named['a'][1]}, attentive probe")


def test_different_fingerprints_never_share_a_table(cache):
    rows = [TRAINED, RANDOM, *FLOORS]
    others = [Row(fingerprint="b" * 12, gap=5), Row(fingerprint="c" * 12)]
    found = protocols(cache, *rows, *others)
    assert [one.fingerprint[0] for one in found] == ["a", "c", "b"]
    for one in found:
        assert one.scores["fingerprint"].unique().to_list() == [one.fingerprint]
        refs = set(main(one).numbers["scores"])
        assert refs == set(one.scores["scores"])
    assert found[0].apart == ""
    assert "other data, samples or solver" in found[1].apart
    assert found[2].apart == "gap 5 (first: 3)"
    assert len({one.slug for one in found}) == 3


def test_paired_difference_is_a_direct_computation(cache):
    (protocol,) = protocols(cache, TRAINED, RANDOM, *FLOORS)
    found = differences(Paired(protocol, 300)).numbers
    for split, keep in (("val", SEEN | True), ("val-unseen", ~SEEN)):
        one, two = (
            Sums(parts[0].n[keep], *(np.hstack([part[i] for part in parts])[keep] for i in (1, 2, 3)))
            for parts in ([sums(row, "cls", d) for d in "xyz"] for row in (TRAINED, RANDOM))
        )
        expected = difference(one, two, weights(int(keep.sum()), 300), mean=True)
        got = found.filter(against=TWIN, split=split).row(0, named=True)
        assert [got[name] for name in ("difference", "low", "high")] == pytest.approx([float(v) for v in expected])
        assert got["episodes"] == keep.sum()
        scores = protocol.scores.filter(group="position", dimension="mean", split=split)
        values = dict(scores.select("init", "value").filter(pl.col("init") != "none").iter_rows())
        assert got["difference"] == pytest.approx(values["trained"] - values["random"])


def test_verdicts(cache):
    same = Row(encoder="outside-a", init="pretrained", pairing="diff", noise=0.51)
    worse = Row(encoder="outside-b", init="pretrained", pairing="concat", noise=0.9)
    (protocol,) = protocols(cache, TRAINED, RANDOM, same, worse, *FLOORS)
    found = differences(Paired(protocol, 300)).numbers.filter(split="val", init="trained")
    verdicts = dict(found.select("against", "verdict").iter_rows())
    assert verdicts == {TWIN: ABOVE, PIXELS: ABOVE, OUTSIDE: UNDECIDED}
    assert found.filter(against=OUTSIDE)["other"].item() == "outside-a · cls, diff"
    (protocol,) = protocols(cache, Row(noise=0.7, checkpoint="a"), *FLOORS)
    found = differences(Paired(protocol, 300)).numbers.filter(split="val")
    assert dict(found.select("against", "verdict").iter_rows()) == {
        TWIN: NOT_MEASURED,
        PIXELS: BELOW,
        OUTSIDE: NOT_MEASURED,
    }
    assert differences(Paired(protocol)).view[f"minus {TWIN}"][0] == "not measured: no untrained twin"


def test_a_twin_of_another_checkpoint_or_size_is_no_twin(cache):
    twins = [Row(init="random", checkpoint=name, noise=0.9) for name in ("other-1", "other-2")]
    (protocol,) = protocols(cache, TRAINED, *twins)
    found = differences(Paired(protocol, 300)).numbers.filter(split="val", against=TWIN)
    assert found["note"].to_list() == ["several twins"]
    (protocol,) = protocols(cache, TRAINED, Row(init="random", readouts=("grid",)))
    assert differences(Paired(protocol, 300)).numbers.filter(against=TWIN)["note"][0] == "no untrained twin"


def test_scores_of_other_episodes_are_not_subtracted(cache):
    scores = score(cache, TRAINED, RANDOM)
    path = next(one for one in scores if one.manifest.config["init"] == "random").root / "episodes.parquet"
    pl.read_parquet(path).filter(pl.col("episode_index") > 0).write_parquet(path)
    (protocol,) = comparable(*read(scores))
    found = differences(Paired(protocol, 300)).numbers.filter(against=TWIN)
    assert set(found["note"]) == {"scored on other episodes"}
    assert found["difference"].null_count() == found.height


def test_a_constant_dimension_is_undefined_never_zero(cache):
    rows = [Row(**{**vars(row), "constant": "z"}) for row in (TRAINED, RANDOM)]
    (protocol,) = protocols(cache, *rows)
    assert dimensions(protocol).view["z R²"].to_list() == [UNDEFINED] * 2
    assert differences(Paired(protocol, 300)).numbers["verdict"][0] == ABOVE  # over the dimensions that move


def test_a_missing_score_is_not_measured(cache):
    scores = score(cache, TRAINED, RANDOM)
    path = scores[0].root / "scores.parquet"
    pl.read_parquet(path).filter(pl.col("group") != "rotation").write_parquet(path)
    (protocol,) = comparable(*read(scores))
    assert sorted(main(protocol).view["rotation R²"].to_list())[-1] == NOT_MEASURED


def test_two_checkpoints_of_one_encoder_get_two_names(cache):
    (protocol,) = protocols(cache, TRAINED, Row(checkpoint="two-stream-tiny-cd34", noise=0.4))
    assert main(protocol).view[LABEL].to_list() == ["two-stream@y-ab12 · cls", "two-stream@y-cd34 · cls"]


def test_answers_in_words(cache):
    scores, _ = demo(cache)
    (protocol,) = comparable(*read(scores))
    said = " ".join(sentences(protocol, differences(Paired(protocol, 300))))
    assert (
        "3 of 3 trained encoders above the untrained twin in position R², all test tasks: single-stream · cls (+0."
        in said
    )
    assert "No encoder stands above the pixel-difference floor (pixels-16, R² 0.76 " in said
    assert "Best outside row: efficientnet-lite0 · pool, diff" in said
    (protocol,) = protocols(cache, *FLOORS)
    said = sentences(protocol, differences(Paired(protocol, 300)))
    assert said == [
        "No encoder pretrained here has been scored.",
        "Not measured against the pixel-difference floor (pixels-16).",
    ]


def test_training_names_its_baseline(cache):
    _, checkpoints = demo(cache)
    table = training(checkpoints)
    assert table.numbers["baseline"].to_list() == ["copy"] * 3
    last = pl.read_parquet(checkpoints[0].root / "log.parquet").row(-1, named=True)
    assert table.numbers.row(0, named=True)["final skill"] == last["skill"]
    assert table.view["parameters"][0] == "4,200,000"
    assert training([]).view.is_empty()


def test_damaged_scores_are_named(cache):
    (one,) = score(cache, TRAINED)
    (one.root / "scores.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(IntegrityError, match=r"scores\.parquet"):
        read([one])


def test_hostile_names_are_escaped_in_every_format(cache):
    (protocol,) = protocols(cache, Row(encoder=HOSTILE))
    table = main(protocol)
    text = markdown(table)
    assert "<script>" not in text
    body = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in body}) == 1
    assert "로봇" in text
    assert escape_latex(r"a_b%c{\~^|<") == (
        r"a\_b\%c\{\textbackslash{}\textasciitilde{}\textasciicircum{}\textbar{}\textless{}"
    )
    parts = [line for line in latex(table).splitlines() if "textless" in line]  # the first column stands in each
    assert sum(row.replace(r"\&", "").count("&") for row in parts) == table.view.width - 1
    table.numbers.write_csv(cache.root / "t.csv")
    assert pl.read_csv(cache.root / "t.csv")["encoder"].item() == HOSTILE


def test_plain_columns_align_with_wide_characters():
    view = pl.DataFrame({"name": ["로봇", "two\nlines\x1b[2J"], "value": ["1", "2"]})
    lines = plain(view, 10, 200).splitlines()
    assert len(lines) == 3
    assert lines[1].index("1") == lines[2].rindex("2") - 2  # two wide characters take four cells
    assert "\x1b" not in "".join(lines)
    assert plain(view, 1, 200).splitlines()[-1] == "... on the page as well: 1 row"


def test_demo_has_the_sizes_it_claims(cache):
    (protocol,) = protocols(cache, TRAINED)
    assert protocol.episodes["episode_index"].n_unique() == N_EPISODES
    assert train(cache) == []


def test_other_training_sets_have_a_table_of_their_own(cache):
    scores, episodes = read(score(cache, Row(), Row(encoder="late"), *FLOORS))
    whole = scores.filter(group="position", dimension="mean", split="val")
    less = [
        whole.filter(encoder="two-stream").with_columns(train=pl.lit("10%"), value=0.1, low=0.0, high=0.2),
        whole.filter(encoder="two-stream").with_columns(train=pl.lit("seen tasks minus unseen tasks"), value=0.05),
    ]
    (protocol,) = comparable(pl.concat([scores, *less]), episodes)
    assert protocol.scores.height == scores.height  # the other tables do not see them
    table = training_sets(protocol)
    row = table.view.filter(pl.col(LABEL).str.starts_with("two-stream")).row(0, named=True)
    assert row["10% of train"] == "0.100 [0.000, 0.200]"
    assert row["cost of a new task"].startswith("+0.050")
    assert set(table.view.filter(pl.col(LABEL).str.starts_with("late"))["10% of train"]) == {"not measured"}
    (bare,) = comparable(scores, episodes)
    assert training_sets(bare) is None

"""Words that pick one number of all scores, and what is told of it."""

import json
import shutil

import pytest
import typer
from descent import Made, family
from scored import FLOORS, Row, demo, score
from typer.testing import CliRunner

from avrl.artifact import MANIFEST
from avrl.cache import Cache
from avrl.cells import cells, facts, fitting, words
from avrl.errors import NotFoundError
from avrl_cli import report

HOSTILE = "<script>\x1b[2J\n로봇|"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The demo's numbers, with a second protocol and a hostile encoder beside them."""
    cache = Cache(tmp_path_factory.mktemp("cache"))
    scores, _ = demo(cache)
    return cells([*scores, *score(cache, Row(encoder=HOSTILE), Row(fingerprint="b" * 12, gap=5, constant="z"))])


def avrl(cache, *arguments):
    app = typer.Typer()
    app.command("other")(lambda: None)
    app.add_typer(report.app, name="report")
    return CliRunner().invoke(app, ["report", *arguments, "--cache", str(cache.root)])


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("two-stream cls position R2 aaaaaaaaaaaa", "two-stream · cls, position R²"),
        ("two-stream · grid, position R²", "two-stream · grid, position R²"),
        ("TWO-STREAM grid untrained position r2", "two-stream · grid (untrained), position R²"),
        ("videomae cls position unseen tasks", "videomae · cls, position R², unseen tasks"),
        ("videomae cls position val-seen mean", "videomae · cls, position R², val-seen"),
        ("videomae cls x", "videomae · cls, position x R²"),
        ("videomae cls gripper", "videomae · cls, gripper AUC"),
        ("pixels-16 rotation", "pixels-16, rotation R²"),
        ("efficientnet concat position", "efficientnet-lite0 · pool, concat, position R²"),
        ("로봇 rotation", f"{HOSTILE} · cls, rotation R²"),
    ],
)
def test_words_of_a_table_pick_its_number(found, text, title):
    assert [one.title for one in fitting(found, text)] == [title]


def test_every_number_can_be_picked_by_its_row_column_and_fingerprint(found):
    for one in found[::5]:
        assert fitting(found, f"{one.title} {one.row['fingerprint']}") == [one]


def test_two_protocols_are_two_numbers(found):
    fits = fitting(found, "two-stream cls position R2")
    assert {one.row["fingerprint"] for one in fits} == {"a" * 12, "b" * 12}
    assert {one.title for one in fits} == {"two-stream · cls, position R²"}


def test_no_floor_is_chosen_because_its_name_is_short(found):
    fits = fitting(found, "position R2 aaaaaaaaaaaa")
    assert {"mean, position R²", "two-stream · cls, position R²"} <= {one.title for one in fits}
    assert not [one for one in fits if "unseen" in one.title]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("two-stream spam", "no number has the word 'spam'"),
        ("state yaw grid", "no number has all the words of 'state yaw grid'"),
        ("·,", "no number has all the words of '·,'"),
    ],
)
def test_what_fits_nothing_is_said(found, text, line):
    with pytest.raises(NotFoundError, match=line):
        fitting(found, text)


def test_words_know_no_case_no_marks_and_other_scripts():
    assert words("Two-Stream · R² (val)") == {"two", "stream", "r2", "val"}
    assert words("로봇 Ⅷ") == {"로봇", "viii"}


def test_a_number_without_a_value_says_why(found):
    one = fitting(found, "bbbbbbbbbbbb z position")[0]
    assert one.text == "undefined"
    assert facts(one)["note"] == "the target is constant"
    assert facts(one)["gap"] == "5 frames = 1 s"


def test_the_line_goes_from_the_number_to_the_raw_files(tmp_path):
    cache = Cache(tmp_path)
    raw = Made(text=" ".join(f"{n:02d}.zip" for n in range(23)), origin="https://example.org/\x1b[2J/")
    made = family(cache, raw=raw)
    score(cache, *FLOORS)
    done = avrl(cache, "--why", "two-stream · cls, position R²")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("two-stream · cls, position R²: 0.")
    told = " ".join(done.stdout.split())
    assert "trained on 640 samples of 60 episodes" in told
    assert "gap 3 frames = 0.6 s" in told
    assert "alpha 10" in told
    names = [f"{one.manifest.stage}/{one.ref}" for one in made.values()]
    heads = [line for line in lines if any(name in line for name in names)]
    assert [len(line) - len(line.lstrip()) for line in heads] == [2, 4, 6, 8, 10, 6, 4]
    assert all(f"{name}" in told for one in made.values() for name in (one.manifest.key, one.digest))
    raw_at = next(i for i, line in enumerate(lines) if line.startswith("raw files of "))
    assert "https://example.org/" in lines[raw_at]
    assert [line.split()[-1] for line in lines[raw_at + 1 : raw_at + 21]] == [f"{n:02d}.zip" for n in range(20)]
    assert made["raw"].manifest.files[0].sha256[:12] in lines[raw_at + 1]
    assert lines[-1] == "  and 3 more, 18 B"
    assert "\x1b" not in done.stdout


def test_a_removed_parent_is_told_and_json_holds_it_all(tmp_path):
    cache = Cache(tmp_path)
    made = family(cache)
    shutil.rmtree(made["checkpoint"].root)
    said = avrl(cache, "--why", "cls position R2").stdout
    ref, digest = made["checkpoint"].ref, made["checkpoint"].digest[:12]
    assert f"checkpoint: {ref} (digest {digest}), no longer in the cache: what it was made from is not known" in said
    made["checkpoint"].root.mkdir()
    (made["checkpoint"].root / MANIFEST).write_text("{")
    done = avrl(cache, "--why", "cls position R2")
    assert f"checkpoint: {ref} (digest {digest}), damaged:" in done.stdout
    assert done.stderr.startswith(f"warning: {made['checkpoint'].root / MANIFEST} is damaged")
    done = avrl(cache, "--why", "cls position R2", "--json")
    told = json.loads(done.stdout)
    assert told["verb"] == "report"
    assert (told["number"]["split"], told["number"]["n_train"]) == ("val", 640)
    assert 0 < told["number"]["low"] < told["number"]["value"] < told["number"]["high"] < 1
    gone = [one["ref"] for one in told["lineage"] if not one["in_cache"]]
    assert gone == [made["checkpoint"].ref]
    assert [len(one["files"]) for one in told["raw"]] == [2]


def test_several_are_listed_at_most_twelve_and_none_is_guessed(tmp_path):
    cache = Cache(tmp_path)
    family(cache, row=Row(readouts=("cls", "grid", "m", "p")))
    score(cache, *FLOORS)
    done = avrl(cache, "--why", "val")
    assert isinstance(done.exception, NotFoundError)
    assert done.exception.exit_code == 3
    assert done.exception.cause == "24 numbers fit 'val'"
    listed = done.stderr.splitlines()
    assert len(listed) == 13
    assert listed[0].startswith("  two-stream · cls, position R², aaaaaaaaaaaa: 0.")
    assert listed[-1] == "  ... and 12 more"
    assert done.stdout == ""
    assert not (cache.root / "tables").exists()

"""What `avrl report` says on stdout: in which form, of which scores, and nothing else."""

import csv
import io
import json

import pytest
from scored import FLOORS, Row, demo, score
from typer.testing import CliRunner

from avrl import report
from avrl.cache import Cache
from avrl.comparison import read
from avrl.errors import ConfigError
from avrl.stages.report import only
from avrl_cli.app import app

SMALL = ("report", "--resamples", "100")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    found = Cache(tmp_path_factory.mktemp("cache"))
    demo(found)
    return found


@pytest.fixture
def said(cache):
    def run(*arguments):
        done = CliRunner().invoke(app, [*SMALL, "--cache", str(cache.root), *arguments])
        assert done.exit_code == 0, done.output
        return done

    return run


def test_formats_are_clean_on_stdout(cache, said):
    page = said().stdout
    (made,) = cache.artifacts("tables")
    assert page.splitlines()[-1] == str(made.root)
    assert said("--format", "csv").stdout == (made.root / "scores.csv").read_text()
    rows = json.loads(said("--format", "json").stdout)
    scores = read(cache.artifacts("scores"))[0]
    assert rows == scores.to_dicts()
    assert {type(one["value"]) for one in rows} == {float}
    assert rows[0]["alpha"] == 10.0
    assert len(list(csv.reader(io.StringIO(said("--format", "csv").stdout)))) == len(rows) + 1
    html = (made.root / "report.html").read_text(encoding="utf-8")
    for form, label in (("md", "## {title}\n"), ("tex", "\\caption{{{title}. ")):
        text = said("--format", form)
        titles = ["Scores", "Differences", "By target dimension", "Training"]
        places = [text.stdout.index(label.format(title=title)) for title in titles]
        assert places == sorted(places)
        assert [html.index(f">{title}</h3>") for title in titles] == sorted(
            html.index(f">{one}</h3>") for one in titles
        )
        assert str(made.root) not in text.stdout
        assert str(made.root) in text.stderr


def test_only_keeps_floors_and_twins(tmp_path):
    ours = [Row(encoder=name, init=init) for name in ("videomae", "two-stream") for init in ("trained", "random")]
    flow = Row(encoder="dinov2", init="pretrained", probe="flow")
    scores = score(Cache(tmp_path), *ours, *FLOORS, flow)
    assert only(scores, []) == scores
    assert only(scores, ["videomae"]) == [*scores[:2], *scores[4:8]]
    assert only(scores, ["bridge", "two-stream"]) == scores[2:8]
    assert only(scores, ["flow"]) == scores[8:]
    with pytest.raises(
        ConfigError, match="no scores of it; there are probes bridge, flow; encoders dinov2, two-stream, videomae"
    ):
        only(scores, ["nope"])


def test_only_takes_checkpoints_by_the_names_that_reports_give_them(tmp_path):
    refs = [f"two-stream-tiny-{'ab' * 3}123456", f"two-stream-tiny-{'ab' * 3}654321"]
    ours = [Row(checkpoint=ref, init=init) for ref in refs for init in ("trained", "random")]
    scores = score(Cache(tmp_path), *ours, *FLOORS)
    for name in (refs[0], refs[0][:-3], "two-stream@123456"):
        assert only(scores, [name]) == [*scores[:2], *scores[4:]]
    assert only(scores, [refs[0], "two-stream@654321"]) == only(scores, ["two-stream"]) == scores
    with pytest.raises(ConfigError, match="--only two-stream-t: several runs fit: two-stream-tiny-ababab123456, "):
        only(scores, ["two-stream-t"])
    with pytest.raises(ConfigError, match="--only two-stream@9: no scores of it"):
        only(scores, ["two-stream@9"])


def test_a_report_of_some_and_a_comparison_write_where_they_should(cache, said):
    before = sorted(cache.root.rglob("*"))
    text = said("--compare", "two-stream", "videomae", "--format", "json")
    rows = json.loads(text.stdout)
    assert {(one["encoder"], one["encoder_b"]) for one in rows} == {("two-stream", "videomae")}
    assert said("--compare", str(cache.root), str(cache.root), "--only", "videomae").stdout.count("equal") == 21
    assert sorted(cache.root.rglob("*")) == before
    ends = [one.ref[-6:] for one in cache.artifacts("checkpoints") if one.ref.startswith("two-stream")]
    assert said("--compare", f"two-stream@{ends[0]}", "videomae", "--format", "json").stdout == text.stdout
    few = said("--only", "videomae,bridge").stdout
    assert "Actions are told better" in few
    assert "Flow:" not in few
    assert "Flow:" in said("--only", "videomae").stdout
    assert "videomae" in few
    assert "single-stream · " not in few  # only among those that converge


def test_without_one_artifact_exactly_its_cells_change(tmp_path):
    scores, checkpoints = demo(Cache(tmp_path / "cache"))
    gone = next(one for one in scores if one.manifest.config["encoder"] == "mean")
    rows = {}
    for name, some in (("all", scores), ("less", [one for one in scores if one is not gone])):
        (tmp_path / name).mkdir()
        report.write(tmp_path / name, some, checkpoints, 200)
        tables = sorted((tmp_path / name).glob("*.csv"))
        rows[name] = {(one.name, line) for one in tables for line in one.read_text(encoding="utf-8").splitlines()}
    assert rows["less"] < rows["all"]
    lost = rows["all"] - rows["less"]
    names = {"dimensions-bridge-reached-gap3.csv", "main-bridge-reached-gap3.csv", "scores.csv"}
    assert {name for name, _ in lost} == names
    assert all(gone.ref in line for _, line in lost)

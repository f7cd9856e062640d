"""The stage and the verb: hits, digests, what a removed artifact changes, exit codes."""

import shutil
import sys
from pathlib import Path

import polars as pl
import pytest
import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))
from scored import Row, demo, score

from avrl.cache import Cache
from avrl.errors import ConfigError, NotFoundError
from avrl.stage import run
from avrl.stages.report import STAGE, ReportConfig, inputs
from avrl_cli import report


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cache = Cache(tmp_path_factory.mktemp("cache"))
    given = inputs(*demo(cache))
    return cache, given, run(STAGE, ReportConfig(), given, cache)[0]


def app():
    one = typer.Typer()
    one.command(report.NAME)(report.command)
    return one


def test_same_scores_same_bytes(made):
    cache, given, first = made
    assert run(STAGE, ReportConfig(), given, cache)[1]
    shutil.copytree(first.root, cache.root / "kept")
    shutil.rmtree(first.root)
    # As a killed build leaves it: some files, one of them cut short, one that should not be there.
    partial = cache.partial("tables", STAGE.slug(ReportConfig(), given), STAGE.key(ReportConfig(), given))
    partial.mkdir()
    (partial / "report.html").write_text("<html>half")
    (partial / "stray.csv").write_text("x")
    again, hit = run(STAGE, ReportConfig(), given, cache)
    assert not hit
    assert again.digest == first.digest


def test_roles_follow_the_references(made):
    _, given, _ = made
    shuffled = inputs([given[f"scores-{i:02d}"] for i in (2, 0, 1)], [])
    refs = [one.ref for one in shuffled.values()]
    assert list(shuffled) == ["scores-00", "scores-01", "scores-02"]
    assert refs == sorted(refs)


def test_removing_one_artifact_changes_exactly_its_rows(made):
    cache, given, full = made
    gone = next(one for one in given.values() if one.manifest.config.get("encoder") == "state")
    rest = {role: one for role, one in given.items() if one is not gone}
    less, hit = run(STAGE, ReportConfig(), rest, cache)
    assert not hit
    for name in ("main", "dimensions", "differences"):
        before, after = (
            pl.read_csv(one.root / f"{name}-bridge-reached-gap3.csv", infer_schema=False) for one in (full, less)
        )
        assert before.filter(scores=gone.ref).height == (0 if name == "differences" else 1)
        assert after.equals(before.filter(pl.col("scores") != gone.ref))


def test_verb_prints_one_screen_and_then_the_path(made):
    cache, _, first = made
    result = CliRunner().invoke(app(), ["--cache", str(cache.root)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "The three models converge: pass (two-stream, single-stream, videomae)" in result.stdout
    assert any(line.startswith("pixels-16 ") for line in lines)
    assert lines[-1] == str(first.root)
    assert len(lines) < 45


def test_dry_run_writes_nothing(tmp_path):
    score(Cache(tmp_path), Row())
    result = CliRunner().invoke(app(), ["--cache", str(tmp_path), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "1 scores and 0 checkpoints" in result.stderr
    assert not (tmp_path / "tables").exists()


def test_no_scores_names_the_next_command(tmp_path):
    result = CliRunner().invoke(app(), ["--cache", str(tmp_path)])
    assert isinstance(result.exception, NotFoundError)
    assert result.exception.exit_code == 3
    assert "avrl probe bridge --encoder dinov2" in str(result.exception)


def test_too_few_resamples():
    with pytest.raises(ConfigError, match="too few"):
        ReportConfig(resamples=10)

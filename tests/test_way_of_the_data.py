"""From clips to the report, by the command line alone, twice: the second run is hits only. Then killed in between."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner
from way import AVRL, TINY, VERBS, copied

from avrl.artifact import sha256_of
from avrl.errors import ConfigError, DiskFullError, NotFoundError
from avrl.torchvision_ops import timm
from avrl_cli.app import app

TEST_VIT = "test_vit.r160_in1k"

FLOORS = {"mean", "state", "pixels-8", "pixels-16", "oracle"}


def avrl(cache: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AVRL_CACHE": str(cache)}
    return subprocess.run([AVRL, *words], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def cache(stations, tmp_path_factory):
    """A cache in which every verb has run once, the last two for all encoders."""
    root = copied(stations[-1].after, tmp_path_factory.mktemp("way") / "cache")
    shutil.rmtree(root / "tables")  # of one encoder
    for words in VERBS[-2:]:
        done = avrl(root, *words)
        assert done.returncode == 0, (words, done.stderr)
    return root


def test_the_second_time_everything_is_a_hit(cache):
    for words in VERBS:
        done = avrl(cache, *words, "--json")
        document = json.loads(done.stdout)
        assert done.returncode == 0, done.stderr
        assert document["artifacts"]
        assert all(one["hit"] for one in document["artifacts"]), words


def test_a_dry_run_says_hit_or_why_not(cache):
    assert "hit  frames/" in avrl(cache, "prep", "--image-size", "32", "--dry-run").stderr
    missed = avrl(cache, "prep", "--image-size", "64", "--dry-run").stderr
    assert "miss frames/" in missed
    assert "image_size: 32 -> 64" in missed


def test_a_dry_run_counts_the_episodes_that_are_trained_on(cache):
    said = avrl(cache, "pretrain", "two-stream", *TINY, "--epochs", "3", "--dry-run").stderr
    assert "3 epochs of 20 steps: 2 pairs x 80 episodes (4 more are held out or too short)" in said
    assert "weight decay 0.05; gaps 1 to 10, p ~ 0.8^(gap-1), weighted 0.5^(gap-1) in the loss; seed 0" in said


def test_every_encoder_stands_beside_its_twin_and_the_floors(cache):
    scores = pl.concat([pl.read_parquet(one) for one in cache.glob("scores/*/scores.parquet")], how="vertical_relaxed")
    found = set(scores.select("encoder", "init").unique().iter_rows())
    ours = {"two-stream", "single-stream", "videomae"}
    assert found == {(name, init) for name in ours for init in ("trained", "random")} | {(f, "none") for f in FLOORS}
    assert scores["fingerprint"].n_unique() == 1
    assert set(scores.filter(metric="r2")["dimension"]) == {"x", "y", "z", "roll", "pitch", "yaw", "gripper", "mean"}


def test_a_gap_that_leaves_nothing_to_score_is_refused_before_features_are_made(cache):
    done = avrl(cache, "probe", "bridge", "--encoder", "two-stream", "--gap", "1000", "--dry-run")
    assert done.returncode == 2
    assert "0 training and 0 held-out episodes of more than 1000 frames" in done.stderr


def test_an_attentive_table_has_its_floors_and_its_ceiling(cache):
    done = avrl(cache, "probe", "bridge", "--encoder", "two-stream", "--solver", "attentive", "--dry-run")
    assert done.returncode == 0, done.stderr
    for name in FLOORS | {"two-stream"}:
        assert f"miss scores/bridge-{name}-" in done.stderr


def test_two_raw_artifacts_of_one_digest_are_no_ambiguity(cache):
    (raw,) = cache.glob("raw/bridge*")
    again = raw.with_name(raw.name[:-1] + ("0" if raw.name[-1] != "0" else "1"))
    shutil.copytree(raw, again, symlinks=True)
    done = avrl(cache, "probe", "bridge", "--encoder", "two-stream", "--dry-run")
    shutil.rmtree(again)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_descends_from_frames_and_nothing_else(cache):
    for manifest in cache.glob("checkpoints/*/manifest.json"):
        assert [one["role"] for one in json.loads(manifest.read_bytes())["inputs"]] == ["frames"]


def test_every_number_can_be_traced_to_the_raw_files(cache):
    manifests = {
        json.loads(one.read_bytes())["digest"]: json.loads(one.read_bytes()) for one in cache.glob("*/*/manifest.json")
    }
    report = next(one for one in manifests.values() if one["stage"] == "tables")
    seen, todo = set(), [report]
    while todo:
        one = todo.pop()
        seen.add(one["stage"])
        todo += [manifests[parent["digest"]] for parent in one["inputs"]]
    assert seen == {"tables", "scores", "features", "labels", "checkpoints", "frames", "raw"}
    assert any("MIT" in line for line in report["licence"])


def test_the_page_is_there_and_names_the_encoders(cache):
    page = next(cache.glob("tables/*/report.html")).read_text()
    for word in ("two-stream", "single-stream", "videomae", "pixels-16", "untrained"):
        assert word in page


def test_a_probe_like_an_earlier_one_is_a_hit(cache):
    scores = next(cache.glob("scores/bridge-two-stream-gap1-*"))
    done = avrl(cache, "probe", "bridge", "--encoder", "two-stream", "--like", scores, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert all(one["hit"] for one in json.loads(done.stdout)["artifacts"])


def test_a_damaged_checkpoint_is_refused_by_name(cache):
    weights = next(cache.glob("checkpoints/two-stream*/model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    before = weights.read_bytes()
    weights.write_bytes(data)
    try:
        done = avrl(cache, "probe", "bridge", "--encoder", "two-stream", "--gap", "2")
    finally:
        weights.write_bytes(before)
    assert done.returncode == 8
    assert "model.safetensors" in done.stderr
    assert len(done.stderr.splitlines()) == 1  # once, and before the floors
    assert "copy it again from where it was mirrored" in done.stderr


def inside(cache: Path, *words: str):
    """The command in this process, which has torch already."""
    return CliRunner().invoke(app, [*words, "--cache", str(cache)])


@pytest.fixture(scope="module")
def few(cache, tmp_path_factory):
    """The same checkpoints, beside frames of which there are few."""
    torch.set_num_threads(1)  # as elsewhere: threads that wait for each other are slow on a busy machine
    root = tmp_path_factory.mktemp("few")
    for noun in ("raw", "checkpoints"):
        shutil.copytree(cache / noun, root / noun, symlinks=True)
    assert inside(root, "prep", "sample", "--image-size", "32", "--fps", "1", "--workers", "1").exit_code == 0
    return root


SPOKEN = {
    "bridge": [],
    "egodex": [],
    "flow": ["--seeds", "0,1", "--pairs", "60"],
    "order": ["--gap", "1,2"],
    "clusters": [],
}


@pytest.mark.parametrize("what", SPOKEN)
def test_everything_that_can_be_probed_runs_and_is_found_the_second_time(few, what, tmp_path):
    words = ["probe", what, "--on", "sample", "--encoder", "two-stream,videomae,random,pixels", *SPOKEN[what]]
    words += ["--resamples", "100", "--json", "--quiet"]
    for hit in (False, True):
        done = inside(few, *words)
        assert done.exit_code == 0, done.output
        made = [one for one in json.loads(done.stdout)["artifacts"] if one["stage"] == "scores"]
        assert {one["hit"] for one in made} == {hit}
        runs = 2 if SPOKEN[what][:1] in (["--gap"], ["--seeds"]) else 1
        assert sum("two-stream" in one["ref"] or "videomae" in one["ref"] for one in made) == 4 * runs
    like = inside(few, *words[:6], "--like", made[-1]["ref"], "--dry-run")
    assert (like.exit_code, "miss scores" in like.stderr) == (0, False), like.output
    if what == "bridge":  # a matrix that was stopped after its first floors: nothing to draw a line of
        for one in [*few.glob("scores/bridge-mean-*"), *few.glob("scores/bridge-state-*")]:
            shutil.copytree(one, tmp_path / "scores" / one.name)
        assert inside(tmp_path, "report", "--quiet").exit_code == 0
    if what == "clusters":
        table = pl.concat([pl.read_parquet(one) for one in few.glob("scores/clusters-*/scores.parquet")])
        assert "from frame t shown twice" in set(table["note"])


def test_a_dry_run_of_a_probe_counts_rows_and_bytes_and_what_cannot_fit_is_refused(few, monkeypatch):
    words = ["probe", "order", "--on", "sample", "--encoder", "single-stream"]
    told = inside(few, *words, "--dry-run").stderr
    assert re.search(r"miss features/single-stream-gap1: .*\n +\d+ rows, [\d.]+ MB at most", told)
    assert re.search(r"MB of features at most, [\d.]+ .B free: it fits", told)
    free = shutil.disk_usage(few)._replace(free=10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    for more in ([], ["--dry-run"]):
        done = inside(few, *words, *more)
        assert isinstance(done.exception, DiskFullError)
        assert "what is to be encoded of egodex-sample" in str(done.exception)
    assert not list(few.glob("features/single-stream*"))


def test_what_one_encoder_lacks_does_not_end_the_others(few):
    words = ["probe", "bridge", "--on", "sample", "--encoder", "videomae,two-stream", "--readout", "m"]
    done = inside(few, *words, "--resamples", "100", "--json")
    assert done.exit_code == 2
    assert "avrl: videomae (trained): videomae has none of the readouts asked for; leave out --readout" in done.stderr
    document = json.loads(done.stdout)
    assert [one["what"] for one in document["failures"]] == ["videomae (trained)", "videomae (random)"]
    assert sum("two-stream" in one["ref"] and one["stage"] == "scores" for one in document["artifacts"]) == 2


def test_weights_for_a_checkpoint_are_refused_and_a_file_that_is_not_there_is_told_at_once(few, tmp_path):
    """They were ignored: 'nothing to do', exit 0."""
    words, absent = ["probe", "bridge", "--on", "sample", "--weights", "/nonexistent"], tmp_path / "no-frames"
    for name in ("two-stream", next(few.glob("checkpoints/videomae*")).name):
        error = inside(few, *words, "--encoder", name).exception
        assert isinstance(error, ConfigError)
        assert str(error) == f"{name} is a checkpoint, with weights of its own; leave out --weights"
    for name in ("dinov2", "openvla", f"timm:{TEST_VIT}"):
        error = inside(absent, *words, "--encoder", name, "--dry-run").exception
        assert isinstance(error, NotFoundError)
        assert str(error).startswith("no weights file /nonexistent")


def test_rows_of_a_file_of_ones_own_say_so_and_a_readout_that_has_no_part_is_no_other_request(
    few, tmp_path, monkeypatch
):
    network = timm.create_model(TEST_VIT, num_classes=0)
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    digest = sha256_of(tmp_path / "mine.safetensors")[:8]
    words = ["probe", "flow", "--on", "sample", "--pairs", "60", "--resamples", "100", "--json"]
    words += ["--encoder", f"timm:{TEST_VIT}", "--weights", str(tmp_path / "mine.safetensors")]
    done = inside(few, *words)
    assert done.exit_code == 0, done.output
    (made,) = few.glob(f"scores/flow-timm-{TEST_VIT}-gap1-*")
    rows = pl.read_parquet(made / "scores.parquet").select("encoder", "init", "weights", "licence").unique()
    named, licence = f"timm:{TEST_VIT} (weights {digest})", f"timm:{TEST_VIT}: not known: a file of one's own"
    assert rows.rows() == [(named, "pretrained", f"file {digest}", licence)]
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "timm" else real(name))
    again = inside(few, *words, "--readout", "patch-mean,cls")
    (line,) = [one for one in again.stderr.splitlines() if "made with timm" in one]
    assert f"(installed: 9.9); to make them anew: rm -r {made} " in line
    assert all(one["hit"] for one in json.loads(again.stdout)["artifacts"])
    assert "--readout has no part in flow, which looks at patches" in again.stderr


def test_offline_weights_are_exit_11_with_the_command_that_gets_them(cache, tmp_path):
    environment = {**os.environ, "AVRL_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    words = [AVRL, "probe", "bridge", "--encoder", "dinov2"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 11
    assert "avrl fetch encoders --encoder dinov2" in done.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_ranks_that_a_launcher_started_join_one_run(cache, tmp_path, launcher):
    frames = next(cache.glob("frames/egodex*"))
    words = ["pretrain", "single-stream", *TINY, "--seed", "5" if launcher == "slurm" else "6", "--device", "cpu"]
    words += ["--frames", frames.name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AVRL_CACHE": str(cache)}
    if launcher == "torchrun":
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--no-python"]
        codes = [
            subprocess.run([*torchrun, AVRL, *words], env=environment, capture_output=True, check=False).returncode
        ]
    else:  # the first tasks of two nodes
        environment |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": str(os.getpid())}
        environment |= {"SLURM_STEP_NODELIST": "localhost,gpu[2-3]", "SLURM_NTASKS": "2"}
        ranks = [
            subprocess.Popen(
                [AVRL, *words, "--gpus", "2"],
                env={**environment, "SLURM_PROCID": str(rank)},
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(2)
        ]
        codes = [one.wait(timeout=120) if one.communicate() else 1 for one in ranks]
    assert set(codes) == {0}
    made = [json.loads(one.read_bytes()) for one in cache.glob("checkpoints/single-stream*/manifest.json")]
    assert sum(one["facts"]["processes"] == 2 for one in made) >= 1

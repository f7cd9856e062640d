"""From clips to the report, by the command line alone, twice: the second run is hits only. Then killed in between."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

AVRL = str(Path(sys.executable).parent / "avrl")
TINY = ["--size", "tiny", "--image-size", "32", "--epochs", "1", "--pairs-per-episode", "2", "--batch-size", "8"]
VERBS = [
    ["fetch", "sample"],
    ["prep", "sample", "--image-size", "32"],
    ["pretrain", "two-stream", *TINY],
    ["pretrain", "single-stream", *TINY],
    ["pretrain", "videomae", *TINY, "--mask-ratio", "0.5"],
    ["probe", "bridge", "--encoder", "two-stream", "--encoder", "single-stream", "--encoder", "videomae"],
    ["report"],
]
FLOORS = {"mean", "state", "pixels-8", "pixels-16", "oracle"}


def avrl(cache: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AVRL_CACHE": str(cache)}
    return subprocess.run([AVRL, *words], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache in which every verb has run once."""
    root = tmp_path_factory.mktemp("way")
    for words in VERBS:
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

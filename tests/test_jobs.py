"""`avrl pretrain --launch-script`: scripts that a shell, Slurm and SkyPilot can read, of exactly this run."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from avrl.jobs import skypilot, slurm, words
from avrl.stages.pretrain import PretrainConfig

AVRL = str(Path(sys.executable).with_name("avrl"))
ODD = 's3://b/it\'s "$HOME" `x`'


def avrl(*typed, code=0):
    done = subprocess.run([AVRL, *typed], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def directives(script):
    """``#SBATCH --name=value`` lines, which end where the first command stands."""
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    found = dict(one.removeprefix("#SBATCH --").partition("=")[::2] for one in lines if one.startswith("#SBATCH "))
    last = max(number for number, one in enumerate(lines) if one.startswith("#SBATCH "))
    assert all(one.startswith("#") for one in lines[: last + 1])
    return found


def is_bash(script):
    return subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def command(script, before):
    (line,) = (one.strip() for one in script.splitlines() if one.strip().startswith(before))
    return shlex.split(line.removeprefix(before))


def test_an_sbatch_script_starts_a_task_a_gpu_and_goes_on_after_the_warning(tmp_path):
    cache = tmp_path / "a $cache"
    typed = ["two-stream", "--gpus", "4", "--workers", "6", "--seed", "3", "--augment", "--ablate", "m-only"]
    script = avrl("pretrain", *typed, "--cache", str(cache), "--launch-script", "slurm")
    found = directives(script)
    assert is_bash(script)
    assert found["ntasks-per-node"] == found["gpus-per-node"] == "4"
    assert found["cpus-per-task"] == "8"
    assert found["signal"] == "USR1@120"
    assert {"requeue", "time", "mem", "job-name"} <= set(found)
    ran = command(script, "srun avrl ")
    assert ran[:2] == ["pretrain", "two-stream"]
    assert {*pairwise(ran)} >= {("--gpus", "4"), ("--seed", "3"), ("--ablate", "m-only")}
    assert "--augment" in ran
    assert command(script, "export AVRL_CACHE=") == [str(cache)]
    assert not cache.exists()


@pytest.mark.parametrize(("code", "requeued"), [(138, True), (0, False), (9, False)])
def test_only_a_run_that_was_warned_is_queued_again(tmp_path, code, requeued):
    for name, body in {"srun": f"exit {code}", "scontrol": f"echo $@ > {tmp_path / 'told'}"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = slurm("x", ["pretrain", "two-stream"], tmp_path, gpus=1, workers=2)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "77"}
    assert subprocess.run(["bash"], input=script, text=True, env=env).returncode == code
    assert (tmp_path / "told").exists() == requeued
    if requeued:
        assert (tmp_path / "told").read_text() == "requeue 77\n"


def test_a_skypilot_task_runs_the_same_words():
    typed = ["pretrain", "videomae", "--sync", ODD]
    task = yaml.safe_load(skypilot("avrl-videomae", typed, gpus=4, frames="s3://b/f", sync=ODD))
    assert task["name"] == "avrl-videomae"
    assert task["resources"]["accelerators"] == "A10G:4"
    assert task["resources"]["use_spot"] is True
    assert shlex.split(task["run"]) == ["avrl", *typed]
    assert is_bash(task["run"])
    assert is_bash(task["setup"])


@pytest.mark.parametrize(
    "given", [[], ["--frames", "s3://bucket/f"], ["--sync", "s3://bucket/r"], ["--frames", "mine"]]
)
def test_a_rented_machine_must_find_frames_and_keep_the_run(given):
    said = avrl("pretrain", "two-stream", *given, "--launch-script", "skypilot", code=2)
    assert "a rented machine needs" in said


@pytest.mark.parametrize(
    "config",
    [
        PretrainConfig(),
        PretrainConfig(
            augment=True, ema=0.999, gpus=4, gaps="uniform", sync="s3://bucket/r", sync_every="2h", shutdown=True
        ),
        PretrainConfig(objective="videomae", num_frames=16, lr=3e-4, precision="fp32", tracker="wandb"),
    ],
)
def test_the_words_make_the_same_config_again(tmp_path, config):
    """Parsed by the command line itself: the script of the script is the script."""
    script = slurm("x", ["pretrain", config.objective, *words(config)], tmp_path, gpus=config.gpus, workers=2)
    ran = command(script, "srun avrl ")
    again = avrl(*ran, "--cache", str(tmp_path), "--launch-script", "slurm")
    assert command(again, "srun avrl ")[:2] == ran[:2]
    settled = {"--mask-ratio", "0.9"} if config.num_frames == 16 else set()  # what a default means there
    assert set(command(again, "srun avrl ")) == set(ran) | settled


def test_with_json_the_script_is_no_noise_on_stdout(tmp_path):
    said = avrl("pretrain", "two-stream", "--cache", str(tmp_path), "--launch-script", "slurm", "--json")
    assert "srun avrl" in json.loads(said)["script"]

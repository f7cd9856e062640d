"""Ranks on several nodes: what Slurm says to them, what they say when they do not see the same disk."""

import os
import sys
import time
from pathlib import Path

import metadata
import pytest
import torch

import avrl_cli.app
from avrl.cache import Cache
from avrl.errors import ConfigError, DivergedError, TemporaryError
from avrl.ranks import Stop, Stopped, first_host, rank_of_job
from avrl.stages import pretrain
from avrl.stages.pretrain import PretrainConfig

TASK = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[3-4]"}
TASK |= {"SLURM_JOB_ID": "70017", "SLURM_NTASKS": "8"}


@pytest.fixture
def started(monkeypatch):
    """Set what a launcher sets; what is made of it goes again with the test."""
    torchs = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

    def start(**environment):
        for name in (*torchs, *(one for one in os.environ if one.startswith("SLURM_"))):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    for name in torchs:
        monkeypatch.setenv(name, "")
    return start


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[03-05,9],login", "gpu03"),
        ("gpu[12,3-4]-ib", "gpu12-ib"),
        ("rack[0-1]n[10-12],x", "rack0n10"),
    ],
)
def test_the_first_rank_is_on_the_first_node(nodes, first):
    assert first_host(nodes) == first


def test_a_task_of_slurm_is_a_rank_and_looks_for_the_gpu_of_its_node(started):
    started(**TASK)
    assert rank_of_job(8) == 5
    told = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    local = "0" if torch.cuda.device_count() == 1 else "1"
    assert told == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": local,
        "MASTER_ADDR": "gpu3",
        "MASTER_PORT": "30017",
    }


def test_a_batch_script_without_srun_stands_alone(started):
    """Slurm tells it how many tasks there could be."""
    started(SLURM_NTASKS="8", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_NODELIST="gpu[3-4]", SLURM_JOB_ID="1")
    assert rank_of_job(8) is None


def test_gpus_that_would_stand_idle_are_told(started):
    started(**TASK)
    with pytest.raises(ConfigError, match="--gpus 16, but 8 processes were started; start one a GPU: srun --ntasks"):
        rank_of_job(16)
    assert rank_of_job(1) == 5


def test_a_node_without_the_frames_says_which_it_is(started, tmp_path, monkeypatch, capsys):
    started(**TASK)
    monkeypatch.setattr(sys, "argv", ["avrl", "pretrain", "two-stream", "--cache", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        avrl_cli.app.main()
    assert ended.value.code == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"on {os.uname().nodename}; let all nodes see one cache, and name it with --cache" in line


@pytest.mark.parametrize(
    ("end", "own"), [(Stopped(143), False), (DivergedError("x"), False), (TemporaryError("x"), True)]
)
def test_the_first_rank_alone_tells_what_all_know(end, own, started, tmp_path, monkeypatch):
    from avrl import training

    class Frames:
        root, digest = tmp_path, "d"
        manifest = type("Manifest", (), {"facts": {"source": "made"}})

    def ends(*_):
        raise end

    started(**TASK)
    monkeypatch.setattr(training, "train", ends)
    if own:
        with pytest.raises(TemporaryError):
            pretrain.follow(PretrainConfig(), {"frames": Frames}, Cache(tmp_path))
    else:
        assert pretrain.follow(PretrainConfig(), {"frames": Frames}, Cache(tmp_path))
    assert list(Path(tmp_path).rglob(".partial-*"))


def test_every_node_of_a_synced_run_heeds_its_own_spot_notice(started, tmp_path, monkeypatch):
    from avrl import machine, remoterun, training

    class Frames:
        root, digest = tmp_path, "d"
        manifest = type("Manifest", (), {"facts": {"source": "made"}})

    def trains(*_):
        with Stop() as stop:
            service.notice = metadata.NOTICE
            until = time.monotonic() + 20
            while not stop.code and time.monotonic() < until:
                time.sleep(0.01)
            raise Stopped(stop.code)

    started(**TASK)
    monkeypatch.setattr(training, "train", trains)
    monkeypatch.setattr(remoterun, "is_finished", lambda *_: False)
    monkeypatch.setattr(machine, "POLL_S", 0.02)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    ended = []
    monkeypatch.setattr("avrl.ranks.Stopped.__init__", lambda self, code: ended.append(code))
    with metadata.serving() as service:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.url)
        assert pretrain.follow(PretrainConfig(sync="s3://bucket/runs"), {"frames": Frames}, Cache(tmp_path))
    assert ended == [143]

"""`avrl pretrain --sync`, `--shutdown` and spot notices by the command line, on machines that are lost on the way."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import metadata
import pytest
import torch
from bucket import BACKEND, NAME, refuse
from made import frame_store
from test_training import stop_after

import avrl_cli.app
from avrl import machine, remoterun, training
from avrl.artifact import MANIFEST, Manifest, digest_of, hash_files, key_of, publish, seal
from avrl.cache import Cache
from avrl.server import Patience
from avrl.stage import run
from avrl.stages import pretrain
from avrl.stages.pretrain import STAGE, PretrainConfig

TINY = ["single-stream", "--size", "tiny", "--image-size", "32", "--pairs-per-episode", "5", "--batch-size", "4"]
TINY += ["--device", "cpu", "--workers", "1"]
SYNC, EAGER = ["--sync", f"s3://{NAME}/runs/"], ["--save-minutes", "0", "--sync-every", "0.01s"]
CONFIG = {"objective": "single-stream", "size": "tiny", "image_size": 32, "pairs_per_episode": 5, "batch_size": 4}


def frames_in(root):
    """A finished frames artifact of 4 episodes."""
    partial = root / "frames" / ".made"
    files = hash_files(frame_store(partial, [8] * 4))
    facts = {"source": "egodex", "episodes": 4}
    key = key_of("frames", 1, {}, {})
    manifest = Manifest("frames", 1, key, digest_of(files), {}, {}, [], files, facts, [], {}, 0.0)
    seal(partial, manifest)
    return publish(partial, root / "frames" / f"egodex-{key[:12]}")


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return frames_in(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def straight(frames, tmp_path_factory):
    """Digests of undisturbed runs, by number of epochs."""
    torch.set_num_threads(1)
    found = {}

    def digest(epochs):
        if epochs not in found:
            config = PretrainConfig(**CONFIG, epochs=epochs, device="cpu", workers=1)
            found[epochs] = run(STAGE, config, {"frames": frames}, Cache(tmp_path_factory.mktemp("straight")))[0].digest
        return found[epochs]

    return digest


@pytest.fixture
def machines(frames, store, tmp_path, monkeypatch, capsys):
    """`avrl pretrain` on a machine whose cache holds the frames alone, or what it is given."""
    torch.set_num_threads(1)
    monkeypatch.setattr(remoterun, "PATIENCE", Patience(attempts=2, backoff_s=0.01, timeout_s=1.0))
    level, kept = logging.getLogger("avrl").level, logging.root.handlers[:]
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)}

    def cache(name):
        root = tmp_path / name
        if not root.exists():
            shutil.copytree(frames.root.parent.parent, root)
        return root

    def call(name, *words):
        monkeypatch.setattr(sys, "argv", ["avrl", "pretrain", *TINY, "--cache", str(cache(name)), "--json", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            avrl_cli.app.main()
        out, call.err = capsys.readouterr()
        call.document = json.loads(out) if out else {}
        return caught.value.code or 0

    call.cache = cache
    yield call
    logging.root.handlers[:] = kept
    logging.getLogger("avrl").setLevel(level)
    for one, handler in before.items():
        signal.signal(one, handler)


def digest_of_run(call):
    return call.document["artifacts"][0]["digest"]


def folders(store):
    return {"/".join(key.split("/")[1:-1]).removesuffix("/timm") for key in store.keys}


def test_a_run_goes_on_from_s3_on_a_new_machine_and_its_checkpoint_is_a_hit_on_a_third(
    machines, straight, store, monkeypatch
):
    words = ["--epochs", "2", *SYNC]
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert machines("first", *words) == 143
    assert [one.rpartition("/")[2] for one in folders(store)] == ["step-000000006"]
    assert machines("second", *words) == 0
    assert "brought" in machines.err
    assert digest_of_run(machines) == straight(2)
    ref = machines.document["artifacts"][0]["ref"]
    assert machines.document["artifacts"][0]["mirror"] == f"s3://{NAME}/runs/{ref}"
    assert folders(store) == {ref}
    store.asked.clear()
    assert machines("third", *words) == 0
    assert digest_of_run(machines) == straight(2)
    assert machines.document["artifacts"][0]["hit"]
    assert not store.sent("PutObject", "DeleteObject")
    assert not store.broken
    assert not list(machines.cache("third").glob("checkpoints/.*"))


def test_killed_between_two_objects_of_a_snapshot_the_run_goes_on_from_the_one_before(machines, straight, store):
    words = ["--epochs", "8", *SYNC]
    process, sealed, reached = None, [], threading.Event()

    def kill(call, forward):
        if call.operation != "PutObject" or reached.is_set():
            return None
        sealed.extend([call.key] * call.key.endswith(MANIFEST))
        if not sealed or call.key.endswith(MANIFEST):
            return None
        answer = forward()
        reached.set()
        process.kill()
        process.wait(10)
        return answer

    store.fault = kill
    code = "from avrl_cli.app import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "pretrain", *TINY, "--cache", str(machines.cache("first")), "-q", *words, *EAGER],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert reached.wait(60)
    assert process.wait(10) == -signal.SIGKILL
    shutil.rmtree(machines.cache("first"))
    store.fault = None
    assert machines("second", *words) == 0
    assert "brought" in machines.err
    assert digest_of_run(machines) == straight(8)
    assert len(folders(store)) == 1
    assert not store.broken


def test_a_damaged_checkpoint_on_s3_is_refused_by_name(machines, store):
    words = ["--epochs", "1", *SYNC]
    assert machines("first", *words) == 0
    ref = machines.document["artifacts"][0]["ref"]
    key = store.keys[f"runs/{ref}/model.safetensors"]
    key.value = key.value[:-1] + bytes([key.value[-1] ^ 1])
    assert machines("second", *words) == 8
    assert f"s3://{NAME}/runs/{ref} is damaged" in machines.err
    assert not Cache(machines.cache("second")).artifacts("checkpoints")


def test_the_other_ranks_find_the_checkpoint_on_s3_too(machines, frames, store, tmp_path, monkeypatch):
    assert machines("first", "--epochs", "1", *SYNC) == 0
    config = PretrainConfig(**CONFIG, epochs=1, device="cpu", workers=1, sync=f"s3://{NAME}/runs")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert pretrain.follow(config, {"frames": frames}, Cache(tmp_path / "empty"))
    assert not (tmp_path / "empty").exists()


def test_ec2_takes_the_machine_back_and_another_goes_on(machines, straight, store, monkeypatch):
    monkeypatch.setattr(machine, "POLL_S", 0.05)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    words = ["--epochs", "8", *SYNC]
    with metadata.serving() as service, monkeypatch.context() as patch:

        def in_training(*args, real=training.learning_rate):
            service.notice = metadata.NOTICE
            time.sleep(0.05)
            return real(*args)

        patch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.url)
        patch.setattr(training, "learning_rate", in_training)
        assert machines("first", *words) == 143
    assert "EC2 takes this machine back" in machines.err
    assert len(folders(store)) == 1
    shutil.rmtree(machines.cache("first"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert machines("second", *words) == 0
    assert "brought" in machines.err
    assert digest_of_run(machines) == straight(8)


# Powering off.


@pytest.fixture
def off(tmp_path, monkeypatch):
    """A file with a line for each time that the machine was powered off."""
    path = tmp_path / "off"
    monkeypatch.setenv("AVRL_SHUTDOWN_COMMAND", f"sh -c 'echo off >> {path}'")
    return path


SHUTDOWN = ["--epochs", "1", *SYNC, "--shutdown"]


def test_the_machine_is_powered_off_once_and_after_everything_else(machines, store, off):
    seen = []
    store.fault = lambda *_: seen.append(off.exists())
    assert machines("first", *SHUTDOWN) == 0
    assert off.read_text() == "off\n"
    assert not any(seen)
    ref = machines.document["artifacts"][0]["ref"]
    last = {key for operation, key in store.asked[-12:] if operation == "GetObject"}
    assert last >= {f"runs/{ref}/{name}" for name in ("model.safetensors", "config.json", "log.parquet", MANIFEST)}


def rots_at_rest(call, forward):
    """The bytes are others than those sent, and nothing that S3 says shows it."""
    answer = forward()
    if call.operation == "PutObject" and call.key.endswith("model.safetensors") and "/." not in call.key:
        key = BACKEND.buckets[NAME].keys[call.key]
        key.value = key.value[:-1] + bytes([key.value[-1] ^ 1])
    return answer


def refuses(call, forward):
    if call.operation == "PutObject" and call.key.endswith("log.parquet"):
        return refuse(403, "AccessDenied")
    return None


def is_cut(call, forward):
    """An object read back is shorter than told."""
    answer = forward()
    if call.operation == "GetObject" and call.key.endswith("model.safetensors"):
        answer.set_data(answer.get_data()[:-1])
    return answer


@pytest.mark.parametrize("fault", [rots_at_rest, refuses, is_cut])
def test_the_machine_stays_up_if_the_copy_does_not_verify(fault, machines, store, off):
    store.fault = fault
    assert machines("first", *SHUTDOWN) == 10
    assert "shutdown withheld" in machines.err.splitlines()[-1]
    assert not off.exists()
    assert Cache(machines.cache("first")).artifacts("checkpoints")
    store.fault = None
    if fault is not rots_at_rest:
        assert machines("first", *SHUTDOWN) == 0
        assert off.read_text() == "off\n"


def test_without_shutdown_an_incomplete_copy_is_told_by_the_same_code(machines, store):
    store.fault = refuses
    assert machines("first", "--epochs", "1", *SYNC) == 10
    assert "is done, but not on S3: " in machines.err.splitlines()[-1]


def test_credentials_that_expire_stop_no_step_but_the_end_tells(machines, straight, store, monkeypatch):
    def expire(*args, real=training.learning_rate):
        store.fault = lambda *_: refuse(400, "ExpiredToken")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate", expire)
        assert machines("first", "--epochs", "2", *SYNC, *EAGER) == 10
    assert machines.err.count("not on S3 yet, training goes on") <= 1
    assert "is done, but not on S3: " in machines.err.splitlines()[-1]
    store.fault = None
    assert machines("first", "--epochs", "2", *SYNC) == 0
    assert digest_of_run(machines) == straight(2)


def test_a_run_that_is_stopped_stays_up(machines, store, off, monkeypatch):
    stop_after(monkeypatch, 3)
    assert machines("first", *SHUTDOWN) == 143
    assert not off.exists()


def test_a_dry_run_asks_nothing_and_powers_nothing_off(machines, store, off):
    assert machines("first", *SHUTDOWN, "--dry-run") == 0
    assert not store.asked
    assert not off.exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--shutdown"], "--shutdown without --sync would lose the checkpoint; add --sync s3://BUCKET/PREFIX"),
        (["--sync", "lab/runs"], "'lab/runs' is no address of S3"),
        ([*SYNC, "--sync-every", "soon"], "--sync-every 'soon' is no time; write 90s, 10m or 2h"),
        ([*SYNC, "--sync-every", "0m"], "--sync-every '0m' is no time; write 90s, 10m or 2h"),
    ],
)
def test_what_makes_no_sense_is_told_before_the_work(machines, store, words, line):
    assert machines("first", *words) == 2
    assert line in machines.err
    assert not store.asked


def test_how_it_is_kept_does_not_change_what_is_made(frames):
    one = PretrainConfig()
    other = PretrainConfig(sync="s3://lab/x", sync_every="2h", shutdown=True)
    assert STAGE.key(one, {"frames": frames}) == STAGE.key(other, {"frames": frames})


@pytest.mark.slow
def test_two_ranks_are_kept_by_the_process_that_started_them(machines, store):
    assert machines("first", "--epochs", "2", "--gpus", "2", *SYNC) == 0
    assert len(folders(store)) == 1
    assert store.sent("PutObject")
    assert not store.broken

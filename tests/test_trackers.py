"""Trackers: sinks that raise, hang, leave or are not there; the run and its log do not notice."""

import atexit
import json
import logging
import subprocess
import sys
import threading
import time

import pytest
import torch
from made import frame_store
from test_training import recipe

import avrl.ranks
from avrl import trackers
from avrl.artifact import sha256_of
from avrl.errors import MissingError
from avrl.stages.pretrain import STAGE, PretrainConfig
from avrl.trackers import WAITING, Sink
from avrl.training import train

assert avrl.ranks  # loaded here, as a test below empties the path
ROW = {"step": 3, "loss": 0.5, "skill": float("nan"), "probe_r2": None}

FAKE = """
import json, os
def _note(*words):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(json.dumps(words) + "\\n")
def init(**options):
    _note("init", sorted(options), options["name"])
def log(values, step):
    _note("log", values, step)
def finish():
    _note("finish")
"""


class Kept:
    """Keeps what it is given; may raise or hang at a call."""

    def __init__(self, at="", how=None):
        self.calls, self._at, self._how = [], at, how

    def _call(self, name, *words):
        self.calls.append((name, *words))
        if name == self._at:
            self._how()

    def log(self, values, step):
        self._call("log", values, step)

    def finish(self):
        self._call("finish")


def fail():
    raise RuntimeError("no\nroute")


def leave():
    sys.exit("bye")


def test_a_sink_gets_every_row_and_numbers_only():
    kept = Kept()
    sink = Sink("kept", lambda: kept)
    for _ in range(3):
        sink.put(ROW)
    sink.close()
    assert kept.calls == [("log", {"step": 3, "loss": 0.5}, 3)] * 3 + [("finish",)]


@pytest.mark.parametrize("how", [fail, leave])
@pytest.mark.parametrize("at", ["start", "log", "finish"])
def test_a_sink_that_fails_is_one_warning(at, how, caplog):
    kept = Kept(at, how)
    sink = Sink("kept", how if at == "start" else lambda: kept)
    for _ in range(3 * WAITING):
        sink.put(ROW)
    sink.close()
    assert len(caplog.records) <= 2  # the second: its queue was full before it failed
    failed = [one.getMessage() for one in caplog.records if "failed" in one.getMessage()]
    assert failed == [f"tracker kept failed ({'no route' if how is fail else 'bye'}): the run goes on without it"]


@pytest.mark.parametrize("at", ["log", "finish"])
def test_a_sink_that_hangs_costs_no_time_and_little_at_the_end(at, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.2)
    monkeypatch.setattr(atexit, "_clear", lambda: None)
    gate = threading.Event()
    sink = Sink("kept", lambda: Kept(at, gate.wait))
    begun = time.monotonic()
    for _ in range(10 * WAITING if at == "log" else 2):
        sink.put(ROW)
    assert time.monotonic() - begun < 5
    sink.close()
    assert time.monotonic() - begun < 6
    gate.set()
    *early, last = (one.getMessage() for one in caplog.records)
    assert "left behind" in last
    assert [one[:32] for one in early] == ["tracker kept does not keep up: r"] * (at == "log")


def test_a_sink_that_hangs_in_its_own_exit_hook_too_does_not_hold_the_process():
    """W&B's does (its issues 2824, 6625): the rest of a run, publishing and S3, came after it."""
    script = (
        "import atexit, time; from avrl import trackers; trackers.PATIENCE_S = .1\n"
        "def start(): atexit.register(time.sleep, 300); time.sleep(300)\n"
        "sink = trackers.Sink('kept', start); time.sleep(.2); sink.close()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_package_that_is_missing_is_told_before_anything_else(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # what W&B leaves behind is not W&B
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("wandb", "trackio", "tensorboard"):
        with pytest.raises(MissingError, match=f"pip install {name}") as told:
            STAGE.build(PretrainConfig(tracker=name), {}, tmp_path)
        assert told.value.exit_code == 11
    assert [one.name for one in tmp_path.iterdir()] == ["wandb"]


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return frame_store(tmp_path_factory.mktemp("frames"), [8] * 4)


@pytest.fixture(scope="module")
def plain(frames, tmp_path_factory):
    torch.set_num_threads(1)
    return trained(tmp_path_factory.mktemp("plain"), frames, "none")


def trained(root, frames, tracker):
    """Train below ``<root>/checkpoints`` and return the checksums of what came out."""
    out = root / "checkpoints/.partial-run-1"
    out.mkdir(parents=True)
    train(out, frames, recipe(epochs=1, tracker=tracker))
    return {path.name: sha256_of(path) for path in out.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_are_called_as_documented(name, plain, frames, tmp_path, monkeypatch):
    (tmp_path / "path").mkdir()
    (tmp_path / f"path/{name}.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "calls"))
    trackers.require(name)
    try:
        assert trained(tmp_path, frames, name) == plain
    finally:
        sys.modules.pop(name, None)
    first, *rows, last = map(json.loads, (tmp_path / "calls").read_text().splitlines())
    options = {"config", "name", "project", "resume"} | ({"dir", "id"} if name == "wandb" else set())
    assert first == ["init", sorted(options), "run-1"]
    assert [(word, step) for word, _, step in rows] == [("log", step) for step in range(1, 6)]
    assert last == ["finish"]


def test_tensorboard_has_the_log(plain, frames, tmp_path, caplog):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert trained(tmp_path, frames, "tensorboard") == plain
    assert "failed" not in caplog.text
    events = EventAccumulator(str(tmp_path / "tensorboard/run-1")).Reload()
    log = [json.loads(line) for line in next(tmp_path.rglob("log.jsonl")).read_text().splitlines()]
    assert [one.step for one in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [one.value for one in events.Scalars("loss")] == pytest.approx([row["loss"] for row in log])


def test_no_tracker_no_thread():
    assert trackers.opened("none", None, "run", 0, {}) is None
    assert not [one for one in threading.enumerate() if one.name.startswith("tracker none")]


def test_the_log_of_a_run_says_where_it_grows(frames, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trained(tmp_path, frames, "none")
    assert f"the log grows in {tmp_path}/checkpoints/.partial-run-1/scratch/log.jsonl" in caplog.text

"""`avrl.sync` and `avrl.remoterun` against a real S3 server with faults: what a run leaves there, what comes back."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import threading
import time

import pytest
from bucket import BACKEND, NAME, refuse
from made import frame_store
from test_training import recipe

from avrl import remoterun, sync, training
from avrl.artifact import MANIFEST
from avrl.errors import IntegrityError, NotFoundError, TemporaryError
from avrl.ranks import Stopped
from avrl.server import Patience
from avrl.sync import syncing
from avrl.training import learning_rate

URL, KEY, RUN = f"s3://{NAME}/runs", "k" * 64, ".partial-clips-kkkk"
PLACE = f"runs/{RUN}"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "state.sha256")


@pytest.fixture(autouse=True)
def hasty(monkeypatch, store, caplog):
    monkeypatch.setattr(remoterun, "PATIENCE", Patience(attempts=2, backoff_s=0.01, timeout_s=0.5))
    monkeypatch.setattr(sync, "LAST_S", 8.0)
    caplog.set_level(logging.INFO, logger="avrl")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "checkpoints" / RUN


def save(out, step):
    """A snapshot as `avrl.checkpoint` publishes it."""
    here = out / "scratch/snapshots"
    partial = here / ".tmp"
    partial.mkdir(parents=True)
    for name in FILES[:2]:
        (partial / name).write_bytes(f"{name} {step}".encode() * 100)
    digests = {name: hashlib.sha256((partial / name).read_bytes()).hexdigest() for name in FILES[:2]}
    (partial / "state.json").write_text(json.dumps({"step": step, "sha256": digests}))
    (partial / "state.sha256").write_text(hashlib.sha256((partial / "state.json").read_bytes()).hexdigest())
    partial.rename(here / name_of(step))
    return here / name_of(step)


def name_of(step):
    return f"step-{step:09d}"


def steps_of(store):
    """Steps of which S3 has a manifest."""
    found = [key.split("/") for key in store.keys]
    return sorted(int(parts[2][5:]) for parts in found if parts[:2] == ["runs", RUN] and parts[-1] == MANIFEST)


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running(out):
    return syncing(URL, KEY, out, 0.01)


def fill(store, out, *steps):
    """Snapshots that a machine has sent before it was lost."""
    with running(out):
        for step in steps:
            save(out, step)
            until(lambda step=step: step in steps_of(store))
    until(lambda: not (out / "scratch/sync").exists())  # on a slow machine the sender outlives what waits for it
    shutil.rmtree(out)
    store.asked.clear()


def brought(out):
    folder = out / "scratch/snapshots"
    return {path.name: {one.name for one in path.iterdir()} for path in folder.iterdir()} if folder.is_dir() else {}


def test_the_newest_snapshots_lie_there_each_with_its_manifest_last(store, out):
    with running(out):
        for step in (3, 7, 12):
            save(out, step)
            until(lambda step=step: step in steps_of(store))
        until(lambda: not [key for key in store.keys if name_of(3) in key])
    assert not store.broken
    assert set(store.keys) == {f"{PLACE}/{name_of(step)}/{name}" for step in (7, 12) for name in (*FILES, MANIFEST)}


def test_a_new_machine_gets_the_newest_and_sends_nothing_twice(store, out):
    fill(store, out, 3, 7)
    with running(out):
        assert brought(out) == {name_of(7): set(FILES)}
        until(lambda: ("HeadObject", f"{PLACE}/{name_of(7)}/{MANIFEST}") in store.asked)
    assert not store.sent("PutObject", "DeleteObject")
    assert steps_of(store) == [3, 7]


def test_what_is_newer_here_is_kept_and_what_is_older_gives_way(store, out):
    fill(store, out, 7)
    save(out, 5)
    with running(out):
        assert set(brought(out)) == {name_of(5), name_of(7)}
    save(out, 9)
    store.asked.clear()
    with running(out):
        assert not store.sent("GetObject")
        until(lambda: 9 in steps_of(store))


def test_a_run_that_ends_badly_sends_its_newest_first(store, out):
    def run():
        with syncing(URL, KEY, out, 1000.0):
            for step in (1, 2, 3):
                save(out, step)
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        run()
    assert 3 in steps_of(store)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_does_not_cut_the_last_sending_short(signum, store, out):
    stray = []
    before = signal.signal(signum, lambda *_: stray.append(1))

    def signals(call, forward):
        if call.operation == "PutObject":
            os.kill(os.getpid(), signum)

    def run():
        with syncing(URL, KEY, out, 1000.0):
            store.fault = signals
            save(out, 1)
            raise SystemExit(143)

    try:
        with pytest.raises(SystemExit):
            run()
        assert signal.getsignal(signum) is not signal.SIG_IGN
    finally:
        signal.signal(signum, before)
    assert steps_of(store) == [1]
    assert not stray


def test_retention_here_does_not_take_a_snapshot_from_under_the_sender(store, out):
    def removed_midway(call, forward):
        if call.operation == "PutObject":
            shutil.rmtree(out / "scratch/snapshots" / name_of(1), ignore_errors=True)

    store.fault = removed_midway
    with running(out):
        save(out, 1)
        until(lambda: steps_of(store) == [1])
    assert not store.broken


def test_a_snapshot_that_rotted_here_is_not_sent_but_the_one_before(store, out, caplog):
    save(out, 1)
    (save(out, 2) / "model.safetensors").write_bytes(b"?" * 1900)
    with running(out):
        until(lambda: steps_of(store) == [1])
    assert "step 2 is not sent" in caplog.text


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_disk_without_links_costs_a_copy(code, store, out, monkeypatch):
    def link(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    save(out, 1)
    with running(out):
        until(lambda: steps_of(store) == [1])


def test_what_is_sent_is_not_held_any_longer(store, out):
    save(out, 1)
    with running(out):
        until(lambda: steps_of(store) == [1])
        until(lambda: not list(out.glob("scratch/sync/*")))


# A store that fails.


def slow(call, forward):
    time.sleep(0.1)


def hangs(call, forward):
    time.sleep(0.7)
    return refuse(503, "SlowDown")


def drops(count):
    """Every so many requests one is answered 500."""
    seen = iter(range(10**6))
    return lambda call, forward: refuse(500, "InternalError") if next(seen) % count == 0 else None


def shrinks(call, forward):
    answer = forward()
    if call.operation == "PutObject" and call.key.endswith("model.safetensors"):
        key = BACKEND.buckets[NAME].keys[call.key]
        key.value = key.value[:-1]
    return answer


@pytest.mark.parametrize("fault", [slow, drops(3)])
def test_a_slow_or_failing_store_gets_it_in_the_end(fault, store, out):
    store.fault = fault
    with running(out):
        save(out, 1)
        until(lambda: steps_of(store) == [1])
    assert not store.broken


@pytest.mark.parametrize("fault", [hangs, shrinks, lambda *_: refuse(403, "AccessDenied")])
def test_a_broken_store_costs_training_a_warning_and_never_has_a_manifest(fault, store, out, caplog):
    with running(out):
        store.fault = fault
        began = time.monotonic()
        save(out, 1)
        until(lambda: "step 1 is not" in caplog.text)
    assert time.monotonic() - began < 12
    assert not steps_of(store)
    store.fault = None
    with running(out):
        until(lambda: steps_of(store) == [1])


def test_credentials_that_expire_are_told_once(store, out, caplog):
    with running(out):
        store.fault = lambda *_: refuse(400, "ExpiredToken")
        for step in (1, 2, 3):
            save(out, step)
            asked = len(store.asked)
            until(lambda asked=asked: len(store.asked) > asked + 2)
        assert caplog.text.count("the credentials have expired") == 1
        store.fault = None
        until(lambda: steps_of(store) == [3])
        store.fault = lambda *_: refuse(400, "ExpiredToken")
        save(out, 4)
        until(lambda: caplog.text.count("the credentials have expired") >= 2)


def test_another_rank_goes_on_with_what_is_here_if_the_store_does_not_tell(store, out):
    store.fault = lambda *_: refuse(503, "SlowDown")
    with pytest.raises(TemporaryError):
        remoterun.is_finished(URL, "clips-kkkk", out)
    save(out, 1)
    assert not remoterun.is_finished(URL, "clips-kkkk", out)


def test_a_stopped_run_waits_for_a_dead_store_no_longer_than_told(store, out, monkeypatch, caplog):
    monkeypatch.setattr(sync, "LAST_S", 0.3)

    def run():
        with running(out):
            store.fault = hangs
            save(out, 1)
            raise SystemExit(143)

    began = time.monotonic()
    with pytest.raises(SystemExit):
        run()
    assert time.monotonic() - began < 8
    assert "did not get there in 0 s" in caplog.text


def test_nothing_here_and_a_store_that_fails_is_no_reason_to_start_over(store, out, caplog):
    store.fault = lambda *_: refuse(503, "SlowDown")
    with pytest.raises(TemporaryError), running(out):
        pytest.fail("it would train from the beginning")
    save(out, 1)
    with running(out):
        assert "going on from what is here" in caplog.text


def test_a_wrong_bucket_is_told_at_once(store, out):
    with pytest.raises(NotFoundError, match="no such bucket"), syncing("s3://elsewhere/runs", KEY, out, 1.0):
        pytest.fail("it would train for nothing")


# Damage on S3.


def rots(store, step):
    """The bytes change, and all that S3 says of them stays."""
    held = store.keys[f"{PLACE}/{name_of(step)}/model.safetensors"]
    held.value = held.value[:-1] + b"?"


def goes(store, step):
    del BACKEND.buckets[NAME].keys[f"{PLACE}/{name_of(step)}/optimizer.safetensors"]


def manifest(store, step, **changed):
    key = f"{PLACE}/{name_of(step)}/{MANIFEST}"
    BACKEND.put_object(NAME, key, json.dumps({**json.loads(store.keys[key].value), **changed}).encode())


DAMAGE = {
    "rotten": rots,
    "missing": goes,
    "manifest cut": lambda store, step: BACKEND.put_object(NAME, f"{PLACE}/{name_of(step)}/{MANIFEST}", b"{"),
    "of another request": lambda store, step: manifest(store, step, key="other"),
    "leaves its folder": lambda store, step: manifest(
        store, step, files=[{"path": "../../x", "bytes": 1, "sha256": ""}]
    ),
    "nonsense": lambda store, step: manifest(store, step, files=[{"path": 1}]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_snapshot_is_refused_by_name_and_the_one_before_it_comes(name, store, out, caplog):
    fill(store, out, 3, 7)
    DAMAGE[name](store, 7)
    with running(out):
        assert brought(out) == {name_of(3): set(FILES)}
        assert f"snapshot {URL}/{RUN}/{name_of(7)} is damaged" in caplog.text


def test_a_damaged_snapshot_is_sent_anew_though_it_looks_as_if_it_were_there(store, out, caplog):
    fill(store, out, 3, 7)
    rots(store, 7)
    caplog.clear()
    with running(out):
        save(out, 7)
        until(lambda: "step 7 is on S3" in caplog.text)
    until(lambda: not (out / "scratch/sync").exists())
    shutil.rmtree(out)
    with running(out):
        assert brought(out) == {name_of(7): set(FILES)}
    assert store.sound()


def test_where_all_are_damaged_the_run_refuses_rather_than_starts_over(store, out):
    fill(store, out, 3, 7)
    for step in (3, 7):
        rots(store, step)
    with pytest.raises(IntegrityError, match=r"aws s3 rm --recursive .* it starts over"), running(out):
        pytest.fail("it would train from the beginning")


def test_a_damaged_snapshot_does_not_count_among_those_that_stay(store, out, caplog):
    fill(store, out, 3, 7)
    rots(store, 7)
    with running(out):
        save(out, 9)
        until(lambda: "step 9 is on S3" in caplog.text)
        until(lambda: steps_of(store) == [3, 9])


def test_an_unsealed_snapshot_is_not_seen_and_goes_when_a_newer_one_is_there(store, out):
    fill(store, out, 3)
    BACKEND.put_object(NAME, f"{PLACE}/{name_of(5)}/model.safetensors", b"half")
    with contextlib.closing(remoterun.connect(URL, 1, remoterun.PATIENCE, tries=1)) as client:
        client.create_multipart_upload(Bucket=NAME, Key=f"{PLACE}/{name_of(5)}/optimizer.safetensors")
    with running(out):
        assert set(brought(out)) == {name_of(3)}
        save(out, 6)
        until(lambda: steps_of(store) == [3, 6])
        until(lambda: not store.uploads)
    assert not [key for key in store.keys if name_of(5) in key]


def test_training_ends_while_a_snapshot_is_on_its_way(store, out):
    entered = threading.Event()

    def hold(call, forward):
        if call.operation == "PutObject":
            entered.set()
            time.sleep(0.5)

    store.fault = hold
    with running(out):
        save(out, 1)
        assert entered.wait(10)
    assert not store.broken
    until(lambda: not [one for one in threading.enumerate() if isinstance(one, sync._Sender)])


def test_steps_go_on_while_the_store_hangs(store, out, monkeypatch):
    """The first object is not taken before five more steps are done: were they to wait for it, none would be."""
    asked, further, taken = threading.Event(), threading.Event(), []
    steps = iter(range(5))

    def waits(call, forward):
        if call.operation == "PutObject" and not taken:
            asked.set()
            taken.append(further.wait(30))
        return forward()

    def rate(*args):
        if asked.is_set() and next(steps, None) is None:
            further.set()
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(*args)

    frames = frame_store(out.with_name("frames"), [8] * 4)
    monkeypatch.setattr(training, "learning_rate", rate)
    out.mkdir(parents=True, exist_ok=True)

    def run():
        with running(out):
            store.fault = waits
            training.train(out, frames, recipe(epochs=10_000, save_minutes=0.0))

    with pytest.raises(Stopped):
        run()
    assert taken
    assert all(taken)

"""`avrl.s3` and `avrl.mirror` against a real S3 server with every fault that a store, a clock or a kill can offer."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, replace

import clips
import pytest
from bucket import BACKEND, NAME, refuse
from moto.s3.models import get_canned_acl
from werkzeug.wrappers import Response

from avrl.artifact import MANIFEST, hash_files
from avrl.cache import Cache
from avrl.errors import AvrlError, ConfigError, IntegrityError, NotFoundError, TemporaryError
from avrl.mirror import upload
from avrl.remotestore import mirrored
from avrl.s3 import Object, is_s3, read_manifest, split
from avrl.server import Patience, Server
from avrl.stage import run
from avrl.stages import fetch, prep

PART = 5 * 2**20  # S3 takes no smaller ones
BIG = random.Random(0).randbytes(PART + 4321)
HASTY = Patience(attempts=3, backoff_s=0.01, timeout_s=1.0)
WRITES = ("PutObject", "CompleteMultipartUpload", "DeleteObject")
THERE = "runs/clips-0a1b"
SECRETS = [
    "s3://me:canary@lab/c",
    "s3://me:a/canary@lab/c",
    "me:canary@lab/c",
    "s3://me:canary/c",
    "https://x/?s=canary",
]


@pytest.fixture
def root(tmp_path):
    """A small artifact: a file in one piece, one in two parts that lies elsewhere, and an empty one."""
    root = tmp_path / "clips-0a1b"
    (root / "raw").mkdir(parents=True)
    (tmp_path / "disk").write_bytes(BIG)
    (root / "raw" / "big.zip").symlink_to(tmp_path / "disk")
    (root / "small.bin").write_bytes(b"small")
    (root / "empty").touch()
    return sealed(root)


def sealed(root):
    (root / MANIFEST).write_text(json.dumps({"files": [asdict(file) for file in hash_files(root)]}))
    return root


def send(root, **options):
    patience = replace(HASTY, attempts=2)  # for boto3 tries three times on each
    return upload(hash_files(root), root, f"s3://{NAME}/runs/", patience=patience, part_bytes=PART, **options)


def check_whole(store, root):
    paths = [path for path in root.rglob("*") if path.is_file()]
    want = {f"{THERE}/{path.relative_to(root).as_posix()}": path.read_bytes() for path in paths}
    assert {name: key.value for name, key in store.keys.items()} == want
    assert not store.uploads
    assert not store.broken


def check_discreet(caplog, error=None):
    told = caplog.text + "".join(traceback.format_exception(error) if error else [])
    assert "canary" not in told.lower()


def fetched(key=f"{THERE}/raw/big.zip", part_bytes=1 << 20):
    """The object's bytes, by the steps of `avrl.http.download`."""
    source, data = Object(f"s3://{NAME}/{key}", 2, HASTY), []

    def copy(file, start):
        n_bytes = min(part_bytes, file.length - start)
        with source.range(file, start, n_bytes) as response:
            part = b"".join(response.stream(1 << 16))
        assert len(part) == n_bytes
        return part

    with contextlib.closing(source):
        file = source.patiently(source.ask)
        for start in range(0, file.length, part_bytes):
            data.append(source.patiently(functools.partial(copy, file, start)))
    return b"".join(data)


# Without faults.


def test_round_trip_and_the_second_time_nothing_is_sent(store, root):
    gained = []
    assert send(root, progress=gained.append) == f"s3://{NAME}/{THERE}"
    check_whole(store, root)
    assert store.sent(*WRITES)[-1] == f"{THERE}/{MANIFEST}"
    assert len(store.sent("UploadPart")) >= 2
    assert read_manifest(f"s3://{NAME}/{THERE}") == json.loads((root / MANIFEST).read_text())
    assert fetched() == BIG
    assert fetched(f"{THERE}/small.bin") == b"small"
    total = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert sum(gained) == total
    store.asked.clear()
    send(root, progress=gained.append)
    assert {operation for operation, _ in store.asked} == {"ListMultipartUploads", "HeadObject"}
    assert sum(gained) == 2 * total


def test_a_rebuilt_artifact_is_never_vouched_for_by_the_old_manifest(store, root):
    send(root)
    store.asked.clear()
    (root / "small.bin").write_bytes(b"other")
    send(sealed(root))
    assert store.sent(*WRITES) == [f"{THERE}/{name}" for name in (MANIFEST, "small.bin", MANIFEST)]
    check_whole(store, root)


def test_an_object_that_was_lost_is_sent_again(store, root):
    send(root)
    del BACKEND.buckets[NAME].keys[f"{THERE}/small.bin"]
    send(root)
    check_whole(store, root)


def test_an_object_as_seen_by_the_download_is_a_server(store):
    for name in ("patiently", "ask", "range"):
        one, other = (inspect.signature(getattr(kind, name)).parameters for kind in (Object, Server))
        assert list(one) == list(other)
    source = Object(f"s3://{NAME}/a", 1, HASTY)
    assert source.shown == f"s3://{NAME}/a"
    source.stopped.set()
    with pytest.raises(NotFoundError, match="check the address"):
        source.patiently(source.ask)
    source.close()


def test_an_empty_object_is_refused(store, root):
    send(root)
    with pytest.raises(IntegrityError, match="empty"):
        fetched(f"{THERE}/empty")


def test_a_file_that_rotted_here_is_not_sent(store, root):
    files = hash_files(root)
    (root / "small.bin").write_bytes(b"smell")
    with pytest.raises(IntegrityError, match=r"small.bin is not what its manifest says"):
        upload(files, root, f"s3://{NAME}/runs", patience=HASTY)
    assert not store.sent("DeleteObject")
    assert f"{THERE}/{MANIFEST}" not in store.keys


def test_a_file_that_is_gone_here_is_told(store, root):
    files = hash_files(root)
    (root / "empty").unlink()
    with pytest.raises(IntegrityError, match=r"empty is not what its manifest says"):
        upload(files, root, f"s3://{NAME}/runs", patience=HASTY)


@pytest.mark.parametrize("url", SECRETS)
def test_no_secret_of_an_address_is_shown(url, store, root, caplog):
    with pytest.raises(ConfigError, match="is no address of S3") as caught:
        upload(hash_files(root), root, url, patience=HASTY)
    check_discreet(caplog, caught.value)
    with pytest.raises(ConfigError, match="is no address of S3") as caught:
        mirrored(url, Cache(root / "cache"), 0)
    check_discreet(caplog, caught.value)


def test_an_unfinished_artifact_is_not_sent(store, root):
    (root / MANIFEST).unlink()
    with pytest.raises(NotFoundError, match="no finished artifact"):
        send(root)
    assert not store.asked


def test_manifest_is_read_or_missing_or_damaged(store):
    assert read_manifest(f"s3://{NAME}/none/") is None
    for text in (b"{", b"[]", b"\xff"):
        BACKEND.put_object(NAME, f"bad/{MANIFEST}", text)
        with pytest.raises(IntegrityError, match=r"bad/manifest.json is damaged"):
            read_manifest(f"s3://{NAME}/bad")
    with pytest.raises(NotFoundError, match="no such bucket"):
        read_manifest("s3://elsewhere/none")


@pytest.mark.parametrize(
    ("url", "want"),
    [("s3://lab", ("lab", "")), ("s3://lab/", ("lab", "")), ("s3://my.lab-1/a//b?c#d", ("my.lab-1", "a//b?c#d"))],
)
def test_split(url, want):
    assert is_s3(url)
    assert split(url) == want


@pytest.mark.parametrize("url", ["s3://", "s3:///key", "s3://a b/c", "s3://[a/c", "lab/c", "S3://lab/c", *SECRETS])
def test_nonsense_is_no_address(url):
    with pytest.raises(ConfigError, match="is no address of S3") as caught:
        split(url)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("signed", [True, False])
def test_signs_where_there_are_credentials(signed, store, root, monkeypatch):
    send(root)
    if not signed:
        store.keys[f"{THERE}/small.bin"].set_acl(get_canned_acl("public-read"))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name)
    seen = []
    store.fault = lambda call, _: seen.append("Authorization" in call.headers)
    assert fetched(f"{THERE}/small.bin") == b"small"
    assert set(seen) == {signed}


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_PROFILE", "none"), ("AWS_ENDPOINT_URL_S3", "canary"), ("AWS_SECRET_ACCESS_KEY", "")]
)
def test_settings_of_boto3_that_make_no_sense(name, value, store, monkeypatch, caplog):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"s3://{NAME}/a: boto3") as caught:
        fetched("a")
    check_discreet(caplog, caught.value)


# Faults: each is cured, or a typed error; in both cases no manifest stands over a missing object.


def on(operation, act, *, first=1, last=0, key=""):
    """A fault that strikes the calls of an operation from the first to the last of these numbers (one, unless told)."""
    count, lock = {"n": 0}, threading.Lock()

    def fault(call, forward):
        if call.operation != operation or key not in call.key:
            return None
        with lock:
            count["n"] += 1
            strikes = first <= count["n"] <= (last or first)
        return act(call, forward) if strikes else None

    return fault


def says(status, code, **headers):
    return lambda call, forward: refuse(status, code, **headers)


def commits_then_says(status, code):
    def act(call, forward):
        assert forward().status_code == 200
        return refuse(status, code)

    return act


def hangs(call, forward):
    time.sleep(1.3)


def is_cut(call, forward):
    answer = forward()
    data = answer.get_data()
    return Response([data[: len(data) // 2]], 206, answer.headers)


def is_longer(call, forward):
    answer = forward()
    answer.set_data(answer.get_data() + b"more")
    return answer


def is_another_range(call, forward):
    answer = forward()
    answer.headers["Content-Range"] = "bytes 0-1048575/9999999"
    return answer


def ignores_range(call, forward):
    return Response(BIG, 200, {"ETag": "canary"})


def stays(status, code, operation="UploadPart", first=2):
    """From then on nothing else is said."""
    state, lock = {"n": 0, "on": False}, threading.Lock()

    def fault(call, forward):
        with lock:  # the store answers several at once
            state["n"] += call.operation == operation
            state["on"] |= state["n"] >= first
        return refuse(status, code) if state["on"] else None

    return fault


def bucket_goes(call, forward):
    for held in (BACKEND.buckets[NAME].keys, BACKEND.buckets[NAME].multiparts):
        held.clear()
    BACKEND.delete_bucket(NAME)


def rots(call, forward):
    answer = forward()
    key = BACKEND.buckets[NAME].keys[call.key]
    key.value = key.value[:-1] + b"?"
    key.checksum_value = "AAAAAA=="  # what a store tells of the bytes that it now holds
    return answer


def shrinks(call, forward):
    answer = forward()
    key = BACKEND.buckets[NAME].keys[call.key]
    key.value = key.value[:-1]
    return answer


def is_overwritten(call, forward):
    answer = forward()
    BACKEND.put_object(NAME, call.key, b"SMALL")
    return answer


def list_lags(call, forward):
    BACKEND.create_multipart_upload(NAME, f"{THERE}/gone", {}, "STANDARD", [], None, None, None)
    answer = forward()
    BACKEND.buckets[NAME].multiparts.clear()
    return answer


def elsewhere(call, forward):
    if "/eu-west-1/s3/" in call.headers["Authorization"]:
        return None
    return refuse(301, "PermanentRedirect", x_amz_bucket_region="eu-west-1")


UPLOADS = {
    "slow down": (on("UploadPart", says(503, "SlowDown"), last=2), None),
    "slow down, for long": (on("UploadPart", says(503, "SlowDown"), last=9**9), TemporaryError),
    "500 on part": (on("UploadPart", says(500, "InternalError")), None),
    "500 on put": (on("PutObject", says(500, "InternalError"), last=4), None),
    "commit then 500 on part": (on("UploadPart", commits_then_says(500, "InternalError")), None),
    "commit then 500 on complete": (on("CompleteMultipartUpload", commits_then_says(500, "InternalError")), None),
    "200 that is an error": (on("CompleteMultipartUpload", says(200, "InternalError"), last=4), None),
    "commit then 500 on put": (on("PutObject", commits_then_says(500, "InternalError")), None),
    "commit then 500 on manifest": (on("PutObject", commits_then_says(503, "X"), key=MANIFEST), None),
    "timeout of part": (on("UploadPart", hangs), None),
    "403 midway": (stays(403, "AccessDenied"), NotFoundError),
    "403 of a head": (on("HeadObject", says(403, ""), last=9**9), NotFoundError),
    "expired token": (stays(400, "ExpiredToken"), NotFoundError),
    "409": (on("PutObject", says(409, "OperationAborted")), None),
    "409 on complete": (on("CompleteMultipartUpload", says(409, "ConditionalRequestConflict")), None),
    "no such upload": (on("UploadPart", says(404, "NoSuchUpload")), None),
    "list lags": (on("ListMultipartUploads", list_lags), None),
    "clock skew": (stays(403, "RequestTimeTooSkewed", "ListMultipartUploads", 1), NotFoundError),
    "bucket gone": (on("UploadPart", bucket_goes), NotFoundError),
    "wrong checksum stored": (on("CompleteMultipartUpload", rots), IntegrityError),
    "wrong length stored": (on("PutObject", shrinks, key="small"), IntegrityError),
    "overwritten by another": (on("PutObject", is_overwritten, key="small"), IntegrityError),
    "head 404 after put": (on("HeadObject", says(404, ""), first=2, key="small"), None),
    "head 404 for ever": (on("HeadObject", says(404, ""), last=9**9, key="small"), TemporaryError),
    "region redirect": (elsewhere, None),
    "unknown": (on("PutObject", says(418, "Teapot"), last=9**9), IntegrityError),
}
STEPS = {
    "clock skew": "clock",
    "expired token": "renew",
    "403 midway": "AWS_PROFILE",
    "403 of a head": "AWS_PROFILE",
    "bucket gone": "check the address",
    "wrong checksum stored": "sent anew",
}


@pytest.mark.parametrize("name", UPLOADS)
def test_fault_of_an_upload(name, store, root, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    if name == "wrong checksum stored":
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")  # as with Amazon's own store
    store.fault, error = UPLOADS[name]
    if error is None:
        send(root)
        check_discreet(caplog)
    else:
        with pytest.raises(AvrlError) as caught:
            send(root)
        assert type(caught.value) is error
        assert f"s3://{NAME}/{THERE}/" in caught.value.cause
        assert caught.value.next_step
        assert STEPS.get(name, "") in str(caught.value)
        assert f"{THERE}/{MANIFEST}" not in store.keys
        check_discreet(caplog, caught.value)
        if name == "bucket gone":
            BACKEND.create_bucket(NAME, "us-east-1")
    store.fault = None
    send(root)  # the next run ends what is left to do
    check_whole(store, root)


DOWNLOADS = {
    "slow down": (on("GetObject", says(503, "SlowDown"), last=2), None),
    "slow down, for long": (on("GetObject", says(503, "SlowDown"), last=9**9), TemporaryError),
    "500": (on("GetObject", says(500, "InternalError"), first=3, last=4), None),
    "request timeout": (on("GetObject", says(400, "RequestTimeout"), first=3), None),
    "short": (on("GetObject", is_cut, first=2, last=3), None),
    "short, always": (on("GetObject", is_cut, first=2, last=9**9), TemporaryError),
    "long": (on("GetObject", is_longer, first=2), IntegrityError),
    "another range": (on("GetObject", is_another_range, first=3), IntegrityError),
    "range ignored": (on("GetObject", ignores_range), IntegrityError),
    "range ignored later": (on("GetObject", ignores_range, first=3), IntegrityError),
    "timeout": (on("GetObject", hangs, first=2), None),
    "403 midway": (stays(403, "AccessDenied", "GetObject", 3), NotFoundError),
    "expired token": (stays(400, "ExpiredToken", "GetObject", 3), NotFoundError),
    "412": (on("GetObject", says(412, "PreconditionFailed"), first=3), IntegrityError),
    "clock skew": (stays(403, "RequestTimeTooSkewed", "GetObject", 1), NotFoundError),
    "bucket gone": (on("GetObject", bucket_goes, first=3), NotFoundError),
    "overwritten by another": (
        on("GetObject", lambda call, _: BACKEND.put_object(NAME, call.key, BIG[::-1]) and None, first=3),
        IntegrityError,
    ),
    "region redirect": (elsewhere, None),
    "page of a portal": (
        on("GetObject", lambda *_: Response("<html>canary</html>", 200, mimetype="text/html")),
        IntegrityError,
    ),
    "page of a proxy": (
        on("GetObject", lambda *_: Response("<html>canary", 403, mimetype="text/html"), last=9**9),
        NotFoundError,
    ),
}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_fault_of_a_download(name, store, caplog):
    caplog.set_level(logging.DEBUG)
    BACKEND.put_object(NAME, f"{THERE}/raw/big.zip", BIG)
    store.fault, error = DOWNLOADS[name]
    if error is None:
        assert fetched() == BIG
        check_discreet(caplog)
    else:
        with pytest.raises(AvrlError) as caught:
            fetched()
        assert isinstance(caught.value, error)
        assert caught.value.exit_code == error.exit_code
        assert f"s3://{NAME}/{THERE}/raw/big.zip" in caught.value.cause
        assert caught.value.next_step
        assert STEPS.get(name, "") in str(caught.value)
        check_discreet(caplog, caught.value)


def test_nobody_listens(store, monkeypatch, caplog):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(TemporaryError, match="connection fails") as caught:
            fetched()
    check_discreet(caplog, caught.value)


# Kills.

SCRIPT = """
import sys
from pathlib import Path
from avrl.artifact import hash_files
from avrl.mirror import upload
root = Path(sys.argv[1])
upload(hash_files(root), root, sys.argv[2], part_bytes=int(sys.argv[3]))
"""


@pytest.mark.parametrize("moment", ["UploadPart", "CompleteMultipartUpload", "PutObject", MANIFEST])
def test_killed_and_done_again(moment, store, root):
    process = None
    reached = threading.Event()

    def kill(call, forward):
        if moment in (call.operation, call.key.rpartition("/")[2]) and call.method != "HEAD" and not reached.is_set():
            answer = forward()  # what has come in before the kill counts
            reached.set()
            process.wait(10)
            return answer
        return None

    store.fault = kill
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(root), f"s3://{NAME}/runs", str(PART)])
    assert reached.wait(20)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert store.uploads or moment != "UploadPart"
    store.fault = None
    send(root)
    check_whole(store, root)


def test_an_interrupt_ends_the_transfers(store, root):
    def hang_and_interrupt(call, forward):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.3)

    store.fault = on("UploadPart", hang_and_interrupt)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        send(root)
    assert time.monotonic() - began < 20
    assert not store.uploads
    store.fault = None
    send(root)
    check_whole(store, root)


def test_two_at_once_make_one_whole_mirror(store, root):
    errors = []

    def one():
        try:
            send(root)
        except BaseException as error:
            errors.append(error)

    both = [threading.Thread(target=one) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert all(isinstance(error, AvrlError) for error in errors)
    send(root)
    check_whole(store, root)


# The stages: to a bucket and back.


@pytest.fixture
def sent(store, tmp_path):
    """A raw artifact of three clips, and its address in the bucket."""
    copy = clips.egodex(tmp_path / "copy", {f"a/{n}": clips.episode(8, seed=n) for n in range(3)})
    made = run(fetch.STAGE, fetch.settled(fetch.FetchConfig(origin=str(copy))), {}, Cache(tmp_path / "here"))[0]
    return made, upload(made.manifest.files, made.root, f"s3://{NAME}/raw", patience=HASTY)


def fetch_from(url, cache, **options):
    return run(fetch.STAGE, fetch.settled(fetch.FetchConfig(origin=url, **options)), {}, cache)[0]


def test_another_machine_fetches_streams_and_chooses_from_the_bucket(sent, tmp_path):
    made, url = sent
    cache = Cache(tmp_path / "there")
    assert fetch_from(url, cache).digest == made.digest
    assert fetch_from(url, cache, episodes=1).manifest.facts["clips"] == 1
    config = prep.PrepConfig(image_size=32, workers=1)
    stores = [run(prep.STAGE, config, {"raw": one}, cache)[0] for one in (made, fetch_from(url, cache, stream=True))]
    assert stores[0].digest == stores[1].digest


def test_what_a_bucket_holds_is_held_to_its_manifest(sent, tmp_path):
    made, url = sent
    other = clips.egodex(tmp_path / "other", {"a/0": clips.episode(9)}) / "part1.zip"
    BACKEND.put_object(NAME, f"raw/{made.root.name}/part1.zip", other.read_bytes())
    with pytest.raises(IntegrityError, match=r"part1\.zip is not the file that it was"):
        fetch_from(url, Cache(tmp_path / "there"))

"""`avrl.http` against a real server with every fault that a server, a proxy or a kill can offer."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from email.utils import formatdate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Files, NoRange, Server, serving

from avrl.errors import AvrlError, DiskFullError, IntegrityError, NotFoundError, TemporaryError
from avrl.http import download
from avrl.server import Patience, shown

PART = 1 << 16
DATA = random.Random(0).randbytes(10 * PART + 4321)
HASTY = Patience(attempts=3, backoff_s=0.01, timeout_s=5)  # a try more is a request more: it must come of the server
HURRIED = replace(HASTY, timeout_s=0.4)  # for a server that hangs
SECRET = "X-Amz-Signature=canary5170"


def fetch(server: Server, target, **options):
    given = {"part_bytes": PART, "patience": HASTY, "workers": 3, **options}
    download(f"{server.url}part1.zip?{SECRET}", target, **given)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "raw" / "part1.zip"


def check_whole(target, data=DATA):
    assert target.read_bytes() == data
    assert [one.name for one in target.parent.iterdir()] == [target.name]


def test_fetches_in_parts_and_reports_every_byte(target):
    gained = []
    with serving(Files, {"part1.zip": DATA}) as server:
        fetch(server, target, expect_bytes=len(DATA), progress=gained.append)
        check_whole(target)
        assert len(server.asked) == 1 + 11
        assert sum(gained) == len(DATA)
        fetch(server, target)
        assert len(server.asked) == 1 + 11  # a finished file is not asked for again


@settings(max_examples=15, deadline=None)
@given(n_bytes=st.integers(1, 2000), part_bytes=st.integers(1, 700), workers=st.integers(1, 5))
def test_parts_cover_every_byte_once(tmp_path_factory, n_bytes, part_bytes, workers):
    target = tmp_path_factory.mktemp("cover") / "part1.zip"
    part_bytes = max(part_bytes, n_bytes // 20)
    with serving(Files, {"part1.zip": DATA[:n_bytes]}) as server:
        fetch(server, target, part_bytes=part_bytes, workers=workers)
        spans = sorted(server.asked[1:])
    check_whole(target, DATA[:n_bytes])
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == n_bytes


# Faults that pass: the file must be whole in the end.


def times(n, *, also_first=False):
    """Make a fault strike only the first n ranges."""

    def strikes(handler):
        server = handler.server
        if handler.probing and not also_first:
            return False
        with server.busy:
            server.struck = getattr(server, "struck", 0) + 1
            return server.struck <= n

    return strikes


class Burst(Files):
    """500, 502, 503, 504, one after the other."""

    def answer(self, data, span):
        with self.server.busy:
            codes = self.server.__dict__.setdefault("codes", [500, 502, 503, 504])
            code = codes.pop() if codes else 0
        if code:
            self.refuse(code)
        else:
            super().answer(data, span)


class ShortOnce(Files):
    """Promises the whole range, sends half of it and closes; twice."""

    strikes = staticmethod(times(2))

    def body(self, data):
        if self.strikes(self):
            self.close_connection = True
            data = data[: len(data) // 2]
        super().body(data)


class ResetOnce(Files):
    strikes = staticmethod(times(2))

    def body(self, data):
        if self.strikes(self):
            self.wfile.write(data[:1000])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        else:
            super().body(data)

    def finish(self):
        if self.connection.fileno() >= 0:
            super().finish()


class HangOnce(Files):
    strikes = staticmethod(times(1))

    def body(self, data):
        if self.strikes(self):
            self.wfile.write(data[:1000])
            self.server.whole.wait(1.0)
            self.close_connection = True
        else:
            super().body(data)


class HangBeforeHeaderOnce(Files):
    strikes = staticmethod(times(1, also_first=True))

    def answer(self, data, span):
        if self.strikes(self):
            self.server.whole.wait(1.0)
            self.close_connection = True
        else:
            super().answer(data, span)


class OneConnection(Files):
    """Serves one range at a time and sends everyone else away."""

    def answer(self, data, span):
        if not self.server.busy.acquire(blocking=False):
            self.refuse(503)
            return
        try:
            time.sleep(0.005)
            super().answer(data, span)
        finally:
            self.server.busy.release()


class WeakEtag(Files):
    """A weak ETag may not stand in If-Range: an honest server would ignore it and send everything."""

    def etag(self, data):
        return "W/" + super().etag(data)

    def modified(self, data):
        return "Wed, 21 Oct 2015 07:28:00 GMT"


class NoEtag(Files):
    def etag(self, data):
        return ""


class Chunked(Files):
    """No Range, no length: a chunked body, which still shows its own end."""

    def answer(self, data, span):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(data), 100_000):
            piece = data[start : start + 100_000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")


class NoRangeCutOnce(NoRange):
    strikes = staticmethod(times(1))

    def body(self, data):
        if self.strikes(self):
            self.close_connection = True
            data = data[: len(data) // 2]
        super().body(data)


class StarTotal(Files):
    """Serves ranges of a file whose length it does not tell."""

    def content_range(self, data, span):
        return f"bytes {span[0]}-{span[1] - 1}/*"


HEALED = [Burst, ShortOnce, ResetOnce, HangOnce, HangBeforeHeaderOnce, WeakEtag, NoEtag]
HEALED += [NoRange, Chunked, NoRangeCutOnce, StarTotal]


@pytest.mark.parametrize("handler", HEALED)
def test_fault_that_passes_leaves_the_right_bytes(handler, target):
    gained = []
    with serving(handler, {"part1.zip": DATA}) as server:
        fetch(server, target, patience=Patience(6, 0.01, 0.4), progress=gained.append)
        server.whole.set()
    check_whole(target)
    assert sum(gained) == len(DATA)


def test_one_connection_at_a_time(target):
    with serving(OneConnection, {"part1.zip": DATA}) as server:
        fetch(server, target, patience=Patience(10, 0.01, 1.0))
    check_whole(target)


@pytest.mark.parametrize("when", ["seconds", "date"])
def test_waits_as_long_as_the_server_asks(when, target):
    class Wait(Files):
        strikes = staticmethod(times(1))

        def answer(self, data, span):
            if self.strikes(self):
                date = formatdate(time.time() + 2, usegmt=True)  # whole seconds: at least one from now
                self.refuse(429, Retry_After="1" if when == "seconds" else date)
            else:
                super().answer(data, span)

    with serving(Wait, {"part1.zip": DATA}) as server:
        started = time.monotonic()
        fetch(server, target)
        assert time.monotonic() - started > 0.9
    check_whole(target)


def test_a_wait_of_an_hour_is_for_another_run(target):
    class Hour(Files):
        def answer(self, data, span):
            self.refuse(503, Retry_After="3600")

    with serving(Hour, {"part1.zip": DATA}) as server, pytest.raises(TemporaryError, match="answers 503"):
        fetch(server, target)


def test_follows_a_redirect_to_a_signed_address_elsewhere(target):
    with serving(Files, {"blob": DATA}) as store:

        class Away(Files):
            def answer(self, data, span):
                self.refuse(302, Location=f"{store.url}blob?{SECRET}")

        with serving(Away, {"part1.zip": b"-"}) as server:
            fetch(server, target)
    check_whole(target)


# Faults that stay: a typed error in one line, no target, no secret.


class Gone(Files):
    def answer(self, data, span):
        self.refuse(404)


class Expired(Files):
    def answer(self, data, span):
        self.refuse(403)


class Circle(Files):
    def answer(self, data, span):
        self.refuse(302, Location=self.path)


class Always503(Files):
    def answer(self, data, span):
        self.refuse(503)


class AlwaysShort(Files):
    def body(self, data):
        self.close_connection = True
        super().body(data if self.probing else data[:-1])


class AlwaysHangs(Files):
    def body(self, data):
        if self.probing:
            super().body(data)
        else:
            self.server.whole.wait(3.0)
            self.close_connection = True


class Long(Files):
    """206 with the right Content-Range and a longer body."""

    def length(self, data, span):
        return span[1] - span[0] + (0 if self.probing else 7)

    def body(self, data):
        super().body(data if self.probing else data + b"1234567")


class Less(Files):
    """206 with the right Content-Range and an honest, but shorter, Content-Length."""

    def length(self, data, span):
        return span[1] - span[0] - (0 if self.probing else 7)

    def body(self, data):
        super().body(data if self.probing else data[:-7])


class RangeThenNot(Files):
    """Forgets about Range after the first answer, as some proxies do."""

    def answer(self, data, span):
        super().answer(data, span if self.probing else None)


class WrongRange(Files):
    def content_range(self, data, span):
        return super().content_range(data, span if self.probing else (span[0] + 1, span[1] + 1))


class WrongFirstRange(Files):
    def content_range(self, data, span):
        return "bytes 5-68/700000"


class OtherTotal(Files):
    def content_range(self, data, span):
        total = len(data) + (0 if self.probing else 1)
        return f"bytes {span[0]}-{span[1] - 1}/{total}"


class Unsatisfiable(Files):
    def answer(self, data, span):
        if self.probing:
            super().answer(data, span)
        else:
            self.refuse(416)


class EtagChanges(Files):
    """Another file under the same name after some parts, served by a server that ignores If-Range."""

    def etag(self, data):
        return '"old"' if len(self.server.asked) < 5 else '"new"'


class ReplacedMidway(Files):
    """The same, served by an honest server."""

    def answer(self, data, span):
        if len(self.server.asked) >= 5:
            self.server.files["part1.zip"] = DATA[::-1]
        super().answer(data, span)


class DateChanges(NoEtag):
    def modified(self, data):
        return formatdate(0 if len(self.server.asked) < 5 else 99, usegmt=True)


class Gzipped(Files):
    def answer(self, data, span):
        packed = gzip.compress(data)
        self.send(200, packed, (0, len(packed)), Content_Encoding="gzip")


class LoginPage(Files):
    kind = "text/html; charset=utf-8"

    def answer(self, data, span):
        page = b"<!DOCTYPE html><html>Please log in</html>"
        self.send(200, page, (0, len(page)))


class LoginPageInDisguise(LoginPage):
    kind = "application/octet-stream"


class LoginPageLater(LoginPage):
    def answer(self, data, span):
        if self.probing:
            Files.answer(self, data, span)
        else:
            super().answer(data, span)


class Empty(Files):
    def answer(self, data, span):
        self.send(200, b"", (0, 0))


class NoLength(NoRange):
    """HTTP/1.0 in spirit: the end of the connection is the end of the file, cut or not."""

    def length(self, data, span):
        return None


class NoContent(Files):
    def answer(self, data, span):
        self.refuse(204)


STAYS = {
    Gone: NotFoundError,
    Expired: NotFoundError,
    Circle: NotFoundError,
    Always503: TemporaryError,
    AlwaysShort: TemporaryError,
    AlwaysHangs: TemporaryError,
    **dict.fromkeys([Long, Less, RangeThenNot, WrongRange, WrongFirstRange, OtherTotal], IntegrityError),
    **dict.fromkeys([Unsatisfiable, EtagChanges, ReplacedMidway, DateChanges, Gzipped], IntegrityError),
    **dict.fromkeys([LoginPage, LoginPageInDisguise, LoginPageLater, Empty, NoLength, NoContent], IntegrityError),
}


@pytest.mark.parametrize("handler", STAYS)
def test_fault_that_stays_is_a_typed_error(handler, target, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(handler, {"part1.zip": DATA}) as server:
        with pytest.raises(AvrlError) as caught:
            fetch(server, target, patience=HURRIED if handler is AlwaysHangs else HASTY)
        server.whole.set()
    assert type(caught.value) is STAYS[handler]
    assert server.url + "part1.zip" in caught.value.cause
    assert caught.value.next_step
    assert not target.exists()
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    told += "".join(one.read_text(errors="replace") for one in target.parent.glob("*.journal"))
    assert "canary" not in told


def test_nobody_listens(target):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/part1.zip?{SECRET}"
        with pytest.raises(TemporaryError, match="connection fails") as caught:
            download(url, target, patience=HASTY)
    assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_a_name_that_does_not_resolve(target):
    with pytest.raises(TemporaryError, match=r"http://nowhere\.invalid/part1\.zip: the connection fails") as caught:
        download(f"http://nowhere.invalid/part1.zip?{SECRET}", target, patience=HASTY)
    assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_breaks_off_the_handshake(target):
    """Plain HTTP where TLS is asked for: the handshake ends in an alert or a closed door."""
    with serving(Files, {"part1.zip": DATA}) as server:
        url = server.url.replace("http://", "https://")
        with pytest.raises(TemporaryError, match="the connection fails"):
            download(f"{url}part1.zip?{SECRET}", target, patience=HASTY)
    assert not target.exists()


def test_a_slow_server_is_borne_as_long_as_something_comes(target):
    class Drip(Files):
        slice_bytes = 100
        pause_s = 0.1  # 1 kB a second, in gaps far below the time-out

    with serving(Drip, {"part1.zip": DATA[:3000]}) as server:
        fetch(server, target, part_bytes=1000)
    check_whole(target, DATA[:3000])


def test_another_length_than_published_is_refused_before_the_first_part(target):
    with serving(Files, {"part1.zip": DATA}) as server:
        with pytest.raises(IntegrityError, match=f"has {len(DATA)} bytes, published are 99"):
            fetch(server, target, expect_bytes=99)
        assert len(server.asked) == 1
    assert list(target.parent.iterdir()) == []


def test_stream_of_another_length_than_published(target):
    with (
        serving(Chunked, {"part1.zip": DATA}) as server,
        pytest.raises(IntegrityError, match="came instead of"),
    ):
        fetch(server, target, expect_bytes=len(DATA) + 1)
    assert not target.exists()


def test_disk_too_small_is_refused_before_the_first_part(target):
    class Huge(Files):
        def content_range(self, data, span):
            return "bytes 0-63/" + str(10**15)

    with serving(Huge, {"part1.zip": DATA}) as server:
        with pytest.raises(DiskFullError, match=r"part1.zip needs 1000.00 TB"):
            fetch(server, target)
        assert len(server.asked) == 1


def test_disk_fills_up_on_the_way_and_the_next_run_goes_on(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("may not mount a small disk here")

    class Filling(Files):
        def answer(self, data, span):
            if len(self.server.asked) >= 4 and not (self.server.whole.is_set() or (disk / "other").exists()):
                free = shutil.disk_usage(disk).free
                (disk / "other").write_bytes(b"x" * (free - PART))
            super().answer(data, span)

    try:
        with serving(Filling, {"part1.zip": DATA}) as server:
            with pytest.raises(DiskFullError, match="no space left"):
                fetch(server, disk / "part1.zip")
            assert not (disk / "part1.zip").exists()
            server.whole.set()
            (disk / "other").unlink()
            fetch(server, disk / "part1.zip")
        check_whole(disk / "part1.zip")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_goes_through_the_proxy_of_the_environment(target, monkeypatch):
    with serving(Files, {"part1.zip": DATA}) as server:
        monkeypatch.setenv("http_proxy", server.url)
        download("http://data.invalid/part1.zip", target, patience=HASTY)
    check_whole(target)


# Resume.


def half(server: Server, target, **options):
    """Fetch until five parts are known, then be interrupted."""

    def stop(gained):
        if len(records(target)) >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server, target, progress=stop, **options)
    assert not target.exists()
    server.asked.clear()
    return target.with_name("part1.zip.part"), target.with_name("part1.zip.journal")


def records(target):
    """Parts that the journal knows of, by whole lines."""
    journal = target.with_name("part1.zip.journal")
    lines = journal.read_text().splitlines()[1:] if journal.exists() else []
    return {json.loads(line)["part"] for line in lines if line.endswith("}")}


def test_goes_on_after_an_interrupt(target):
    with serving(Files, {"part1.zip": DATA}) as server:
        half(server, target)
        done = len(records(target))
        gained = []
        fetch(server, target, progress=gained.append)
        assert len(server.asked) == 1 + 11 - done
        assert sum(gained) == len(DATA)
    check_whole(target)
    assert done >= 5


@pytest.mark.parametrize("position", [0, PART - 1, PART, 4 * PART + 17])
def test_a_flipped_bit_on_disk_is_fetched_again(position, target):
    with serving(Files, {"part1.zip": DATA}) as server:
        part, _ = half(server, target, workers=1)
        with part.open("r+b") as handle:
            handle.seek(position)
            handle.write(bytes([DATA[position] ^ 4]))
        fetch(server, target)
        assert (position // PART * PART, (position // PART + 1) * PART) in server.asked
    check_whole(target)


@pytest.mark.parametrize("damage", ["torn", "garbage", "empty", "no header", "gone", "part gone"])
def test_a_damaged_journal_costs_time_never_bytes(damage, target):
    with serving(Files, {"part1.zip": DATA}) as server:
        part, journal = half(server, target)
        lines = journal.read_text().splitlines(keepends=True)
        if damage == "part gone":
            part.unlink()
        elif damage == "gone":
            journal.unlink()
        else:
            torn = "".join(lines)[:-9]
            garbage = "".join(lines) + '{"part": 9}\n[1]\n\x00\n{"part": null, "crc32c": 0}\n'
            texts = {"torn": torn, "garbage": garbage, "empty": "", "no header": "".join(lines[1:])}
            journal.write_text(texts[damage])
        fetch(server, target)
    check_whole(target)


def test_a_torn_journal_can_be_resumed_twice(target):
    with serving(Files, {"part1.zip": DATA}) as server:
        _, journal = half(server, target, workers=1)
        journal.write_text(journal.read_text()[:-9])
        half(server, target, workers=1)
        known = len(records(target))  # the torn one is fetched again, on a line of its own
        assert known >= 5  # the thread may have written one more before the interrupt reached it
        fetch(server, target)
        assert len(server.asked) == 1 + 11 - known
    check_whole(target)


def test_a_changed_source_starts_over_and_says_so(target, caplog):
    with serving(Files, {"part1.zip": DATA}) as server:
        part, _ = half(server, target)
        before = part.stat().st_ino
        orphan = part.open("r+b")  # a writer that an earlier run left behind
        server.files["part1.zip"] = DATA[::-1]
        fetch(server, target)
        assert len(server.asked) == 1 + 11
        orphan.write(b"old bytes")
        orphan.close()
        assert target.stat().st_ino != before
    assert "starting it over" in caplog.text
    check_whole(target, DATA[::-1])


def test_without_a_version_nothing_of_an_earlier_run_is_believed(target, caplog):
    with serving(NoEtag, {"part1.zip": DATA}) as server:
        half(server, target)
        server.files["part1.zip"] = DATA[::-1]  # the same length
        fetch(server, target)
    assert "starting it over" in caplog.text
    check_whole(target, DATA[::-1])


def test_a_server_that_lost_range_starts_over(target):
    with serving(Files, {"part1.zip": DATA}) as server:
        half(server, target)
    with serving(NoRange, {"part1.zip": DATA}) as server:
        fetch(server, target)
    check_whole(target)


def test_two_at_once_make_one_whole_file(target):
    errors = []

    def one():
        try:
            fetch(server, target)
        except BaseException as error:
            errors.append(error)

    with serving(Files, {"part1.zip": DATA}) as server:
        both = [threading.Thread(target=one) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    assert target.read_bytes() == DATA
    assert all(isinstance(error, AvrlError) for error in errors)


SCRIPT = """
import sys
from pathlib import Path
from avrl.http import download
download(sys.argv[1], Path(sys.argv[2]), part_bytes=int(sys.argv[3]), workers=3)
"""


class Slow(Files):
    slice_bytes = 1 << 13
    pause_s = 0.001


@pytest.mark.parametrize("seed", range(5))
def test_killed_again_and_again_fetches_no_more_than_one_part_a_worker_twice(seed, target):
    rng = random.Random(seed)
    kills = 0
    with serving(Slow, {"part1.zip": DATA}) as server:
        command = [sys.executable, "-c", SCRIPT, f"{server.url}part1.zip?{SECRET}", str(target), str(PART)]
        for _ in range(2):
            stop_at = server.sent + rng.randrange(1, len(DATA) // 2)
            process = subprocess.Popen(command, start_new_session=True)
            server.hold_at = stop_at
            while server.sent < stop_at and process.poll() is None:
                time.sleep(0.002)
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            server.hold_at = math.inf
            kills += process.wait() == -signal.SIGKILL
            assert not target.exists()
            time.sleep(0.05)  # let the server notice
        known = len(records(target))
        server.asked.clear()
        fetch(server, target)
        assert len(server.asked) == 1 + 11 - known
        # Sent but not in the file: at most one part a worker for each kill, and the first answers.
        assert server.sent <= len(DATA) + kills * 3 * PART + 3 * 64
    assert kills == 2
    check_whole(target)


def test_the_journal_is_lines_of_json_without_the_query(target):
    with serving(Files, {"part1.zip": DATA}) as server:
        _, journal = half(server, target)
        head, *rest = journal.read_text().splitlines()
        assert json.loads(head)["url"] == f"{server.url}part1.zip"
        assert json.loads(head)["length"] == len(DATA)
        assert all(set(json.loads(line)) == {"part", "crc32c"} for line in rest)


@pytest.mark.parametrize(
    ("url", "want"),
    [
        ("https://me:pw@host:8/a/b.zip?token=x#y", "https://host:8/a/b.zip"),
        ("http://[::1]:80/a?x", "http://[::1]:80/a"),
    ],
)
def test_shown_hides_query_user_and_password(url, want):
    assert shown(url) == want


# At full size.


class Vast:
    """Ten gigabytes that nobody stores: each MiB begins with its number, so one in the wrong place shows."""

    n_bytes = 10 * 10**9
    block = 1 << 20
    blocks = tuple(random.Random(seed).randbytes(1 << 20) for seed in range(8))

    def __len__(self):
        return self.n_bytes

    def part(self, number):
        """The MiB of this number: a block, and the number itself in front."""
        return number.to_bytes(8, "big") + self.blocks[number % 8][8:]

    def __getitem__(self, span):
        start, stop = span.start or 0, min(span.stop, self.n_bytes)
        first = start // self.block
        data = b"".join(self.part(n) for n in range(first, -(-stop // self.block)))
        return data[start - first * self.block : stop - first * self.block]


class FromNowhere(Files):
    slice_bytes = 1 << 20

    def etag(self, data):
        return '"vast"'


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_gigabytes_killed_at_nine_lose_no_more_than_a_part_a_worker(tmp_path):
    """After SIGKILL at 90% at most workers x 16 MiB come again, and the bytes are right."""
    target, vast, workers = tmp_path / "part1.zip", Vast(), 4
    script = "import sys, pathlib; from avrl.http import download; download(sys.argv[1], pathlib.Path(sys.argv[2]))"
    with serving(FromNowhere, {"part1.zip": vast}) as server:
        command = [sys.executable, "-c", script, f"{server.url}part1.zip", str(target)]
        process = subprocess.Popen(command, start_new_session=True)
        while server.sent < 0.9 * len(vast):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.5)
        assert not target.exists()
        subprocess.run(command, check=True, timeout=600)
        again = server.sent - len(vast)
    print(f"fetched again: {again / 2**20:.1f} MiB of {len(vast) / 1e9:.0f} GB")
    assert again <= workers * 2**24 + 2 * 64
    with target.open("rb") as handle:
        for number in range(-(-len(vast) // vast.block)):
            assert handle.read(vast.block) == vast.part(number)[: len(vast) - number * vast.block]

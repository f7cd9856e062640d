"""A training run kept on S3 while it trains: its snapshots, sent beside it by a thread.

Training never waits for S3, and what fails there is a warning. `avrl.remoterun` says what lies where.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from avrl import remoterun
from avrl.artifact import LOOKS, MANIFEST, File, sha256_of
from avrl.checkpoint import OWN
from avrl.errors import AvrlError, IntegrityError
from avrl.machine import heeding
from avrl.mirror import upload
from avrl.remoterun import SNAPSHOTS, Snapshots, name_of, steps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

KEPT = 2  # snapshots that stay on S3, as on the disk
HELD = "sync"  # beside the snapshots: what is on its way, under a name that retention does not remove
LOOK_S = 2.0  # between looks for a new snapshot
LAST_S = 60.0  # for the last snapshot of a run that is stopped: EC2 gives two minutes for all, saving too


@contextlib.contextmanager
def syncing(url: str, key: str, out: Path, every_s: float) -> Iterator[None]:
    """Bring what S3 has of this run, and send each new snapshot while the body trains.

    A body that raises, as a run that was stopped does, has its newest snapshot sent, within a time. EC2's notice to a
    spot machine stops the run as SIGTERM does.

    Args:
        url: ``s3://bucket/prefix``.
        key: Of the request.
        out: The partial directory; snapshots appear in its scratch.
        every_s: Not more often than this is a snapshot sent.

    Raises:
        NotFoundError: no such bucket, or access refused.
        TemporaryError: S3 fails, and there is nothing here to go on from.
        IntegrityError: no snapshot on S3 is good, and there is nothing here to go on from.
    """
    there, here = Snapshots(f"{url}/{out.name}", key), out / SNAPSHOTS
    there.bring(here)
    sender = _Sender(there, here, every_s)
    sender.start()
    try:
        with heeding():
            yield
    except BaseException:
        log.info("sending what is saved to %s, for at most %.0f s", there.place, LAST_S)
        with _undisturbed():
            sender.ended.set()
            sender.join(LAST_S)
        if sender.is_alive():
            log.warning("%s: the last snapshot did not get there in %.0f s; it is in %s", there.place, LAST_S, here)
        raise
    finally:
        sender.stopped.set()
        sender.ended.set()
        sender.join(2 * remoterun.PATIENCE.timeout_s)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No second signal cuts the last sending short: torchrun sends one as soon as another rank has ended.

    An interrupt (Ctrl-C) does.
    """
    before = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


class _Sender(threading.Thread):
    """Sends the newest snapshot, not too often.

    Attributes:
        ended: Set to send what is newest once more, and end.
        stopped: Set to end at once.
    """

    def __init__(self, there: Snapshots, here: Path, every_s: float) -> None:
        super().__init__(daemon=True)
        self.there, self.here, self.every_s = there, here, every_s
        self.ended, self.stopped, self.sent, self.failed = threading.Event(), threading.Event(), -1, ""

    def run(self) -> None:
        """Until the run ends."""
        tried = -self.every_s
        while not self.ended.wait(min(LOOK_S, self.every_s)):
            if time.monotonic() - tried >= self.every_s and self._newer():
                tried = time.monotonic()
                self._send()
        if not self.stopped.is_set():
            self._send()

    def _newer(self) -> list[int]:
        return [step for step in steps(self.here) if step > self.sent]

    def _send(self) -> None:
        """Send the newest snapshot that verifies; then old ones may go."""
        for step in self._newer():
            try:
                if step in self.there.refused:  # else its objects would be taken for sent
                    self.there.remove(step)
                upload(*self._held(step), self.there.place, patience=remoterun.PATIENCE, stopped=self.stopped)
                self.sent, self.failed = step, ""
                self.there.refused.discard(step)
                log.info("step %d is on S3", step)
                self.there.retire(step, KEPT)
                return
            except (IntegrityError, ValueError, KeyError) as error:
                log.warning("step %d is not sent to %s: %s", step, self.there.place, error)
            except (AvrlError, OSError, RuntimeError) as error:  # RuntimeError: no more threads
                if not self.stopped.is_set():
                    self._warn(step, str(getattr(error, "cause", error)))
                return
            finally:
                shutil.rmtree(self.here.with_name(HELD), ignore_errors=True)

    def _warn(self, step: int, why: str) -> None:
        """Once for a night of the same failure: each try names another step."""
        known, self.failed = self.failed, re.sub(r"step-\d+\S*", "", why)
        level = logging.DEBUG if self.failed == known else logging.WARNING
        log.log(level, "step %d is not on S3 yet, training goes on: %s", step, why)

    def _held(self, step: int) -> tuple[list[File], Path]:
        """A snapshot under a name of our own, which retention does not remove, with its manifest.

        The pictures drawn up to its step go with it: the machine that drew them may be gone when they are wanted.
        """
        source, held = self.here / name_of(step), self.here.with_name(HELD) / name_of(step)
        shutil.rmtree(held.parent, ignore_errors=True)  # what a kill has left
        (held / LOOKS).mkdir(parents=True)
        digests = json.loads((source / "state.json").read_bytes())["sha256"]
        digests |= {name: sha256_of(source / name) for name in ("state.json", OWN)}
        paths = {name: source / name for name in digests}
        drawn = (self.here.parents[1] / LOOKS).glob("step-*.png")
        paths |= {f"{LOOKS}/{one.name}": one for one in drawn if one.stem <= source.name}
        digests |= {name: sha256_of(path) for name, path in paths.items() if name not in digests}
        for name, path in paths.items():
            try:
                os.link(path, held / name)
            except OSError:  # a file system without links, which each calls by another name
                shutil.copyfile(path, held / name)
        files = [File(name, (held / name).stat().st_size, digest) for name, digest in sorted(digests.items())]
        manifest = {"stage": "snapshot", "key": self.there.key, "step": step, "files": [asdict(one) for one in files]}
        (held / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        return files, held

"""The machine under a run: EC2's notice that it takes a spot instance back, and powering off when all is done."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

from avrl.errors import ConfigError, SyncError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

METADATA = "http://169.254.169.254"
POLL_S = 5.0  # as AWS advises; the notice comes two minutes ahead
ANSWER_S = 1.0  # the service is a hop away; elsewhere nobody answers
TRIES = 3  # before this is no machine of EC2's: at boot the service may be late
COMMAND = "AVRL_SHUTDOWN_COMMAND"
POWER_OFF = "sudo -n shutdown -h now"  # -n: nobody is there to type a password
POWER_OFF_S = 60.0


def on_notice(act: Callable[[], object]) -> threading.Event:
    """Ask the metadata service every few seconds, in a thread, and act once if it takes the machine back.

    Elsewhere than on EC2, where nobody answers, the thread ends soon and says nothing. As botocore does, it asks
    at ``AWS_EC2_METADATA_SERVICE_ENDPOINT`` where that is set, and nobody if ``AWS_EC2_METADATA_DISABLED`` is true.

    Args:
        act: Called in that thread.

    Returns:
        An event that ends the asking.
    """
    ended = threading.Event()
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true":
        threading.Thread(target=_ask_on, args=(ended, act), daemon=True).start()
    return ended


@contextlib.contextmanager
def heeding() -> Iterator[None]:
    """In the body, EC2's notice stops this process as SIGTERM does; every node of a run has a notice of its own."""
    notice = on_notice(lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        notice.set()


def _ask_on(ended: threading.Event, act: Callable[[], object]) -> None:
    token, on_ec2, tries = "", False, 0
    while not ended.is_set():
        try:
            token = token or _ask("PUT", "api/token", **{"X-aws-ec2-metadata-token-ttl-seconds": "21600"}).decode()
            on_ec2 = True
            told = json.loads(
                _ask("GET", "meta-data/spot/instance-action", **{"X-aws-ec2-metadata-token": token})  # IMDSv2
            )
            log.warning("EC2 takes this machine back (%s at %s): saving", told["action"], told["time"])
            act()
            return
        except urllib.error.HTTPError as error:
            if error.code == 401:  # the token has expired
                token = ""
            error.close()
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            log.debug("the metadata service: %s", error)
        tries += 1
        if tries >= TRIES and not on_ec2:
            return
        ended.wait(POLL_S)


def _ask(method: str, path: str, **headers: str) -> bytes:
    """An answer of the metadata service; never through a proxy, which would be on another machine."""
    address = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", METADATA).rstrip("/")
    request = urllib.request.Request(f"{address}/latest/{path}", method=method, headers=headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=ANSWER_S) as answer:
        data: bytes = answer.read(4096)
    return data


def _command() -> list[str]:
    return shlex.split(os.environ.get(COMMAND, POWER_OFF))


def require_power_off() -> None:
    """Refuse before the work what could not be done after it.

    Raises:
        ConfigError: the command that powers off is not on this machine.
    """
    words = _command()
    if not words or not shutil.which(words[0]):
        raise ConfigError(f"--shutdown: this machine has no {shlex.join(words[:1])}", f"name a command in {COMMAND}")


def power_off() -> None:
    """Power this machine off: ``sudo -n shutdown -h now``, or what ``AVRL_SHUTDOWN_COMMAND`` says instead.

    Raises:
        SyncError: the command failed; the machine stays up.
    """
    words = _command()
    try:
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL, timeout=POWER_OFF_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise SyncError(f"all is on S3, but the machine stays up: {error}", "power it off by hand") from error

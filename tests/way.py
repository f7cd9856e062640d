"""The way of the data by the command line, verb by verb: a cache before and after each, made once for all tests."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

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


class Station(NamedTuple):
    """A verb as it is killed, the caches before and after it, and how long it takes."""

    words: list[str]
    before: Path
    after: Path
    seconds: float


def start(cache: Path, words: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AVRL_CACHE": str(cache)}
    return subprocess.Popen(
        [AVRL, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def copied(cache: Path, place: Path) -> Path:
    subprocess.run(["cp", "-r", str(cache), str(place)], check=True)
    return place


def stations(root: Path) -> list[Station]:
    """A kill then costs one verb, not the whole way."""
    now = root / "0"
    now.mkdir()
    found = []
    for number, words in enumerate(VERBS):
        words = [*words, "--save-minutes", "0"] if words[0] == "pretrain" else words
        words = words[:4] if words[0] == "probe" else words  # one encoder breaks as three do
        after = copied(now, root / str(number + 1))
        began = time.monotonic()
        assert start(after, words).wait(timeout=240) == 0, words
        found.append(Station(words, now, after, time.monotonic() - began))
        now = after
    return found

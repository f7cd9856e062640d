"""SIGKILL at a random moment of each verb, then the same command again: the digest of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from way import VERBS, copied, start

QUICK, MANY = [0], list(range(1, 13))
# Stages whose artifacts a verb makes; the verb is killed, and all of these must come out as if it had not been.
MADE = {"fetch": ["raw"], "prep": ["frames"], "pretrain": ["checkpoints"], "probe": ["features", "labels", "scores"]}
MADE["report"] = ["tables"]


def digests(cache: Path, stages: list[str]) -> dict[str, str]:
    found = {}
    for stage in stages:
        for manifest in cache.glob(f"{stage}/[!.]*/manifest.json"):
            found[f"{stage}/{manifest.parent.name}"] = json.loads(manifest.read_bytes())["digest"]
    return found


def kill_and_repeat(station, tmp_path: Path, seed: int) -> None:
    words, before, undisturbed, seconds = station
    cache = copied(before, tmp_path / "cache")
    chance = random.Random(f"{words}{seed}")
    for _ in range(2):  # the second kill strikes the recovery
        process = start(cache, words)
        time.sleep(chance.uniform(0.3, 0.9) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(cache, words).wait(timeout=240) == 0
    assert digests(cache, MADE[words[0]]) == digests(undisturbed, MADE[words[0]])
    assert not list(cache.rglob(".partial-*/manifest.json"))


@pytest.mark.parametrize("verb", range(len(VERBS)), ids=[" ".join(words[:2]) for words in VERBS])
@pytest.mark.parametrize("seed", [*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in MANY)])
def test_a_killed_verb_run_again_gives_the_undisturbed_digest(stations, verb, seed, tmp_path):
    kill_and_repeat(stations[verb], tmp_path, seed)


# Full disks.

FILLED = [0.1, 0.3, 0.5, 0.7, 0.9]  # share of what the verb writes that still fits
WRITERS = {VERBS.index(words): words[0] for words in VERBS if words[0] in ("prep", "probe", "report")} | {2: "pretrain"}


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.fixture
def small_disk(tmp_path):
    """A folder whose disk can be given any size."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(n_bytes: int, how: str = "remount") -> bool:
        options = f"{'remount,' if how == 'remount' else ''}size={n_bytes}"
        return not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True
        ).returncode

    if not resize(1 << 30, "mount"):
        pytest.skip("may not mount a small disk here")
    yield place, resize
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("verb", WRITERS, ids=WRITERS.get)
@pytest.mark.parametrize(
    "share", [pytest.param(one, marks=() if one == 0.5 else pytest.mark.slow, id=f"{one:.0%}") for one in FILLED]
)
def test_a_disk_that_fills_up_is_exit_6_and_with_room_the_verb_goes_on(stations, small_disk, verb, share):
    words, before, undisturbed, _ = stations[verb]
    place, resize = small_disk
    cache = copied(before, place / "cache")
    resize(bytes_of(place) + max(1 << 16, int(share * (bytes_of(undisturbed) - bytes_of(before)))))
    assert start(cache, words).wait(timeout=240) == 6
    assert digests(cache, MADE[words[0]]) != digests(undisturbed, MADE[words[0]])
    resize(1 << 30)
    assert start(cache, words).wait(timeout=240) == 0
    assert digests(cache, MADE[words[0]]) == digests(undisturbed, MADE[words[0]])

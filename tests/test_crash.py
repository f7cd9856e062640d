"""SIGKILL at a random moment of each verb, then the same command again: the digest of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_way_of_the_data import AVRL, VERBS

QUICK, MANY = [0], list(range(1, 13))
# Stages whose artifacts a verb makes; the verb is killed, and all of these must come out as if it had not been.
MADE = {"fetch": ["raw"], "prep": ["frames"], "pretrain": ["checkpoints"], "probe": ["features", "labels", "scores"]}
MADE["report"] = ["tables"]


def start(cache: Path, words: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AVRL_CACHE": str(cache)}
    return subprocess.Popen(
        [AVRL, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def digests(cache: Path, stages: list[str]) -> dict[str, str]:
    found = {}
    for stage in stages:
        for manifest in cache.glob(f"{stage}/[!.]*/manifest.json"):
            found[f"{stage}/{manifest.parent.name}"] = json.loads(manifest.read_bytes())["digest"]
    return found


@pytest.fixture(scope="module")
def stations(tmp_path_factory):
    """A cache before each verb, and how long the verb takes: a kill then costs one verb, not the whole way."""
    root = tmp_path_factory.mktemp("stations")
    now = root / "0"
    now.mkdir()
    found = []
    for number, words in enumerate(VERBS):
        words = [*words, "--save-minutes", "0"] if words[0] == "pretrain" else words
        after = root / str(number + 1)
        subprocess.run(["cp", "-r", str(now), str(after)], check=True)
        began = time.monotonic()
        assert start(after, words).wait(timeout=240) == 0, words
        found.append((words, now, after, time.monotonic() - began))
        now = after
    return found


def kill_and_repeat(station, tmp_path: Path, seed: int) -> None:
    words, before, undisturbed, seconds = station
    cache = tmp_path / "cache"
    subprocess.run(["cp", "-r", str(before), str(cache)], check=True)
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

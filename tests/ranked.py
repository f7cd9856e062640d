"""Training runs for tests that kill, hold and signal them: a cache with frames, `avrl` processes, a poisoned objective.

As a module of its own because the processes of other ranks import what they run by its name.
"""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from made import frame_store

from avrl.cache import Cache
from avrl.objectives import OBJECTIVES, single_stream
from avrl.objectives.prediction import Prediction
from avrl.stage import Built, run
from avrl.stages.prep import STAGE, PrepConfig

AVRL = Path(sys.executable).with_name("avrl")
TINY = ["--size", "tiny", "--image-size", "32", "--pairs-per-episode", "5", "--batch-size", "4", "--device", "cpu"]


def frames_artifact(cache, episodes=4):
    """A cache that `avrl pretrain` takes its frames from."""

    def build(config, inputs, out):
        frame_store(out, [8] * episodes)
        return Built({"source": "egodex", "episodes": episodes, "frames": 8 * episodes}, ["EgoDex: CC-BY-NC-ND 4.0"])

    made = replace(STAGE, slug=lambda config, inputs: "egodex-made-32px", build=build)
    return run(made, PrepConfig(image_size=32), {}, Cache(cache))[0]


def pretrain(cache, *words, **environment):
    """A real `avrl pretrain`, in a process group of its own."""
    settled = {**os.environ, "OMP_NUM_THREADS": "1", "AVRL_CACHE": str(cache), **environment}
    command = [AVRL, "pretrain", "single-stream", *TINY, *map(str, words)]
    return subprocess.Popen(
        command, env=settled, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ranks_of(process):
    """Process ids of the ranks that a run has started, rank 0 first."""
    words = ["pgrep", "-g", str(process.pid), "-f", "multiprocessing.spawn"]
    return [int(one) for one in subprocess.check_output(words, text=True).split()]


def await_snapshot(cache, process, after=0):
    """Wait for a snapshot of a later step than the given one; its step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        steps = [int(one.name[5:]) for one in cache.glob("checkpoints/.partial-*/scratch/snapshots/step-*")]
        if max(steps, default=0) > after:
            return max(steps)
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("no snapshot in two minutes")


class Poisoned(Prediction):
    """Single-Stream whose loss is not finite at the third step, and on rank 1 only."""

    def loss(self, frames_BTHWC, gap_B, seed_B):
        self.steps = getattr(self, "steps", 0) + 1
        parts = super().loss(frames_BTHWC, gap_B, seed_B)
        poison = self.steps == 3 and os.environ.get("RANK") == "1"
        return {**parts, "loss": parts["loss"] * (torch.nan if poison else 1)}


def create(network):
    made = single_stream.create(network)
    made.__class__ = Poisoned
    return made


def train(out, frames, recipe):
    """Pretrain the poisoned objective: this module's own entry in the table of objectives."""
    from avrl import training

    torch.set_num_threads(1)
    OBJECTIVES["poisoned"] = "ranked"
    return training.train(out, frames, recipe)

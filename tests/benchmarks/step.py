"""A training step beside what it is made of: the bare step on resident tensors, and Accelerate's on the same.

    python -m tests.benchmarks.step [--model two-stream] [--size tiny] [--batch 8] [--steps 15] [--rounds 5]

Interleaved, medians of rounds; ratios carry over to other machines, figures do not. "train" is `avrl.training.train`
on a store of frames, decoded by threads beside the steps. On a CPU torch has one thread here, as a GPU leaves the
cores to the decoders.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from avrl.objectives import OBJECTIVES, modules
from avrl.pairs import Pairs, Sampling
from avrl.store import SHARD, FrameStore
from avrl.training import CLIP, Recipe, _Learner, train
from tests.benchmarks.loader import build

if TYPE_CHECKING:
    from collections.abc import Callable

    from avrl.pairs import Batch

N = 64  # frames of an episode
GOALS = {"Accelerate": 1.02, "train": 1.03}


def bare(learner: _Learner, batch: Batch) -> None:
    """What a hand-written loop does, and no more."""
    model = modules(learner.objective)
    model(batch.frames_BTHWC, batch.gap_B, batch.seed_B)["loss"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    learner.optimizer.step()
    learner.optimizer.zero_grad()


def timed(step: Callable[[], object], steps: int) -> float:
    """Seconds a step, by the clock."""
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begun) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(OBJECTIVES), default="two-stream")
    parser.add_argument("--size", choices=["tiny", "small", "base"], default="tiny")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    per_episode = -(-options.steps * options.batch // (SHARD // N))
    network = {"objective": options.model, "size": options.size, "image_size": options.image_size}
    recipe = Recipe(
        network={**network, "loss_decay": 0.5, "mask_ratio": 0.75, "seed": 0},
        epochs=1,
        batch_size=options.batch,
        lr=1e-4,
        weight_decay=0.05,
        warmup_epochs=0.1,
        sampling=Sampling(0, 10, 0.8, per_episode),
        precision="fp32",
        device="cpu",
        threads=2,
        save_minutes=60,
    )
    with tempfile.TemporaryDirectory() as name:
        frames, outs = Path(name) / "frames", (Path(name) / f"out{k}" for k in range(options.rounds))
        frames.mkdir()
        build(frames, 1, N)
        learner = _Learner(recipe, Accelerator(cpu=True), Path(name) / "snapshots")
        batch = Pairs(FrameStore(frames), recipe.sampling, options.batch).batch(0)
        ways = [lambda: bare(learner, batch), lambda: learner.move(learner.losses(batch)["loss"], 1e-4)]
        timed(ways[0], 2)
        rows = []
        for out in outs:
            out.mkdir()
            begun = [timed(one, options.steps // 3) for one in ways]
            facts = train(out, frames, recipe)
            ended = [timed(one, options.steps // 3) for one in ways]
            alone, wrapped = (sum(both) / 2 for both in zip(begun, ended, strict=True))
            rows.append((alone, wrapped / alone, options.batch / facts["samples_per_second"] / alone))
        alone, *ratios = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{options.model} {options.size}, batch {options.batch}: bare {alone * 1000:.0f} ms a step")
        for (what, goal), ratio in zip(GOALS.items(), ratios, strict=True):
            print(f"{what} / bare: {ratio:.3f} (goal {goal})")


if __name__ == "__main__":
    main()

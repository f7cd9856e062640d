"""A training step beside what it is made of: the bare step on resident tensors, and Accelerate's on the same.

    python -m tests.benchmarks.step [--model two-stream] [--size tiny] [--batch 8] [--steps 15] [--rounds 5]
    python -m tests.benchmarks.step --size base --batch 96 --steps 60 --workers 8    # on a GPU, where there is one

Interleaved, medians of rounds; ratios carry over to other machines, figures do not. "train" is `avrl.training.train`
on a store of frames, decoded by threads beside the steps; data wait is its share of waiting for them. On a CPU torch
has one thread here, as a GPU leaves the cores to the decoders. No GPU has run this yet.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from avrl.objectives import OBJECTIVES, modules
from avrl.pace import speed
from avrl.pairs import Batch, Pairs, Sampling
from avrl.store import SHARD, FrameStore
from avrl.training import CLIP, Recipe, _accelerator, _Learner, train
from tests.benchmarks.loader import build

if TYPE_CHECKING:
    from collections.abc import Callable

N = 128  # frames of an episode: that makes 32, too few to hold some out, so that no look at them is in the times
GOALS = {"Accelerate / bare": 1.02, "train / bare": 1.03, "data wait": 0.02}


def bare(learner: _Learner, batch: Batch) -> None:
    """What a hand-written loop does, and no more."""
    model, device = modules(learner.objective), batch.gap_B.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = model(batch.frames_BTHWC, batch.gap_B, batch.seed_B)["loss"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    learner.optimizer.step()
    learner.optimizer.zero_grad()


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Callable[[], object], steps: int) -> float:
    """Seconds a step, by the clock."""
    synchronise()
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise()
    return (time.perf_counter() - begun) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(OBJECTIVES), default="two-stream")
    parser.add_argument("--size", choices=["tiny", "small", "base"], default="tiny")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
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
        precision="auto",
        device=options.device,
        threads=options.workers,
        save_minutes=60,
    )
    with tempfile.TemporaryDirectory() as name:
        frames, outs = Path(name) / "frames", (Path(name) / f"out{k}" for k in range(options.rounds))
        frames.mkdir()
        build(frames, 1, N)
        learner = _Learner(recipe, _accelerator(recipe), Path(name) / "snapshots")
        found = Pairs(FrameStore(frames), recipe.sampling, options.batch).batch(0)
        batch = Batch(*(one.to(learner.accelerator.device) for one in vars(found).values()))
        ways = [lambda: bare(learner, batch), lambda: (learner.losses(batch), learner.move(0, 1e-4))]
        timed(ways[0], 2)
        rows = []
        for out in outs:
            out.mkdir()
            begun = [timed(one, options.steps // 3) for one in ways]
            facts = train(out, frames, recipe)
            ended = [timed(one, options.steps // 3) for one in ways]
            alone, wrapped = (sum(both) / 2 for both in zip(begun, ended, strict=True))
            trained = options.batch / facts["samples_per_second"]
            rows.append((alone, wrapped / alone, trained / alone, facts["data_wait"]))
        alone, *figures = (statistics.median(column) for column in zip(*rows, strict=True))
        where = facts["device"], facts["arithmetic"]
        print(
            f"{options.model} {options.size}, batch {options.batch}, {', '.join(where)}: {alone * 1000:.0f} ms a step"
        )
        for what, seconds in (("bare", alone), ("train", alone * figures[1])):
            print(what, speed(learner.network, options.batch / seconds, *where, 1))
        for (what, goal), figure in zip(GOALS.items(), figures, strict=True):
            print(f"{what}: {figure:.3f} (goal {goal})")


if __name__ == "__main__":
    main()

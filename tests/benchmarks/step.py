"""A training step beside what it is made of: the bare step on resident tensors, and Accelerate's on the same.

    python -m tests.benchmarks.step [--model two-stream] [--size tiny] [--batch 8] [--steps 15] [--rounds 5] [--compile]
    python -m tests.benchmarks.step --size base --batch 96 --steps 60 --workers 8    # on a GPU, where there is one

Interleaved, medians of rounds; ratios carry over to other machines, figures do not. "train" is `avrl.training.train`
on a store of frames, decoded by threads beside the steps; data wait is its share of waiting for them. On a CPU torch
has one thread here, as a GPU leaves the cores to the decoders. `tests.benchmarks.gpu` runs it over models and sizes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from avrl.devices import accelerator_of
from avrl.objectives import OBJECTIVES, modules
from avrl.pace import speed
from avrl.pairs import Batch, Pairs, Sampling
from avrl.store import SHARD, FrameStore
from avrl.training import CLIP, Recipe, _Learner, train
from tests.benchmarks.loader import build

if TYPE_CHECKING:
    from collections.abc import Callable

N = 128  # frames of an episode: that makes 32, too few to hold some out, so that no look at them is in the times
GOALS = {"Accelerate / bare": 1.02, "train / bare": 1.03, "data wait": 0.02}


def bare(learner: _Learner, batch: Batch) -> None:
    """What a hand-written loop does, and no more."""
    model, device = modules(learner.objective), batch.gap_B.device.type
    with torch.autocast(device, torch.bfloat16, enabled=learner.arithmetic == "bfloat16"):
        loss = model(batch.frames_BTHWC, batch.gap_B, batch.seed_B)["loss"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    learner.optimizer.step()
    learner.optimizer.zero_grad()


def ours(learner: _Learner, batch: Batch) -> None:
    """The loop's own step, on a batch that is there already."""
    learner.losses(batch)
    learner.clip()
    learner.move(0, 1e-4)


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


def recipe(model: str, size: str, image_size: int, batch: int, steps: int, workers: int, device: str, compile: bool):
    """So many steps on what `build` makes of frames."""
    network = {"objective": model, "size": size, "image_size": image_size}
    return Recipe(
        network={**network, "loss_decay": 0.5, "mask_ratio": 0.75, "seed": 0},
        epochs=1,
        batch_size=batch,
        lr=1e-4,
        weight_decay=0.05,
        warmup_epochs=0.1,
        sampling=Sampling(0, 10, 0.8, -(-steps * batch // (SHARD // N))),
        precision="auto",
        device=device,
        threads=workers,
        save_minutes=60,
        compile=compile,
    )


def measure(asked: Recipe, steps: int, rounds: int) -> dict[str, float | str]:
    """Medians over rounds: seconds of the bare step, the ratios of `GOALS`, samples a second and utilisation."""
    with tempfile.TemporaryDirectory() as name:
        frames = Path(name) / "frames"
        frames.mkdir()
        build(frames, 1, N)
        learner = _Learner(asked, accelerator_of(asked.device, asked.precision), Path(name) / "snapshots")
        found = Pairs(FrameStore(frames), asked.sampling, asked.batch_size).batch(0)
        batch = Batch(*(one.to(learner.accelerator.device) for one in vars(found).values()))
        ways = [lambda: bare(learner, batch), lambda: ours(learner, batch)]
        for way in ways:
            timed(way, 2)
        rows = []
        for number in range(rounds):
            out = Path(name) / f"out{number}"
            out.mkdir()
            begun = [timed(one, max(1, steps // 3)) for one in ways]
            facts = train(out, frames, asked)
            ended = [timed(one, max(1, steps // 3)) for one in ways]
            alone, wrapped = (sum(both) / 2 for both in zip(begun, ended, strict=True))
            trained = asked.batch_size / facts["samples_per_second"]
            rows.append((alone, wrapped / alone, trained / alone, facts["data_wait"]))
    alone, *figures = (statistics.median(column) for column in zip(*rows, strict=True))
    paces = {
        what: speed(learner.network, asked.batch_size / seconds, learner.device, learner.arithmetic, 1)
        for what, seconds in (("bare", alone), ("train", alone * figures[1]))
    }
    told = {f"{what} {name}": figure for what, pace in paces.items() for name, figure in pace.items()}
    return {
        "device": learner.device,
        "arithmetic": learner.arithmetic,
        "bare seconds": alone,
        **dict(zip(GOALS, figures, strict=True)),
        **told,
    }


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
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = (given.model, given.size, given.image_size, given.batch, given.steps, given.workers)
    found = measure(recipe(*shape, given.device, given.compile), given.steps, given.rounds)
    print(f"{given.model} {given.size}, batch {given.batch}, {'compiled' if given.compile else 'eager'}")
    for name, figure in found.items():
        goal = f" (goal {GOALS[name]})" if name in GOALS else ""
        print(f"{name}: {figure if isinstance(figure, str) else f'{figure:.4g}'}{goal}")


if __name__ == "__main__":
    main()

"""What a VideoMAE checkpoint predicts of motion: its skill on the mean of the two frames, and on their difference.

``python -m tests.benchmarks.videomae_motion CHECKPOINT FRAMES`` (two folders of a cache). Each hidden patch of the
normalised target is split into what the frames share and what differs; skill is measured on either part alone,
against the patch's mean. If the second is zero, nothing in training asks the encoder for motion.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from avrl import checkpoint
from avrl.objectives.videomae import FRAMES
from avrl.pairs import Pairs, Sampling
from avrl.store import FrameStore

BATCHES = 16


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("frames", type=Path)
    asked = parser.parse_args()
    objective = checkpoint.load(asked.checkpoint)
    pairs = Pairs(FrameStore(asked.frames), Sampling(seed=1, max_gap=10, sample_decay=1, pairs_per_episode=20), 64)
    parts = []
    for batch in pairs.stream(0, BATCHES):
        both = objective.predict(batch.frames_BTHWC, batch.seed_B)
        parts.append([one.unflatten(-1, (FRAMES, -1)) for one in both])
    predicted, truth = (torch.cat(one) for one in zip(*parts, strict=True))
    halves = [(one.mean(2), (one[:, :, 1] - one[:, :, 0]) / 2) for one in (predicted, truth)]
    power = [one.square().mean() for one in halves[1]]
    print(f"share of the target that differs between the frames {float(power[1] / sum(power)):.3f}")
    for name, got, true, whole in zip(("the mean of the frames", "their difference"), *halves, power, strict=True):
        print(f"skill on {name} {1 - float((got - true).square().mean() / whole):.4f}")


if __name__ == "__main__":
    main()

"""Extraction of features beside the bare forward on resident tensors.

    python -m tests.benchmarks.encode [--encoder dinov2-s] [--frames 128] [--batch 16] [--rounds 3]
    python -m tests.benchmarks.encode --frames 20480 --batch 256    # on a GPU, where there is one

"extract" is `avrl.features.extract`: a store of frames of 224 px at quality 90 is read, decoded, encoded, and the
vectors written, compressed, to disk. "bare" gives the network the same frames as floats that lie on the device
already. "encode" does so with bytes, which the encoder still has to prepare. Interleaved, medians of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from avrl import encoders, features
from avrl.store import FrameStore
from tests.made import frame_store

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH = 64  # frames of an episode
GOAL = 0.95


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, until the device has done too, and cpu seconds of all threads."""
    begun, used = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="dinov2-s")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = encoders.load(options.encoder, init="random").to(device)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        root = frame_store(Path(folder, "frames"), [LENGTH] * (options.frames // LENGTH), size=224)
        read = FrameStore(root).read(np.arange(options.frames // LENGTH * LENGTH))
        frames = torch.from_numpy(read)[:, None].to(device).split(options.batch)
        inputs = [encoder.prepare(one) for one in frames]

        def bare() -> None:
            with torch.inference_mode():
                for one in inputs:
                    for part in one.split(16 if device == "cpu" else len(one)):
                        encoder.network.forward_features(part)

        def encode() -> None:
            for one in frames:
                encoder.encode(one)

        def extract(number: int) -> None:
            out = Path(folder, f"out-{number}")
            features.extract(encoder, root, out, gap=0, batch_size=options.batch, device=device)

        bare()  # warm
        times: dict[str, list[tuple[float, float]]] = {"bare": [], "encode": [], "extract": []}
        for number in range(options.rounds):
            times["bare"].append(timed(bare))
            times["encode"].append(timed(encode))
            times["extract"].append(timed(lambda number=number: extract(number)))  # type: ignore[misc]
    wall, cpu = ({name: statistics.median(one[i] for one in taken) for name, taken in times.items()} for i in (0, 1))
    for name, seconds in wall.items():
        print(f"{name:8} {len(read) / seconds:8.1f} frames/s")
    for name in ("encode", "extract"):
        goal = f" (goal {GOAL})" if name == "extract" else ""
        print(
            f"{name} / bare: {wall['bare'] / wall[name]:.3f} by the clock{goal}, {cpu['bare'] / cpu[name]:.3f} per cpu-s"
        )


if __name__ == "__main__":
    main()

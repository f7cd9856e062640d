"""Random pairs (t, t + gap) per cpu-second out of a frame store, beside decoding the same JPEGs from memory and zarr.

    python -m tests.benchmarks.loader [--rounds 5] [--frames 4096] [--pairs 512]

Interleaved, medians; ratios carry over to other machines, figures do not. Goals: at least 0.90 of decoding from
memory, 4 times zarr-python's ``array[i]``, and 1.6 times the wall speed with a second thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import simplejpeg
import zarr

from avrl import codec, store
from tests.clips import ramps

SIZE, BATCH, MAX_GAP = 224, 64, 10


def build(root: Path, n: int) -> None:
    """A store of `n` busy frames, some 20 KB each: what real video comes to."""
    rng = np.random.default_rng(0)
    scenes = ramps(16, SIZE, SIZE).astype(np.int16)
    noise = rng.normal(0, 6, (16, SIZE, SIZE, 3))
    chunks = [
        store.seal(codec.encode(np.clip(scenes[i % 16] + noise[(i * 7) % 16], 0, 255).astype(np.uint8), 90))
        for i in range(n)
    ]
    n_shards = -(-n // store.SHARD)
    for shard in range(n_shards):
        mine = chunks[shard * store.SHARD : (shard + 1) * store.SHARD]
        path = store.shard_path(root / "frames.zarr", shard)
        store.write_shard(path, [(b"".join(mine), [len(one) for one in mine])])
    store.create(root / "frames.zarr", n_shards, SIZE, 90)
    pl.DataFrame({"length": [n]}).write_parquet(root / "episodes.parquet")
    print(f"{n} frames of {sum(map(len, chunks)) / n / 1000:.1f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=store.SHARD)
    parser.add_argument("--pairs", type=int, default=512, help="a round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), options.frames)
        readers = {threads: store.FrameStore(Path(folder), threads) for threads in (1, 2)}
        array = zarr.open_array(Path(folder) / "frames.zarr" / "frames", mode="r")
        memory = [bytes(readers[1].jpeg(row)) for row in range(options.frames)]
        out = np.empty((2 * BATCH, SIZE, SIZE, 3), np.uint8)

        def decode(rows: np.ndarray) -> None:
            for row, frame in zip(rows.tolist(), out, strict=True):
                simplejpeg.decode_jpeg(memory[row], colorspace="RGB", buffer=frame)

        def index(rows: np.ndarray) -> None:
            for row, frame in zip(rows.tolist(), out, strict=True):
                frame[:] = array[row]

        ways = {
            "JPEGs in memory": decode,
            "FrameStore.read": lambda rows: readers[1].read(rows, out),
            "FrameStore.read, 2 threads": lambda rows: readers[2].read(rows, out),
            "zarr array[i]": index,
        }
        cpu, wall = ({name: [] for name in ways} for _ in range(2))
        rng = np.random.default_rng(1)
        for _ in range(options.rounds):
            for name, way in ways.items():
                n = max(1, options.pairs // BATCH // (4 if way is index else 1))
                batches = rng.integers(0, options.frames - MAX_GAP, (n, BATCH))
                batches = np.concatenate([batches, batches + rng.integers(1, MAX_GAP + 1, (n, BATCH))], 1)
                started, used = time.perf_counter(), time.process_time()
                for rows in batches:
                    way(rows)
                wall[name].append(n * BATCH / (time.perf_counter() - started))
                cpu[name].append(n * BATCH / (time.process_time() - used))
    for name in ways:
        print(f"{name:28} {statistics.median(cpu[name]):7.0f} pairs/cpu-s {statistics.median(wall[name]):7.0f} pairs/s")
    for a, b, rates, goal in (
        ("FrameStore.read", "JPEGs in memory", cpu, 0.90),
        ("FrameStore.read", "zarr array[i]", cpu, 4.0),
        ("FrameStore.read, 2 threads", "FrameStore.read", wall, 1.6),
    ):
        ratio = statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True))
        print(f"{a} / {b}: {ratio:.2f} (goal {goal})")


if __name__ == "__main__":
    main()

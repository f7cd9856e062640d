"""Random pairs (t, t + gap) out of a frame store, beside decoding the same JPEGs from memory, and beside other readers.

    python -m tests.benchmarks.loader [--rounds 150] [--clips 2] [--frames 240]

Interleaved batch by batch, totals of a run; ratios carry over to other machines, figures do not. All readers give the
same frames: 1080p clips that compress like EgoDex's, brought to 224 px once, kept as JPEGs, H.264 and AV1.
torchcodec is no dependency of avrl: ``pip install --no-deps torchcodec==0.13.0`` and have the shared libraries of
FFmpeg 4 to 8 (``apt install ffmpeg``) where the loader finds them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import simplejpeg
import torch
import zarr
from torch.utils.data import DataLoader, Dataset

from avrl import codec, episodes, store
from avrl.pairs import Pairs, Sampling
from avrl.store import FrameStore
from tests.benchmarks.decode import filmed
from tests.clips import FFMPEG, ffmpeg

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SIZE, BATCH, MAX_GAP = 224, 64, 10
SMALL = f"-f rawvideo -pix_fmt rgb24 -s {SIZE}x{SIZE} -r 30 -i - -pix_fmt yuv420p "
VIDEOS = {  # name -> ffmpeg's options, and our goal: how many times its speed
    "torchcodec, H.264 GOP 2": (SMALL + "-c:v libx264 -preset fast -crf 18 -g 2 -bf 0 {}", 3.0),
    "torchcodec, AV1 GOP 2": (SMALL + "-c:v libsvtav1 -crf 30 -g 2 {}", 2.5),  # LeRobot's
    "torchcodec, 1080p GOP 30": ("", 150.0),  # the clip itself
}
MEMORY, OURS, ZARR = "JPEGs in memory", "FrameStore.read", "zarr array[i]"
STREAM, ONE, WORKERS, WHOLE = "Pairs.stream", "Pairs.stream, 1 thread", "DataLoader", "DataLoader, whole batches"
COLD, MAPPED = "FrameStore.read, cold", "np.memmap, cold"
PAIRS = {ZARR: 16, "torchcodec, 1080p GOP 30": 4}  # a round, of the slow ones


def build(root: Path, clips: int, n: int) -> np.ndarray:
    """A store of one full shard, in episodes of `n` frames that repeat the clips; the clips lie beside it."""
    small = []
    for k in range(clips):
        clip = root / f"{k}.mp4"
        clip.write_bytes(filmed(root, n, seed=k))
        scale = f"scale={SIZE}:{SIZE}:flags=area+accurate_rnd+full_chroma_int"
        command = [FFMPEG, "-v", "error", "-i", str(clip), "-vf", scale, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
        small.append(np.frombuffer(subprocess.run(command, stdout=-1, check=True).stdout, np.uint8))
    frames = np.stack(small).reshape(clips * n, SIZE, SIZE, 3)
    chunks = [store.seal(codec.encode(frame, 90)) for frame in frames]
    chunks = [chunks[row % len(chunks)] for row in range(store.SHARD // n * n)]
    store.write_shard(store.shard_path(root / "frames.zarr", 0), [(b"".join(chunks), [len(one) for one in chunks])])
    store.create(root / "frames.zarr", 1, SIZE, 90)
    first = np.arange(0, len(chunks), n)
    names = [f"episode {row}" for row in first]
    table = {"episode_id": names, "length": np.full(len(first), n), "dataset_from_index": first}
    pl.DataFrame(table).write_parquet(root / "episodes.parquet")
    print(f"{len(frames)} frames; JPEG {sum(map(len, chunks)) / len(chunks) / 1000:.1f} kB each")
    return frames


def readers(root: Path, frames: np.ndarray, clips: int, n: int) -> dict[str, object]:
    """Each takes batches of rows, (BATCH, 2) of one episode, and leaves their frames in memory."""
    ours = FrameStore(root, 1)
    array = zarr.open_array(root / "frames.zarr" / "frames", mode="r")
    memory = [bytes(ours.jpeg(row)) for row in range(len(ours))]
    out = np.empty((2 * BATCH, SIZE, SIZE, 3), np.uint8)

    def decode(rows: np.ndarray) -> None:
        for row, frame in zip(rows.ravel().tolist(), out, strict=False):
            simplejpeg.decode_jpeg(memory[row], colorspace="RGB", buffer=frame)

    def index(rows: np.ndarray) -> None:
        for row, frame in zip(rows.ravel().tolist(), out, strict=False):
            frame[:] = array[row]

    found = {MEMORY: decode, OURS: lambda rows: ours.read(rows.ravel(), out[: rows.size]), ZARR: index}
    try:
        decoders = importlib.import_module("torchcodec.decoders")
        resize = importlib.import_module("torchcodec.transforms").Resize((SIZE, SIZE))
        decoders.VideoDecoder(
            root / "0.mp4", transforms=[resize]
        )  # fails where torchvision was built for another torch
    except (ImportError, RuntimeError, OSError) as error:
        print(f"skipped: torchcodec ({str(error).splitlines()[0]}): see the top of this file")
        return found
    for name, (options, _) in VIDEOS.items():
        paths = [root / f"{k}.mp4" for k in range(clips)]
        if options:
            paths = [root / f"{k} {name}.mp4" for k in range(clips)]
            for path, clip in zip(paths, frames.reshape(clips, -1), strict=True):
                path.write_bytes(ffmpeg(options, clip.tobytes()))
        keep = [
            decoders.VideoDecoder(
                path, dimension_order="NHWC", num_ffmpeg_threads=1, transforms=None if options else [resize]
            )
            for path in paths
        ]
        print(f"{name}: {sum(path.stat().st_size for path in paths) / len(frames) / 1000:.1f} kB a frame")

        def seek(rows: np.ndarray, keep: list = keep) -> None:
            for pair in rows:
                keep[pair[0] // n % clips].get_frames_at((pair % n).tolist())

        found[name] = seek
    return found


def pair_rows(rng: np.random.Generator, n_pairs: int, n_episodes: int, n: int) -> np.ndarray:
    """Rows (n_pairs, 2) of frames of one episode."""
    gap = rng.integers(1, MAX_GAP + 1, n_pairs)
    first = rng.integers(0, n_episodes, n_pairs) * n + rng.integers(0, n - gap)
    return np.stack([first, first + gap], 1)


def cpu() -> float:
    """Cpu seconds of this process and of its finished children; `os.times` would count in steps of 10 ms."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Rates:
    """Pairs, cpu seconds (this process and those it has waited for) and seconds by the clock, one sum a name."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}

    def add(self, name: str, n_pairs: int, work: Callable[[], None]) -> None:
        before = np.array([0, cpu(), time.perf_counter()])
        work()
        self.sums[name] = self.sums.get(name, 0) + np.array([n_pairs, cpu(), time.perf_counter()]) - before

    def show(self, ours: str, goals: dict[str, float]) -> None:
        """Print figures, then how many times as fast ours is, beside the goals."""
        per = {name: sums[0] / sums[1:] for name, sums in self.sums.items()}
        for name, (used, wall) in per.items():
            print(f"  {name:28} {used:7.1f} pairs/cpu-s {wall:7.1f} pairs/s")
        for name in [name for name in goals if name in per]:
            used, wall = per[ours] / per[name]
            print(f"{ours} / {name}: {used:.2f} per cpu-s, {wall:.2f} by the clock (goal {goals[name]:g})")


def alone(ways: dict, rounds: int, n_episodes: int, n: int) -> None:
    """One thread, warm."""
    rng, rates = np.random.default_rng(1), Rates()
    for way in ways.values():
        way(pair_rows(rng, 2, n_episodes, n))
    for _ in range(rounds):
        for name, way in rng.permutation(list(ways.items())):
            rows = pair_rows(rng, PAIRS.get(name, BATCH), n_episodes, n)
            rates.add(name, len(rows), lambda way=way, rows=rows: way(rows))
    rates.show(OURS, {MEMORY: 0.95, ZARR: 4.0} | {name: wanted for name, (_, wanted) in VIDEOS.items()})


class Rows(Dataset):
    """The same store behind a DataLoader: an item is the frames of some rows."""

    def __init__(self, root: Path, rows_NM: np.ndarray) -> None:
        self.store, self.rows_NM = FrameStore(root, 1), rows_NM

    def __len__(self) -> int:
        return len(self.rows_NM)

    def __getitem__(self, item: int) -> torch.Tensor:
        return torch.from_numpy(self.store.read(self.rows_NM[item]))


def consume(batches: Iterable) -> None:
    """A main thread that hands batches to an accelerator and waits for it."""
    for batch in batches:
        frames = getattr(batch, "frames_BTHWC", batch)
        frames.view(-1, SIZE, SIZE, 3)[:, ::16, ::16].float().mean()
        time.sleep(0.002)


def training(root: Path, rounds: int, n: int) -> None:
    """In a training process, on two cores."""
    steps, rng, rates = 30, np.random.default_rng(2), Rates()
    for _ in range(rounds):
        rows = pair_rows(rng, steps * BATCH, store.SHARD // n, n)
        pairs = [Pairs(FrameStore(root, threads), Sampling(0, MAX_GAP, 0.8, 1000), BATCH) for threads in (1, 2)]
        whole = Rows(root, rows.reshape(steps, -1))
        ways = {
            STREAM: pairs[1].stream(0, steps),
            ONE: pairs[0].stream(0, steps),
            WORKERS: DataLoader(Rows(root, rows), BATCH, num_workers=2),
            WHOLE: DataLoader(whole, batch_size=None, num_workers=2),
        }
        for name, batches in ways.items():
            rates.add(name, len(rows), lambda batches=batches: consume(batches))
    rates.show(STREAM, {ONE: 1.6, WORKERS: 1.8, WHOLE: 1.8})


class Mapped(FrameStore):
    """The obvious reader of a shard, through a mapping."""

    def jpeg(self, row: int) -> np.ndarray:
        if not self._shards:
            data = np.memmap(store.shard_path(self.root / "frames.zarr", 0), np.uint8, "r").view(np.ndarray)
            self._shards[0] = data, data[-store.SHARD * 16 - 4 : -4].view("<u8").reshape(-1, 2)
        data, index = self._shards[0]
        chunk = data[index[row, 0] : index[row].sum()]
        assert store.google_crc32c.value(chunk[:-4]) == chunk[-4:].view("<u4")[0]
        return chunk[:-4]


def cold(root: Path, rounds: int, n: int) -> None:
    """Two threads, and a shard that the page cache has forgotten."""
    rng, rates, out = np.random.default_rng(3), Rates(), np.empty((2 * BATCH, SIZE, SIZE, 3), np.uint8)
    for _ in range(rounds):
        for name, kind in ((COLD, FrameStore), (MAPPED, Mapped)):
            reader, rows = kind(root, 2), pair_rows(rng, BATCH, store.SHARD // n, n).ravel()
            with store.shard_path(root / "frames.zarr", 0).open("rb") as shard:
                os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            rates.add(name, BATCH, lambda reader=reader, rows=rows: reader.read(rows, out))
    rates.show(COLD, {MAPPED: 1.5})


def opening(root: Path, n_episodes: int) -> None:
    """A store of so many episodes: from nothing to the rows of the first batch."""
    store.create(root / "frames.zarr", n_episodes * 357 // store.SHARD, SIZE, 90)
    one = {"task": "fold_towel", "language": "", "split": "train", "length": 357, "fps": 30.0, "offset": 0}
    names = [
        {"episode_id": f"part1/fold_towel/{i}", "file": f"{i % 99}.zip", "member": f"{i}.mp4"}
        for i in range(n_episodes)
    ]
    rows = [{**one, **name, "episode_index": i, "dataset_from_index": i * 357} for i, name in enumerate(names)]
    episodes.table(rows).write_parquet(root / "episodes.parquet")
    started = time.perf_counter()
    pairs = Pairs(FrameStore(root), Sampling(0, MAX_GAP, 0.8, 100), BATCH)
    opened = time.perf_counter()
    pairs.draw(0)
    print(
        f"{n_episodes} episodes: opened in {opened - started:.3f} s (goal 0.5), first draw of an epoch "
        f"{time.perf_counter() - opened:.2f} s, its order {pairs._epoch(0).nbytes / 1e6:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--frames", type=int, default=240, help="a clip")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        root, n = Path(folder), options.frames
        frames = build(root, options.clips, n)
        alone(readers(root, frames, options.clips, n), options.rounds, store.SHARD // n, n)
        training(root, options.rounds // 30, n)
        cold(root, options.rounds // 4, n)
        for n_episodes in (50_000, 314_000):
            opening(Path(other), n_episodes)


if __name__ == "__main__":
    main()

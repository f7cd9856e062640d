"""Features: frozen encoder -> one vector a readout for each frame, or for each pair if the encoder sees pairs.

Every frame is encoded once, in whatever pairs and gaps it stands later. Vectors lie in ``features.zarr``, one
array (N, D) float32 a readout, zstd with checksums; ``pairs.parquet`` says what row n is. Work is done in
blocks of `BLOCK` rows, each a chunk of every array, with a done-record behind it, so a killed run goes on. Decoding,
encoding and writing go on side by side.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from avrl.artifact import SCRATCH, write_durably
from avrl.errors import ConfigError, IntegrityError
from avrl.progress import bar
from avrl.store import FrameStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import polars as pl
    from torch import Tensor

    from avrl.encoders import Encoder

BLOCK = 1024  # rows a chunk
SWAPPED = "-swapped"  # of an encoder of pairs, the vector of (t+gap, t) beside that of (t, t+gap)


def rows_of(episodes: pl.DataFrame, gap: int) -> tuple[pl.DataFrame, np.ndarray]:
    """What is encoded: every frame (``gap`` 0), or every pair of that gap within an episode.

    Returns:
        A table (``episode_index``, ``frame_index`` of t, ``gap``) and the store's rows of frame t.
    """
    import polars as pl

    index, frame, row = [], [], []
    columns = episodes.select("episode_index", "length", "dataset_from_index")
    for episode_index, length, first in columns.iter_rows():
        frames = np.arange(max(0, length - gap))
        index.append(np.full(len(frames), episode_index))
        frame.append(frames)
        row.append(first + frames)
    table = pl.DataFrame({"episode_index": np.concatenate(index), "frame_index": np.concatenate(frame)})
    return table.with_columns(pl.lit(gap).alias("gap")), np.concatenate(row)


def extract(encoder: Encoder, frames: Path, out: Path, *, gap: int, batch_size: int, device: str) -> dict[str, Any]:
    """Encode a frame store.

    Args:
        encoder: Frozen; on ``device`` already if it is a module.
        frames: Root of the ``frames`` artifact.
        out: Directory to fill; what an interrupted call left there is kept.
        gap: Frames between the two of a pair, for an encoder of pairs; 0 for an encoder of frames.
        batch_size: Rows a forward pass.
        device: ``cpu`` or ``cuda``.

    Returns:
        Facts for the manifest.

    Raises:
        ConfigError: the gap does not suit the encoder, or no episode is long enough for it.
        IntegrityError: the encoder gave a number that is not finite.
    """
    import zarr
    from zarr.codecs import ZstdCodec

    if bool(gap) != encoder.paired:
        raise ConfigError(f"gap {gap} does not suit an encoder of {'pairs' if encoder.paired else 'frames'}")
    store = FrameStore(frames)
    table, row_N = rows_of(store.episodes, gap)
    if not len(row_N):
        raise ConfigError(f"no episode is longer than the gap of {gap} frames", "lower --gap")
    (out / SCRATCH).mkdir(parents=True, exist_ok=True)
    root = zarr.open_group(str(out / "features.zarr"), mode="a")
    arrays = {
        name: root.require_array(
            name,
            shape=(len(row_N), dims),
            chunks=(BLOCK, dims),
            dtype="float32",
            compressors=[ZstdCodec(level=1, checksum=True)],
        )
        for readout, dims in encoder.readouts.items()
        for name in (readout, readout + SWAPPED)[: 1 + bool(gap)]
    }
    todo = [start for start in range(0, len(row_N), BLOCK) if not _record(out, start).exists()]
    with ThreadPoolExecutor(1) as writer:
        written = writer.submit(lambda: None)
        blocks = itertools.groupby(_batches(store, row_N, todo, gap, batch_size, device), lambda batch: batch[0])
        for start, batches in bar("features", len(todo), "block", iterable=blocks):
            found = _encode(encoder, (pixels for _, pixels in batches), device, swap=bool(gap))
            written.result()
            written = writer.submit(_write, found, arrays, out, start)
        written.result()
    table.write_parquet(out / "pairs.parquet")
    return {"rows": len(row_N), "gap": gap, "paired": encoder.paired, "readouts": dict(encoder.readouts)}


def _record(out: Path, start: int) -> Path:
    """What is there once the block that begins at this row is written."""
    return out / SCRATCH / f"block-{start:09d}"


def _batches(
    store: FrameStore, row_N: np.ndarray, todo: list[int], gap: int, batch_size: int, device: str
) -> Iterator[tuple[int, Tensor]]:
    """(start of its block, frames (B, T, H, W, 3) uint8) of all blocks to do, decoded while earlier ones are encoded.

    A thread decodes a batch by itself, as in `avrl.pairs`. Page-locked for a GPU, so that a copy need not be waited
    for; there every core decodes. On a CPU the cores are the encoder's.
    """
    import torch

    cuda = device == "cuda"
    threads = len(os.sched_getaffinity(0)) if cuda else 1

    def read(row: np.ndarray) -> Tensor:
        seen = np.stack([row, row + gap], 1) if gap else row[:, None]
        size = store.image_size
        pixels = torch.empty((*seen.shape, size, size, 3), dtype=torch.uint8, pin_memory=cuda)
        store.read(seen.ravel(), pixels.view(-1, size, size, 3).numpy(), threads=1)
        return pixels

    with ThreadPoolExecutor(threads) as decoders:
        ends = {start: min(start + BLOCK, len(row_N)) for start in todo}
        cuts = (
            (start, at, min(at + batch_size, ends[start]))
            for start in todo
            for at in range(start, ends[start], batch_size)
        )
        jobs = ((start, decoders.submit(read, row_N[at:end])) for start, at, end in cuts)
        ahead = deque(itertools.islice(jobs, threads + 1))
        while ahead:
            start, job = ahead.popleft()
            ahead.extend(itertools.islice(jobs, 1))
            yield start, job.result()


def _encode(encoder: Encoder, batches: Iterable[Tensor], device: str, *, swap: bool) -> dict[str, list[Tensor]]:
    """Parts (B, D) of each readout, still on the device: nothing here waits for a GPU."""
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        pixels = batch.to(device, non_blocking=True)
        for name, z_BD in encoder.encode(pixels).items():
            found.setdefault(name, []).append(z_BD)
        if swap:
            for name, z_BD in encoder.encode(pixels.flip(1)).items():
                found.setdefault(name + SWAPPED, []).append(z_BD)
    return found


def _write(found: dict[str, list[Tensor]], arrays: Mapping[str, Any], out: Path, start: int) -> None:
    """Write a block, in a thread of its own: compression would keep the encoder waiting.

    Raises:
        IntegrityError: a number is not finite.
    """
    for name, parts in found.items():
        z_ND = np.concatenate([z_BD.cpu().numpy() for z_BD in parts])
        if not np.isfinite(z_ND).all():
            raise IntegrityError(f"readout {name!r} of the encoder has numbers that are not finite")
        arrays[name][start : start + len(z_ND)] = z_ND
    write_durably(_record(out, start), b"")


def places(root: Path, rows: pl.DataFrame) -> np.ndarray:
    """Where the vectors of these rows (``episode_index``, ``frame_index`` of t) lie in every readout: (N,)."""
    import polars as pl

    table = pl.read_parquet(root / "pairs.parquet", columns=["episode_index", "frame_index"])
    place = {key: n for n, key in enumerate(table.iter_rows())}
    return np.array([place[key] for key in rows.iter_rows()])


def read(root: Path, readout: str) -> np.ndarray:
    """Vectors (N, D) float32 of a readout of a ``features`` artifact."""
    import zarr

    return np.asarray(zarr.open_array(str(root / "features.zarr" / readout), mode="r")[:])

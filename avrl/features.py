"""Features: frozen encoder -> one vector a readout for each frame, or for each pair if the encoder sees pairs.

Every frame is encoded once, in whatever pairs and gaps it stands later; a probe that looks at a subset has only that
encoded (`avrl.subsets`). Vectors lie in ``features.zarr``, one array (N, D) float32 a readout, zstd with checksums;
``pairs.parquet`` says what row n is. A readout that no closed form takes (`too_wide`) is not written: it would be most
of the bytes. Work is done in blocks of `BLOCK` rows, each a chunk of every array, with a done-record behind it, so a
killed run goes on. Decoding, encoding and writing go on side by side.

Legend: N rows of the artifact or pairs, D dimensions, M a part of the pairs, B samples, T frames of a sample.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from avrl.artifact import SCRATCH, write_durably
from avrl.errors import ConfigError, IntegrityError
from avrl.probes import WIDE
from avrl.progress import bar
from avrl.store import FrameStore
from avrl.subsets import chosen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import polars as pl
    from torch import Tensor

    from avrl.encoders import Encoder

BLOCK = 1024  # rows a chunk
LARGEST = 8192  # dimensions, where rows are as many: beyond, an eigendecomposition takes hours
SWAPPED = "-swapped"  # of an encoder of pairs, the vector of (t+gap, t) beside that of (t, t+gap)
TWICE = "-twice"  # that of (t, t): all that such an encoder can say of one frame; for clusters
VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "": lambda pixels_BTHWC: pixels_BTHWC,
    SWAPPED: lambda pixels_BTHWC: pixels_BTHWC.flip(1),
    TWICE: lambda pixels_BTHWC: pixels_BTHWC[:, :1].expand_as(pixels_BTHWC),
}


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


def pairs_of(which: str, episodes: pl.DataFrame, gap: int, seed: int) -> pl.DataFrame:
    """The pairs that a probe looks at, as `rows_of` has them, whoever encodes them; see `avrl.subsets.chosen`."""
    return chosen(which, rows_of(episodes, gap)[0], episodes, seed)


def encoded(
    which: str, episodes: pl.DataFrame, gap: int, seed: int, *, paired: bool
) -> tuple[pl.DataFrame, np.ndarray]:
    """What is encoded for a probe: as `rows_of`; of a subset's pairs, each frame once for an encoder of frames."""
    import polars as pl

    if which == "all":
        return rows_of(episodes, gap)
    rows = pairs_of(which, episodes, gap, seed)
    if not paired:
        later = rows.with_columns(pl.col("frame_index") + gap)
        rows = pl.concat([rows, later]).unique().sort("episode_index", "frame_index").with_columns(gap=pl.lit(0))
    first = episodes.select("episode_index", "dataset_from_index")
    place = rows.join(first, on="episode_index", how="left", maintain_order="left")
    return rows, (place["dataset_from_index"] + place["frame_index"]).to_numpy()


def too_wide(dims: int, rows: int) -> str:
    """Why vectors are too wide for a closed form; empty if they are not. What it solves is the smaller of both."""
    words = f"{dims:,} dimensions of {rows:,} rows, a closed form takes {LARGEST:,} of either"
    return words if min(dims, rows) > LARGEST else ""


@dataclass(frozen=True)
class Layout:
    """What an artifact of features will hold.

    Attributes:
        rows: N.
        readouts: Those that are written -> D.
        views: Of `VIEWS`, each an array of every readout.
        left_out: Readouts that are not written, and why.
    """

    rows: int
    readouts: dict[str, int]
    views: tuple[str, ...]
    left_out: dict[str, str]

    @property
    def arrays(self) -> dict[str, int]:
        """Name -> D."""
        return {name + view: dims for name, dims in self.readouts.items() for view in self.views}

    @property
    def bytes(self) -> int:
        """At most: zstd takes some percent off."""
        return 4 * self.rows * sum(self.arrays.values())


def layout(encoder: Encoder, rows: int, which: str, readouts: Sequence[str] = (), *, still: bool = False) -> Layout:
    """What an encoder's features of so many rows hold: those named, or all (of a subset all but `WIDE`).

    Of an encoder of pairs in both orders, or ``still``: of frame t shown twice.

    Raises:
        ConfigError: no readout is left.
    """
    there = dict(encoder.readouts)
    asked = list(readouts) or [name for name in there if name != WIDE or which == "all"]
    left_out = {name: why for name in asked if (why := too_wide(there.get(name, 0), rows))}
    kept = {name: dims for name, dims in there.items() if name in asked and name not in left_out}
    if not kept:
        why = "; ".join(f"{name}: {words}" for name, words in left_out.items())
        raise ConfigError(f"none of the readouts asked for: {why or ', '.join(readouts)}", "leave out --readout")
    return Layout(rows, kept, (TWICE,) if still else ("", SWAPPED)[: 1 + encoder.paired], left_out)


def extract(
    encoder: Encoder,
    frames: Path,
    out: Path,
    *,
    gap: int,
    batch_size: int,
    device: str,
    rows: str = "all",
    seed: int = 0,
    readouts: Sequence[str] = (),
    still: bool = False,
) -> dict[str, Any]:
    """Encode a frame store.

    Args:
        encoder: Frozen; on ``device``.
        frames: Root of the ``frames`` artifact.
        out: Directory to fill; what an interrupted call left there is kept.
        gap: Frames between the two of a pair; 0 for all rows of an encoder of frames.
        batch_size: Rows a forward pass.
        device: ``cpu`` or ``cuda``.
        rows: ``all``, or the subset that ``order`` or ``clusters`` looks at.
        seed: Of the subset.
        readouts: Which to write, see `layout`.
        still: Show an encoder of pairs frame t twice, instead of the pair.

    Returns:
        Facts for the manifest.

    Raises:
        ConfigError: the gap does not suit the encoder, no episode is long enough for it, or no readout is left.
        IntegrityError: the encoder gave a number that is not finite.
    """
    if (bool(gap) != encoder.paired) if rows == "all" else not gap:
        raise ConfigError(f"gap {gap} does not suit an encoder of {'pairs' if encoder.paired else 'frames'}")
    store = FrameStore(frames)
    table, row_N = encoded(rows, store.episodes, gap, seed, paired=encoder.paired)
    if not len(row_N):
        if rows == "clusters":
            raise ConfigError(f"{frames}: at least two tasks of two episodes each are needed")
        raise ConfigError(f"no episode is longer than the gap of {gap} frames", "lower --gap")
    plan = layout(encoder, len(row_N), rows, readouts, still=still)
    arrays = _arrays(plan, out)
    todo = [start for start in range(0, len(row_N), BLOCK) if not _record(out, start).exists()]
    with ThreadPoolExecutor(1) as writer:
        written = writer.submit(lambda: None)
        made = _batches(store, row_N, todo, gap * encoder.paired, batch_size, device)
        blocks = itertools.groupby(made, lambda batch: batch[0])
        for start, batches in bar("features", len(todo), "block", iterable=blocks):
            found = _encode(encoder, (pixels for _, pixels in batches), device, plan)
            written.result()
            written = writer.submit(_write, found, arrays, _record(out, start), start, device)
        written.result()
    table.write_parquet(out / "pairs.parquet")
    # A run that was killed may have gone on elsewhere, and its blocks differ by rounding.
    devices = ", ".join(sorted({one.read_text() for one in (out / SCRATCH).glob("block-*")}))
    facts = {"rows": len(row_N), "gap": gap, "paired": encoder.paired, "device": devices}
    return {**facts, "readouts": plan.readouts, "left_out": plan.left_out}


def _arrays(plan: Layout, out: Path) -> dict[str, Any]:
    """The arrays to fill, as they are there or new."""
    import zarr
    from zarr.codecs import ZstdCodec

    (out / SCRATCH).mkdir(parents=True, exist_ok=True)
    root = zarr.open_group(str(out / "features.zarr"), mode="a")
    return {
        name: root.require_array(
            name,
            shape=(plan.rows, dims),
            chunks=(BLOCK, dims),
            dtype="float32",
            compressors=[ZstdCodec(level=1, checksum=True)],
        )
        for name, dims in plan.arrays.items()
    }


def begun(out: Path) -> int:
    """Rows that an interrupted call has written there, at most."""
    return BLOCK * len(list((out / SCRATCH).glob("block-*")))


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


def _encode(encoder: Encoder, batches: Iterable[Tensor], device: str, plan: Layout) -> dict[str, list[Tensor]]:
    """Parts (B, D) of each array, still on the device: nothing here waits for a GPU."""
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        pixels = batch.to(device, non_blocking=True)
        for view in plan.views:
            for name, z_BD in encoder.encode(VIEWS[view](pixels)).items():
                if name in plan.readouts:
                    found.setdefault(name + view, []).append(z_BD)
    return found


def _write(found: dict[str, list[Tensor]], arrays: Mapping[str, Any], record: Path, start: int, device: str) -> None:
    """Write a block, in a thread of its own: compression would keep the encoder waiting.

    Raises:
        IntegrityError: a number is not finite.
    """
    for name, parts in found.items():
        z_ND = np.concatenate([z_BD.cpu().numpy() for z_BD in parts])
        if not np.isfinite(z_ND).all():
            raise IntegrityError(f"readout {name!r} of the encoder has numbers that are not finite")
        arrays[name][start : start + len(z_ND)] = z_ND
    write_durably(record, device.encode())

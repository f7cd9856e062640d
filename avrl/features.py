"""Features: frozen encoder -> one vector a readout for each frame, or for each pair if the encoder sees pairs.

Every frame is encoded once, in whatever pairs and gaps it stands later. Vectors lie in ``features.zarr``, one
array (N, D) float32 a readout, zstd with checksums; ``pairs.parquet`` says what row n is. Work is done in
blocks of `BLOCK` rows, each a chunk of every array, with a done-record behind it, so a killed run goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from avrl.artifact import SCRATCH, write_durably
from avrl.errors import ConfigError, IntegrityError
from avrl.progress import bar
from avrl.store import FrameStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import polars as pl

    from avrl.encoders import Encoder

BLOCK = 1024  # rows a chunk
STRETCH = 8 * BLOCK  # rows read at once when features are used
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
    starts = range(0, len(row_N), BLOCK)
    for start in bar("features", len(starts), "block", iterable=starts):
        done = out / SCRATCH / f"block-{start:09d}"
        if done.exists():
            continue
        block = row_N[start : start + BLOCK]
        for name, z_ND in _encode(encoder, store, block, gap, batch_size, device).items():
            if not np.isfinite(z_ND).all():
                raise IntegrityError(f"readout {name!r} of the encoder has numbers that are not finite")
            arrays[name][start : start + len(block)] = z_ND
        write_durably(done, b"")
    table.write_parquet(out / "pairs.parquet")
    return {"rows": len(row_N), "gap": gap, "paired": encoder.paired, "readouts": dict(encoder.readouts)}


def _encode(
    encoder: Encoder, store: FrameStore, row_N: np.ndarray, gap: int, batch_size: int, device: str
) -> dict[str, np.ndarray]:
    """Vectors (N, D) of each readout for frames in these rows of the store, or pairs that begin there."""
    import torch

    found: dict[str, list[np.ndarray]] = {}
    for at in range(0, len(row_N), batch_size):
        row = row_N[at : at + batch_size]
        seen = np.stack([row, row + gap], 1) if gap else row[:, None]
        pixels = torch.from_numpy(store.read(seen.ravel())).to(device)
        pixels = pixels.view(*seen.shape, *pixels.shape[1:])
        for name, z_BD in encoder.encode(pixels).items():
            found.setdefault(name, []).append(z_BD.cpu().numpy())
        if gap:
            for name, z_BD in encoder.encode(pixels.flip(1)).items():
                found.setdefault(name + SWAPPED, []).append(z_BD.cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


class Vectors:
    """One readout of a ``features`` artifact, as the vectors of pairs, read from disk as they are asked for.

    Concatenation keeps where things are (state, gripper), the difference keeps what moved: two rows, not one. For an
    encoder of pairs the same two are f(t, t+gap) and its antisymmetric part f(t, t+gap) - f(t+gap, t).

    Args:
        root: Of the artifact.
        readout: One of its readouts.
        pairing: ``concat``, ``diff``, ``pair`` or ``antisymmetric``.
        first_N: Where the pairs begin, from `places`.
        gap: Frames between the two of a pair.
    """

    def __init__(self, root: Path, readout: str, pairing: str, first_N: np.ndarray, gap: int) -> None:
        import zarr

        self.readout, self.pairing, self.first_N, self.gap = readout, pairing, first_N, gap
        group = root / "features.zarr"
        names = (readout, readout + SWAPPED)[: 1 + (pairing == "antisymmetric")]
        self._arrays = [zarr.open_array(str(group / name), mode="r") for name in names]
        self.dims: int = self._arrays[0].shape[1] * (1 + (pairing == "concat"))

    def blocks(self, index_M: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some pairs by their numbers, in rising order: numbers (m,) and vectors (m, D) float32, by stretches."""
        stretch_M = self.first_N[index_M] // STRETCH
        for part in np.split(index_M, np.flatnonzero(np.diff(stretch_M)) + 1):
            if len(part):
                yield part, self._read(self.first_N[part])

    def _read(self, at: np.ndarray) -> np.ndarray:
        """Pairs lie in the order of the store, so a stretch is one read, not one a pair."""
        apart = self.gap if self.pairing in ("concat", "diff") else 0
        low = int(at.min())
        spans = [np.asarray(one[low : int(at.max()) + 1 + apart]) for one in self._arrays]
        one = spans[0][at - low]
        if self.pairing == "antisymmetric":
            return np.asarray(one - spans[1][at - low])
        if not apart:
            return np.asarray(one)
        two = spans[0][at - low + apart]
        return np.asarray(np.concatenate([one, two], 1) if self.pairing == "concat" else two - one)


def places(root: Path, rows: pl.DataFrame) -> np.ndarray:
    """Where the vectors of these rows (``episode_index``, ``frame_index`` of t) lie in every readout: (N,).

    Raises:
        IntegrityError: a row has no vector.
    """
    import polars as pl

    keys = ["episode_index", "frame_index"]
    table = pl.read_parquet(root / "pairs.parquet", columns=keys).with_row_index("place")
    found = rows.select(keys).join(table, on=keys, how="left", maintain_order="left")["place"]
    if found.null_count():
        raise IntegrityError(f"{root}: {found.null_count()} pairs have no features", f"rm -r {root} and probe again")
    return np.asarray(found.to_numpy().astype(np.int64))

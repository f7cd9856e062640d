"""A small frame store and labels made on the spot, for tests that need frames whose content they know."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl

from avrl import store
from avrl.codec import encode
from avrl.episodes import Episode, table
from avrl.features import SWAPPED, TWICE

SIZE = 32


def frame_store(
    root: Path, lengths: list[int], splits: list[str] | None = None, seed: int = 0, size=SIZE, still=()
) -> Path:
    """A store of smooth moving blobs: episode i has lengths[i] frames; in those of `still` nothing moves."""
    rng = np.random.default_rng(seed)
    rows, pieces, first = [], [], 0
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1)
    for index, length in enumerate(lengths):
        place, speed, colour = rng.uniform(8, size - 8, 2), rng.uniform(-1.5, 1.5, 2), rng.uniform(60, 255, 3)
        speed, chunks = speed * (index not in still), []
        for t in range(length):
            centre = (place + speed * t) % size
            blob = np.exp(-((grid - centre) ** 2).sum(-1) / 18)[..., None]
            chunks.append(store.seal(encode((20 + blob * colour).clip(0, 255).astype(np.uint8), 90)))
        pieces.append((b"".join(chunks), [len(one) for one in chunks]))
        task = f"task {index % 3}"
        split = splits[index] if splits else "train"
        episode = Episode(index, f"made/{index}", task, task, split, length, 5.0, "made")
        rows.append({**asdict(episode), "dataset_from_index": first})
        first += length
    root.mkdir(parents=True, exist_ok=True)
    store.write_shard(store.shard_path(root / "frames.zarr", 0), pieces)
    store.create(root / "frames.zarr", 1, size, 90)
    table(rows).write_parquet(root / "episodes.parquet")
    return root


def labels_of(root: Path, out: Path, seed: int = 0) -> tuple[Path, pl.DataFrame]:
    """Random states and commands for the episodes of a store, the first action zero as in the real set."""
    from avrl.labels import DIMENSIONS

    rng = np.random.default_rng(seed)
    tables = []
    for index, length in pl.read_parquet(root / "episodes.parquet").select("episode_index", "length").iter_rows():
        state = rng.normal(size=(length, 7)).cumsum(0) * 0.02
        action = np.concatenate([np.zeros((1, 7)), np.diff(state, axis=0)])
        action[:, 6] = rng.integers(0, 2, length)
        columns = {"episode_index": np.full(length, index), "frame_index": np.arange(length)}
        columns |= {f"state_{name}": state[:, i].astype(np.float32) for i, name in enumerate(DIMENSIONS)}
        columns |= {f"action_{name}": action[:, i].astype(np.float32) for i, name in enumerate(DIMENSIONS)}
        tables.append(pl.DataFrame(columns))
    out.mkdir(parents=True, exist_ok=True)
    frame = pl.concat(tables)
    frame.write_parquet(out / "labels.parquet")
    return out, frame


def features_of(out: Path, rows: pl.DataFrame, vectors: dict[str, np.ndarray], *, paired: bool) -> Path:
    """A ``features`` artifact as `avrl.features` lays it out."""
    import zarr

    group = zarr.open_group(str(out / "features.zarr"), mode="w")
    for name, z_ND in vectors.items():
        group.create_array(name, data=z_ND.astype(np.float32))
        if paired:  # frames told apart in the first half, and the same either way round in the second
            half = np.arange(z_ND.shape[1]) < z_ND.shape[1] // 2
            group.create_array(name + SWAPPED, data=np.where(half, -z_ND, z_ND).astype(np.float32))
            group.create_array(name + TWICE, data=np.where(half, 0, z_ND).astype(np.float32))
    rows.write_parquet(out / "pairs.parquet")
    facts = {"paired": paired, "readouts": {name: z.shape[1] for name, z in vectors.items()}}
    (out / "manifest.json").write_text(json.dumps({"facts": facts}))
    return out

"""Vectors: features on disk as what a probe is fitted on, the vectors of pairs, read in stretches.

Legend: N pairs, D dimensions, M a part of the pairs, m a part of those.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from avrl.errors import IntegrityError
from avrl.features import BLOCK, SWAPPED, too_wide

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import polars as pl

STRETCH = 8 * BLOCK  # rows read at once


class Vectors:
    """One readout of a ``features`` artifact, as the vectors of pairs, read from disk as they are asked for.

    Concatenation keeps where things are (state, gripper), the difference keeps what moved: two rows, not one. For an
    encoder of pairs the same two are f(t, t+gap) and its antisymmetric part f(t, t+gap) - f(t+gap, t).

    Args:
        root: Of the artifact.
        readout: One of its readouts.
        pairing: ``concat``, ``diff``, ``pair`` or ``antisymmetric``.
        place_N2: Where the pairs lie, from `places`.
    """

    def __init__(self, root: Path, readout: str, pairing: str, place_N2: np.ndarray) -> None:
        import zarr

        self.readout, self.pairing, self.place_N2 = readout, pairing, place_N2
        group = root / "features.zarr"
        names = (readout, readout + SWAPPED)[: 1 + (pairing == "antisymmetric")]
        self._arrays = [zarr.open_array(str(group / name), mode="r") for name in names]
        self.dims: int = self._arrays[0].shape[1] * (1 + (pairing == "concat"))

    def blocks(self, index_M: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some pairs by their numbers, in rising order: numbers (m,) and vectors (m, D) float32, by stretches."""
        stretch_M = self.place_N2[index_M, 0] // STRETCH
        for part in np.split(index_M, np.flatnonzero(np.diff(stretch_M)) + 1):
            if len(part):
                yield part, self._read(self.place_N2[part])

    def _read(self, at_M2: np.ndarray) -> np.ndarray:
        """Pairs lie in the order of the store, so a stretch is one read, not one a pair."""
        apart = self.pairing in ("concat", "diff")
        used = at_M2 if apart else at_M2[:, :1]
        low = int(used.min())
        spans = [np.asarray(one[low : int(used.max()) + 1]) for one in self._arrays]
        one = spans[0][used[:, 0] - low]
        if self.pairing == "antisymmetric":
            return np.asarray(one - spans[1][used[:, 0] - low])
        if not apart:
            return np.asarray(one)
        two = spans[0][used[:, 1] - low]
        return np.asarray(np.concatenate([one, two], 1) if self.pairing == "concat" else two - one)


def places(root: Path, rows: pl.DataFrame, gap: int) -> np.ndarray:
    """Where the vectors of these pairs lie in every readout: (N, 2), of frame t and of t+gap; a pair's twice its own.

    Args:
        root: Of the artifact.
        rows: ``episode_index``, ``frame_index`` of t.
        gap: Frames between the two.

    Raises:
        IntegrityError: a row has no vector.
    """
    import polars as pl

    keys = ["episode_index", "frame_index"]
    table = pl.read_parquet(root / "pairs.parquet").with_row_index("place")
    of_frames = not table["gap"][0]
    found = []
    for apart in (0, gap * of_frames):
        asked = rows.select("episode_index", pl.col("frame_index") + apart)
        found.append(asked.join(table, on=keys, how="left", maintain_order="left")["place"])
        if missing := found[-1].null_count():
            raise IntegrityError(f"{root}: {missing} pairs have no features", f"rm -r {root} and probe again")
    return np.stack([one.to_numpy().astype(np.int64) for one in found], 1)


def offers(
    root: Path, readouts: Sequence[str], of_pairs: Iterable[str], rows: int, *, but: str = ""
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """What of an artifact a closed form can be solved for.

    Args:
        root: Of the artifact.
        readouts: Those asked for; none for all.
        of_pairs: How an encoder of pairs gives its vectors; one of frames has ``concat`` and ``diff``.
        rows: To solve for.
        but: A readout that is left out, without a word, unless it is asked for.

    Returns:
        Readouts, each with a pairing; and those asked for that are left out, with the reason.
    """
    facts = json.loads((root / "manifest.json").read_bytes())["facts"]
    there, unwritten = facts["readouts"], facts.get("left_out", {})
    found, left_out = [], {}
    for readout in readouts or [name for name in (*there, *unwritten) if name != but]:
        if readout not in there:
            left_out[readout] = unwritten.get(readout, f"it has {', '.join(there)}")
            continue
        for pairing in of_pairs if facts["paired"] else ("concat", "diff"):
            why = too_wide(there[readout] * (1 + (pairing == "concat")), rows)
            if why:
                left_out[f"{readout}, {pairing}"] = why
            else:
                found.append((readout, pairing))
    return found, left_out

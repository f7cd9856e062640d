"""How much of the picture changes between the two frames of a pair: the one rule for what is static, for all encoders.

Legend: N pairs, h w cells of 8 x 8 pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import simplejpeg

from avrl.progress import bar

if TYPE_CHECKING:
    import polars as pl

    from avrl.store import FrameStore

CELL = 8  # px: a JPEG's block, whose mean is decoded without the rest, ten times as fast
STILL = 0.5  # levels of 255: less is what the codecs of clip and store make of a picture that stands still


def changes(store: FrameStore, rows: pl.DataFrame, gap: int) -> np.ndarray:
    """Mean absolute difference of luma between frames t and t+gap in cells of 8 x 8 px: (N,), levels 0..255.

    Args:
        store: Frames.
        rows: ``episode_index`` and ``frame_index`` of t, sorted.
        gap: Frames between the two.

    Raises:
        IntegrityError: a frame is damaged.
    """
    first = dict(store.episodes.select("episode_index", "dataset_from_index").iter_rows())
    found, seen = np.empty(len(rows)), dict[int, np.ndarray]()
    keys = rows.select("episode_index", "frame_index").iter_rows()
    for n, (episode, frame) in enumerate(bar("static pairs", len(rows), "pair", iterable=keys)):
        at = first[episode] + frame
        seen = {row: cells for row, cells in seen.items() if row >= at}  # decoded once, and forgotten
        for row in {at, at + gap} - set(seen):
            seen[row] = _cells(store, row)
        found[n] = np.abs(seen[at + gap] - seen[at]).mean()
    return found


def _cells(store: FrameStore, row: int) -> np.ndarray:
    """Luma of each cell, (h, w) int16."""
    # Without a least size simplejpeg decodes every pixel.
    image = simplejpeg.decode_jpeg(store.jpeg(row), colorspace="GRAY", min_factor=CELL, min_height=1, min_width=1)
    return np.asarray(image[..., 0], np.int16)

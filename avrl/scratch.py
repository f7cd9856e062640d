"""Arrays with a row a pair, which may be more than memory holds: in files without a name, mapped.

Legend: N rows, K columns.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BLOCK = 2**16  # rows at once: what is made of them is small


def array(shape_NK: tuple[int, int], folder: Path | None, fill: float = 0.0) -> np.ndarray:
    """A new array (N, K) of float64; given a folder, on its disk, and in memory is what the kernel has room for.

    It takes disk as long as it lives, and leaves nothing behind, not even when it is killed. Every byte is written
    first: to a mapped file that has holes, a full disk is a SIGBUS.

    Raises:
        OSError: the disk is full.
    """
    if folder is None:
        return np.full(shape_NK, fill)
    n, k = shape_NK
    block = np.full((min(BLOCK, n), k), fill)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        for at in range(0, n, BLOCK):
            file.write(block[: n - at].data)
        file.flush()
        return np.asarray(np.memmap(file, np.float64, "r+", shape=shape_NK))


def joined(parts: Sequence[np.ndarray], folder: Path | None) -> np.ndarray:
    """Arrays of as many rows side by side, as `array` makes one; a single one as it is."""
    if len(parts) == 1:
        return parts[0]
    found = array((len(parts[0]), sum(one.shape[1] for one in parts)), folder)
    for at in range(0, len(found), BLOCK):
        np.concatenate([one[at : at + BLOCK] for one in parts], 1, out=found[at : at + BLOCK])
    return found

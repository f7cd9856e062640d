"""Flow labels: pairs of a frame store -> optical flow t -> t+gap on one grid for all encoders, by a teacher.

Teachers: ``dis``, OpenCV's dense inverse search (Kroeger et al. 2016; no weights), and ``raft``, torchvision's
RAFT-large (Teed & Deng 2020) from a file of its published weights. Flow is found at the store's size and averaged over
equal areas, in pixels of the store's frames: what a patch of 14 or 16 px shows moves by the mean over it.

Legend: N pairs, B of them, H W pixels, G = 14 places a side, last axis (right, down).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from avrl.encoders import weights
from avrl.encoders.pixels import areas
from avrl.errors import ConfigError
from avrl.features import rows_of
from avrl.progress import bar
from avrl.store import FrameStore
from avrl.torchvision_ops import torchvision

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import polars as pl

GRID = 14  # places a side
BATCH = 16
SMALLEST = 128  # px: RAFT's correlation pyramid needs as much


def extract(
    frames: Path, out: Path, *, gap: int, pairs: int, seed: int, teacher: str, file: Path | None
) -> dict[str, Any]:
    """Write ``pairs.parquet`` (``episode_index``, ``frame_index`` of t) and ``flow.npy`` (N, G, G, 2) float32.

    Args:
        frames: Root of the frame store.
        out: Directory to write into.
        gap: Frames between the two of a pair.
        pairs: At most so many, as many of each episode as can be.
        seed: Draws them.
        teacher: ``dis`` or ``raft``.
        file: RAFT's weights.

    Returns:
        Counts for the manifest.

    Raises:
        ConfigError: no episode is longer than the gap; RAFT without weights.
        IntegrityError: the weights do not fit.
    """
    store = FrameStore(frames)
    table, row_N = rows_of(store.episodes, gap)
    if not len(row_N):
        raise ConfigError(f"no episode is longer than the gap of {gap} frames", "lower --gap")
    chosen = draw(table, pairs, seed)
    find, row_N = _teacher(teacher, file), row_N[chosen]
    found = []
    starts = range(0, len(row_N), BATCH)
    for at in bar("flow", len(starts), "batch", iterable=starts):
        row = row_N[at : at + BATCH]
        both = store.read(np.stack([row, row + gap], 1).ravel())
        found.append(averaged(find(both[::2], both[1::2])))
    np.save(out / "flow.npy", np.concatenate(found))
    table[chosen].drop("gap").write_parquet(out / "pairs.parquet")
    return {"pairs": len(row_N), "episodes": table[chosen]["episode_index"].n_unique(), "teacher": teacher}


def draw(table: pl.DataFrame, pairs: int, seed: int) -> np.ndarray:
    """Numbers of at most so many rows, in rising order, spread over episodes as evenly as their lengths allow."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(table))
    episode = table["episode_index"].to_numpy()[shuffled]
    order = np.argsort(episode, kind="stable")
    first = np.r_[0, np.flatnonzero(np.diff(episode[order])) + 1]
    turn = np.empty(len(table), np.int64)  # the how many-th of its episode
    turn[order] = np.arange(len(table)) - np.repeat(first, np.diff(np.r_[first, len(table)]))
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:pairs]])


def averaged(flow_BHWC: np.ndarray) -> np.ndarray:
    """Mean over G x G equal areas: (B, G, G, 2) float32."""
    _, H, W, _ = flow_BHWC.shape
    rows_GH, columns_GW = areas(H, GRID).numpy(), areas(W, GRID).numpy()
    found = np.einsum("gh,bhwc,kw->bgkc", rows_GH, flow_BHWC, columns_GW, optimize=True)
    return np.asarray(found, np.float32)


def _teacher(name: str, file: Path | None) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Two stacks of frames (B, H, W, 3) uint8 -> flow (B, H, W, 2) in px."""
    if name == "dis":
        return dis
    if file is None:
        raise ConfigError("the teacher raft needs its weights", "pass torchvision's file: --teacher-weights FILE")
    return raft(file)


def dis(first_BHWC: np.ndarray, second_BHWC: np.ndarray) -> np.ndarray:
    """Flow by dense inverse search on luminance."""
    import cv2

    cv2.setNumThreads(1)
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [[cv2.cvtColor(one, cv2.COLOR_RGB2GRAY) for one in stack] for stack in (first_BHWC, second_BHWC)]
    return np.stack(
        [search.calc(one, two, np.zeros((*one.shape, 2), np.float32)) for one, two in zip(*grey, strict=True)]
    )


def raft(file: Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """RAFT-large with these weights, a key too few or too many refused.

    Raises:
        IntegrityError: the weights do not fit.
    """
    network = torchvision.models.optical_flow.raft_large(weights=None, progress=False)
    weights.fit(network, weights.read(file), f"raft ({file})")
    network.eval().requires_grad_(False)

    def find(first_BHWC: np.ndarray, second_BHWC: np.ndarray) -> np.ndarray:
        size = first_BHWC.shape[1]
        side = max(SMALLEST, -(-size // 8) * 8)
        one, two = (_prepared(stack, side) for stack in (first_BHWC, second_BHWC))
        with torch.inference_mode():
            flow = network(one, two)[-1]
        back = torch.nn.functional.interpolate(flow, (size, size), mode="bilinear", antialias=True)
        return np.asarray(back.mul(size / side).permute(0, 2, 3, 1))

    return find


def _prepared(stack_BHWC: np.ndarray, side: int) -> Tensor:
    """Bytes -> -1..1, as torchvision's weights want them."""
    x = torch.from_numpy(stack_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x if x.shape[-1] == side else torch.nn.functional.interpolate(x, (side, side), mode="bilinear")

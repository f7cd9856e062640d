"""Flow labels: pairs of a frame store -> optical flow t -> t+gap on one grid for all encoders, by a teacher.

Teachers: ``dis``, OpenCV's dense inverse search (Kroeger et al. 2016; no weights), and ``raft``, torchvision's RAFT
(Teed & Deng 2020), large or small as the file of its published weights is. Flow is found at the store's size and
averaged over equal areas, in pixels of the store's frames: what a patch of 14 or 16 px shows moves by the mean over it.
So is the part of it that is the camera's. Batches go to scratch as they are done, so a killed run goes on.

Legend: N pairs, B of them, H W pixels, G = 14 places a side, last axis (right, down).
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from avrl.artifact import SCRATCH, write_durably
from avrl.camera_motion import camera_motion
from avrl.encoders import weights
from avrl.encoders.pixels import areas
from avrl.errors import ConfigError
from avrl.features import rows_of
from avrl.progress import bar
from avrl.store import FrameStore
from avrl.torchvision_ops import torchvision

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl

GRID = 14  # places a side
BATCH = 16
SMALLEST = 128  # px: RAFT's correlation pyramid needs as much
SMALL = 32  # channels of RAFT-small's first layer

# Two stacks of frames (B, H, W, 3) uint8 -> flow (B, H, W, 2) in px.
Teacher = Callable[[np.ndarray, np.ndarray], np.ndarray]


def extract(
    frames: Path, out: Path, *, gap: int, pairs: int, seed: int, teacher: str, file: Path | None, device: str = "cpu"
) -> dict[str, Any]:
    """Write ``pairs.parquet`` (``episode_index``, ``frame_index`` of t), ``flow.npy`` and ``camera.npy``.

    Both are (N, G, G, 2) float32: how places move, and how far the camera's own motion is what moves them.

    Args:
        frames: Root of the frame store.
        out: Directory to fill; what an interrupted call left there is kept.
        gap: Frames between the two of a pair.
        pairs: At most so many, as many of each episode as can be.
        seed: Draws them.
        teacher: ``dis``, or ``raft`` whose size is that of its file.
        file: RAFT's weights.
        device: RAFT's: ``cpu`` or ``cuda``.

    Returns:
        Counts for the manifest: of how many pairs a homography is the camera's motion, and which device found how many
        (a GPU's last digits are not a CPU's). And who the teacher was: ``dis``, ``raft-large`` or ``raft-small``.

    Raises:
        ConfigError: no episode is longer than the gap; RAFT without weights.
        IntegrityError: the weights do not fit.
    """
    store = FrameStore(frames)
    table, row_N = rows_of(store.episodes, gap)
    if not len(row_N):
        raise ConfigError(f"no episode is longer than the gap of {gap} frames", "lower --gap")
    chosen = draw(table, pairs, seed)
    (called, find), row_N = _teacher(teacher, file, device), row_N[chosen]
    (out / SCRATCH).mkdir(parents=True, exist_ok=True)
    starts = range(0, len(row_N), BATCH)
    done = [out / SCRATCH / f"flow-{start:09d}.npz" for start in starts]
    for start, path in bar("flow", len(starts), "batch", iterable=zip(starts, done, strict=True)):
        if not path.exists():  # its name shows only when it is whole
            row = row_N[start : start + BATCH]
            both = store.read(np.stack([row, row + gap], 1).ravel())
            _write(path, find(both[::2], both[1::2]), "cpu" if teacher == "dis" else device)
    found = [_read(path) for path in done]
    for name in ("flow", "camera"):
        np.save(out / f"{name}.npy", np.concatenate([one[name] for one in found]))
    table[chosen].drop("gap").write_parquet(out / "pairs.parquet")
    devices: Counter[str] = Counter()
    for one in found:
        devices[str(one["device"])] += len(one["flow"])
    homographies = sum(int(one["homography"].sum()) for one in found)
    episodes = table[chosen]["episode_index"].n_unique()
    counts = {"pairs": len(row_N), "episodes": episodes, "homographies": homographies}
    return {**counts, "teacher": called, "devices": dict(devices)}


def _write(path: Path, flow_BHWC: np.ndarray, device: str) -> None:
    camera_BHWC, homography = camera_motion(flow_BHWC)
    data, flow_BGG2, camera_BGG2 = io.BytesIO(), averaged(flow_BHWC), averaged(camera_BHWC)
    np.savez(data, flow=flow_BGG2, camera=camera_BGG2, homography=homography, device=np.array(device))
    write_durably(path, data.getvalue())


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as batch:  # of thousands, none is left open
        return dict(batch)


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


def _teacher(name: str, file: Path | None, device: str) -> tuple[str, Teacher]:
    if name == "dis":
        return name, dis
    if file is None:
        raise ConfigError("the teacher raft needs its weights", "pass torchvision's file: --teacher-weights FILE")
    return raft(file, device)


def dis(first_BHWC: np.ndarray, second_BHWC: np.ndarray) -> np.ndarray:
    """Flow by dense inverse search on luminance, a pair a thread."""
    import cv2

    cv2.setNumThreads(1)

    def one(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        first, second = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in pair)
        return np.asarray(search.calc(first, second, np.zeros((*first.shape, 2), np.float32)))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # OpenCV lets go of the GIL
        return np.stack(list(pool.map(one, zip(first_BHWC, second_BHWC, strict=True))))


def raft(file: Path, device: str = "cpu") -> tuple[str, Teacher]:
    """RAFT with these weights, and which it is: a key too few or too many is refused.

    Raises:
        IntegrityError: the weights do not fit.
    """
    state = weights.read(file)
    # The small one's first layer has half the channels.
    small = len(state.get("feature_encoder.convnormrelu.0.weight", ())) == SMALL
    name = "raft-small" if small else "raft-large"
    network = getattr(torchvision.models.optical_flow, name.replace("-", "_"))(weights=None, progress=False)
    weights.fit(network, state, f"{name} ({file})")
    network.to(device).eval().requires_grad_(False)

    def find(first_BHWC: np.ndarray, second_BHWC: np.ndarray) -> np.ndarray:
        size = first_BHWC.shape[1]
        side = max(SMALLEST, -(-size // 8) * 8)
        one, two = (_prepared(stack, side).to(device) for stack in (first_BHWC, second_BHWC))
        with torch.inference_mode():
            flow = network(one, two)[-1].cpu()
        back = torch.nn.functional.interpolate(flow, (size, size), mode="bilinear", antialias=True)
        return np.asarray(back.mul(size / side).permute(0, 2, 3, 1))

    return name, find


def _prepared(stack_BHWC: np.ndarray, side: int) -> Tensor:
    """Bytes -> -1..1, as torchvision's weights want them."""
    x = torch.from_numpy(stack_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x if x.shape[-1] == side else torch.nn.functional.interpolate(x, (side, side), mode="bilinear")

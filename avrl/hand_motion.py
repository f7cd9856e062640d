"""What the hands of EgoDex do: wrists and fingertips, as the camera of the first frame sees them move.

The target of a pair is R^T (p' - p): p and p' are where a joint is in the world at t and t+gap, R is how the camera is
turned at t. The camera's own motion is not in it; absolute positions would not compare across recording sessions. Each
hand is a target of its own, over the pairs in which all of its joints are sure at both frames: `SURE` or more, or it
is not said how sure they are. A joint of which the data says so, and that it is never sure of, is left out.
Source: Hoque et al. 2025, arXiv:2505.11709, whose files `avrl.sources.egodex` reads; .3 is what its users filter by.

Legend: T frames, N pairs, J joints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from avrl.errors import ConfigError
from avrl.labels import Target, starts
from avrl.scratch import BLOCK, array

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import polars as pl

    from avrl.episodes import Episode
    from avrl.labels import Table

SURE = 0.3
NO_POSE = -1.0  # stands for the confidence where a pose is not finite: never sure, whatever the file says
SIDES = ("left", "right")
WRIST = "wrist"
JOINTS = {WRIST: "Hand", "thumb": "ThumbTip"}  # what a row of scores calls it -> what EgoDex does, after the side
JOINTS |= {finger: f"{finger.title()}FingerTip" for finger in ("index", "middle", "ring", "little")}
NAMES = tuple(side + joint for side in SIDES for joint in JOINTS.values())
AXES = ("x", "y", "z")  # of the camera: to the right, down, away from it
TURN = [f"camera_r{row}{column}" for row in AXES for column in AXES]
EYE = [f"camera_{axis}" for axis in AXES]


def columns(raw: Path, episode: Episode, scratch: Path) -> dict[str, np.ndarray]:
    """Pose of the camera, and of each joint position in the world (m) and confidence (NaN: not said; `NO_POSE`).

    Raises:
        IntegrityError: the pose file is damaged or lacks a joint.
    """
    from avrl.sources import egodex

    camera, at, sure = (values[:: episode.stride] for values in egodex.skeleton(raw, episode, NAMES, scratch))
    finite_T = np.isfinite(camera).all((1, 2))
    sure = np.where(np.isfinite(at).all(2) & finite_T[:, None], sure, np.float32(NO_POSE))
    found = dict(zip([*TURN, *EYE], [*camera[:, :3, :3].reshape(-1, 9).T, *camera[:, :3, 3].T], strict=True))
    for j, name in enumerate(NAMES):
        found |= {f"{name}_{axis}": at[:, j, i] for i, axis in enumerate(AXES)} | {_confidence(name): sure[:, j]}
    return found


def facts(labels: pl.LazyFrame) -> dict[str, Any]:
    """How many episodes do not say how sure they are, and in what share of the frames that do each joint is sure."""
    import polars as pl

    sure = [pl.col(_confidence(name)).fill_nan(None) for name in NAMES]  # polars has NaN above every number
    told = labels.filter(pl.any_horizontal(one >= 0 for one in sure))
    counts = [(one >= SURE).sum().alias(name) for name, one in zip(NAMES, sure, strict=True)]
    index = pl.col("episode_index").n_unique().alias("episodes")
    every = labels.select(index).collect(engine="streaming").item()
    frames, episodes, *found = told.select(pl.len(), index, *counts).collect(engine="streaming").row(0)
    share = {name: round(n / frames, 4) for name, n in zip(NAMES, found, strict=True)} if frames else {}
    return {"without_confidences": every - episodes, "sure": share}


def targets(labels: Table, gap: int, target: str, scratch: Path | None = None) -> Iterator[Target]:
    """The left hand, then the right, where there are pairs that the data is sure of; see `avrl.labels.targets`.

    Returns:
        y in m, three numbers a joint; the state is where the joints are at t as the camera sees them, in m.

    Raises:
        ConfigError: `target` is ``commanded``, the gap is longer than every episode, or no hand is sure in any pair.
    """
    if target != "reached":
        raise ConfigError("a hand obeys no command: EgoDex has motion that happened and no other", "--target reached")
    return _hands(labels.lazy(), gap, scratch)


def _hands(labels: pl.LazyFrame, gap: int, scratch: Path | None) -> Iterator[Target]:
    none = True
    for side in SIDES:
        made = _hand(labels, gap, side, scratch)
        if made:
            none = False
            yield made.pop()  # and keep nothing of it: with the other hand it would be gigabytes more
    if none:
        raise ConfigError(
            f"no pair of frames {gap} apart has a hand that the poses are sure of (confidence {SURE} or more)",
            "try a smaller --gap, or other parts",
        )


def _sure(labels: pl.LazyFrame, side: str) -> tuple[list[str], np.ndarray]:
    """The joints of a hand that the data is ever sure of, if it says so; and the rows where it is, of all of these."""
    sure_T, kept = np.array(True), []
    for name, joint in JOINTS.items():
        confidence = labels.select(_confidence(side + joint)).collect().to_series().to_numpy()
        sure = confidence >= SURE
        if sure.any() or not (confidence >= 0).any():
            sure_T = sure_T & (sure | np.isnan(confidence))
            kept.append(name)
    return kept, np.broadcast_to(sure_T, len(confidence))


def _hand(labels: pl.LazyFrame, gap: int, side: str, scratch: Path | None) -> list[Target]:
    """One hand, over the pairs in which it is sure; nothing if there are none."""
    import polars as pl

    start = starts(labels, gap)
    kept, sure_T = _sure(labels, side)
    start = start[sure_T[start] & sure_T[start + gap]]
    if not kept or not len(start):
        return []
    size = len(start), len(AXES) * len(kept)
    y_NK, state_NS = array(size, scratch), array(size, scratch)
    places = [[f"{side}{JOINTS[name]}_{axis}" for axis in AXES] for name in kept]
    wanted, keys = [*TURN, *EYE, *(one for place in places for one in place)], ["episode_index", "frame_index"]
    rows = []
    for low in range(0, int(start[-1]) + 1, BLOCK):  # a stretch of the table at a time is in memory
        at = slice(*np.searchsorted(start, (low, low + BLOCK)))
        here = start[at] - low
        if not len(here):
            continue
        stretch = labels.slice(low, BLOCK + gap).select(*keys, *wanted).collect()
        first, last = stretch[here], stretch[here + gap]
        turn_N33, eye = _numbers(first, TURN).reshape(-1, 3, 3), _numbers(first, EYE)
        motion = [_seen(turn_N33, _numbers(last, one) - _numbers(first, one)) for one in places]
        y_NK[at] = np.concatenate(motion, 1)
        state_NS[at] = np.concatenate([_seen(turn_N33, _numbers(first, one) - eye) for one in places], 1)
        rows.append(first.select(keys))
    groups = {WRIST: [one for one in kept if one == WRIST], "fingertips": [one for one in kept if one != WRIST]}
    names = {
        f"{side} {group}": tuple(f"{side} {name} {axis}" for name in some for axis in AXES)
        for group, some in groups.items()
        if some
    }
    return [Target(pl.concat(rows), y_NK, state_NS, y_NK, names, name=f"{side} hand")]


def _seen(turn_N33: np.ndarray, vector_N3: np.ndarray) -> np.ndarray:
    """Vectors in the world, along the axes of a camera that is turned so."""
    return np.asarray(np.einsum("nji,nj->ni", turn_N33, vector_N3))


def _numbers(labels: pl.DataFrame, names: list[str]) -> np.ndarray:
    return np.asarray(labels.select(names).to_numpy(), np.float64)


def _confidence(name: str) -> str:
    return f"{name}_confidence"

"""What a robot of a LeRobot data set does: its state and its actions by the names that the data set gives them.

Reached is the difference of the states, commanded the mean of the actions from t to the last before t+gap, as they were
recorded: whether an action is a place or a step is for the data set to know. Where it is a place, the floor ``state``
says how much of it is where the robot was. Two numbers are not left as they are: a gripper that is open or shut and
nothing between (two values in all of the data) is what it is at t+gap or what it was last told, 1 the larger; and
``roll``, ``pitch``, ``yaw`` that stay within a half turn are differences on the circle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from avrl.errors import ConfigError, IntegrityError
from avrl.labels import GROUPS, Target, starts, wrapped
from avrl.lerobot import ACTION, STATE

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl

    from avrl.episodes import Episode
    from avrl.labels import Table
    from avrl.lerobot import Dataset

KINDS = {STATE: "state_", ACTION: "action_"}  # a column of the data set -> how those of labels.parquet begin
GRIPPER, OTHER = "gripper", "motion"
HALF_TURN = np.pi * 1.001  # rad; what rounding adds


def columns(raw: Path, episode: Episode, scratch: Path) -> dict[str, np.ndarray]:
    """State of each frame of the store, and the action until the next: the mean of those between, a gripper's last.

    Raises:
        IntegrityError: they are damaged or missing.
    """
    from avrl.sources import lerobot

    data, found = lerobot.dataset(raw, episode), {}
    for column, prefix in KINDS.items():
        if column == ACTION and column not in data.features:
            continue
        values, names = data.numbers(episode.offset, column).astype(np.float64), _names(data, column)
        if values.shape[1] != len(names):
            path = data.root / data.file(episode.offset)
            raise IntegrityError(
                f"{path}: {column} has {values.shape[1]} numbers, {len(names)} are promised", "fetch the data set again"
            )
        at = np.arange(0, len(values), episode.stride)
        last = np.minimum(at + episode.stride, len(values)) - 1
        mean = np.add.reduceat(values, at, 0) / (last - at + 1)[:, None] if column == ACTION else values[at]
        for i, name in enumerate(names):
            one = values[last, i] if column == ACTION and GRIPPER in name else mean[:, i]
            found[prefix + name] = one.astype(np.float32)
    return found


def facts(labels: pl.LazyFrame) -> dict[str, Any]:
    """Names of the numbers."""
    return {kind.rstrip("_"): _called(labels, kind) for kind in KINDS.values()}


def targets(labels: Table, gap: int, target: str, scratch: Path | None = None) -> list[Target]:
    """All that a robot does, in the units of the data; see `avrl.labels.targets`.

    Raises:
        ConfigError: the gap is longer than every episode, or the data has no actions.
    """
    labels = labels.lazy().collect()
    start = starts(labels, gap)
    state, names = _numbers(labels, KINDS[STATE]), _called(labels, KINDS[STATE])
    reached = _difference(state, names, start, gap)
    values, motion = state, reached
    if target == "commanded":
        names = _called(labels, KINDS[ACTION])
        if not names:
            raise ConfigError("this data set has no actions", "--target reached")
        values = _numbers(labels, KINDS[ACTION])
        total = np.concatenate([np.zeros((1, len(names))), np.cumsum(values, 0)])
        motion = (total[start + gap] - total[start]) / gap
    binary = [GRIPPER in name and len(np.unique(values[:, i])) == 2 for i, name in enumerate(names)]
    now = values[start + gap - 1] if target == "commanded" else values[start + gap]
    y_NK = np.where(binary, now > (values.min(0) + values.max(0)) / 2, motion)
    order: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        order.setdefault(GRIPPER if binary[i] else _group(name), []).append(i)
    grouped = {group: tuple(names[i] for i in order[group]) for group in sorted(order, key=_rank)}
    at = [i for group in grouped for i in order[group]]
    rows = labels[start].select("episode_index", "frame_index")
    return [Target(rows, y_NK[:, at], state[start], reached, grouped, grouped.get(GRIPPER, ()))]


def _difference(state_TS: np.ndarray, names: list[str], start: np.ndarray, gap: int) -> np.ndarray:
    found = state_TS[start + gap] - state_TS[start]
    for i, name in enumerate(names):
        if _group(name) == "rotation" and np.abs(state_TS[:, i]).max() <= HALF_TURN:
            found[:, i] = wrapped(found[:, i])
    return np.asarray(found)


def _group(name: str) -> str:
    """Position or rotation if the name says so, else just motion; whether a gripper is one, its values tell."""
    return next((group for group, names in GROUPS.items() if group != GRIPPER and name in names), OTHER)


def _rank(group: str) -> int:
    """Order of groups: position, rotation, the rest, gripper."""
    return ["position", "rotation", OTHER, GRIPPER].index(group)


def _numbers(labels: pl.DataFrame, prefix: str) -> np.ndarray:
    return np.asarray(labels.select(prefix + name for name in _called(labels, prefix)).to_numpy(), np.float64)


def _called(labels: pl.DataFrame | pl.LazyFrame, prefix: str) -> list[str]:
    return [one.removeprefix(prefix) for one in labels.collect_schema() if one.startswith(prefix)]


def _names(data: Dataset, column: str) -> list[str]:
    """Names of a column's numbers: the data set's own if there is one for each, places where they say no more.

    Raises:
        IntegrityError: it is not said how many numbers there are.
    """
    from avrl.sources.lerobot import names_of

    said, shape = names_of(data, column), data.features.get(column, {}).get("shape")
    if not (isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int):
        raise IntegrityError(
            f"{data.root}: {column} has shape {shape!r:.60}, no number of numbers", "probe another data set"
        )
    if len(said) != shape[0]:
        return [str(place) for place in range(shape[0])]
    return [one if said.count(one) == 1 else f"{one} {place}" for place, one in enumerate(said)]

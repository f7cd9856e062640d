"""Bridge V2 as LeRobotDataset v2.x or v3.x: copies that others made, each with its own idea of state and action.

The copy that most people have (IPEC-COMMUNITY/bridge_orig_lerobot) went through OpenVLA's transform: first and last
step dropped, the action relabelled as the motion that happened, the gripper binarised, a number named ``pad`` put
into the state. That name is how it is known (`relabelled`), so that no rule is applied to it twice.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from avrl.errors import IntegrityError
from avrl.labels import DIMENSIONS
from avrl.sources.lerobot import FOLDER, dataset, frames, linked, survey

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from avrl.episodes import Episode
    from avrl.lerobot import Dataset

__all__ = ["frames", "local_files", "relabelled", "robot", "survey"]

local_files = linked

STATE, ACTION = "observation.state", "action"
PAD = "pad"


def robot(raw: Path, episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """State and action (T, 7) of every step.

    Raises:
        IntegrityError: they are damaged, or what the numbers mean is not said.
    """
    data = dataset(raw, episode)
    found = []
    for column in (STATE, ACTION):
        numbers, places = data.numbers(episode.offset, column), _places(data, column)
        if max(places) >= numbers.shape[1]:
            path = raw / episode.file
            raise IntegrityError(f"{path}: {column} has {numbers.shape[1]} numbers, {len(places)} are promised")
        found.append(numbers[:, places])
    return found[0], found[1]


def relabelled(raw: Path) -> bool:
    """Whether OpenVLA's transform made this copy: its state is padded."""
    from avrl.lerobot import load

    return any(PAD in _names(load(place), STATE) for place in (raw / FOLDER).glob("*"))


def _places(data: Dataset, column: str) -> list[int]:
    """Where x, y, z, roll, pitch, yaw and gripper stand in a column.

    Raises:
        IntegrityError: it is not said: there are names, but others, or there are none and not 7 numbers.
    """
    names = _names(data, column)
    shape = data.features.get(column, {}).get("shape")
    if not names and shape in ([7], (7,)):
        return list(range(7))
    if not set(DIMENSIONS) <= set(names) or len(set(names)) < len(names):
        said = ", ".join(names) or f"shape {shape}"
        raise IntegrityError(
            f"{data.root}: {column} is ({said:.120}), not {', '.join(DIMENSIONS)}", "its frames are: avrl fetch lerobot"
        )
    return [names.index(one) for one in DIMENSIONS]


def _names(data: Dataset, column: str) -> list[str]:
    """Names of a column's numbers, as a list or a list under a word like ``motors``; none if they do not fit it.

    ``motor_0`` or ``dim_0`` says no more than a place does, so such names count as none.
    """
    feature = data.features.get(column, {})
    names, shape = feature.get("names"), feature.get("shape")
    if isinstance(names, dict) and len(names) == 1:
        names = next(iter(names.values()))
    if not isinstance(names, list) or [len(names)] != shape:
        return []
    words = [str(one).lower() for one in names]
    return [] if all(re.fullmatch(r"(motor|dim|state|action|axis)?_?\d+", one) for one in words) else words

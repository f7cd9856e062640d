"""Bridge V2 as LeRobotDataset v2.x or v3.x: copies that others made, each with its own idea of state and action.

The copy that most people have (IPEC-COMMUNITY/bridge_orig_lerobot) went through OpenVLA's transform: first and last
step dropped, the action relabelled as the motion that happened, the gripper binarised, a number named ``pad`` put
into the state. That name is how it is known (`relabelled`), so that no rule is applied to it twice.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from avrl.claims import AGAIN
from avrl.errors import IntegrityError
from avrl.labels import DIMENSIONS
from avrl.lerobot import ACTION, STATE
from avrl.sources.bridge_rlds import SHARDS
from avrl.sources.lerobot import FOLDER, dataset, frames, linked, names_of, survey

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from avrl.episodes import Episode
    from avrl.lerobot import Dataset

__all__ = ["frames", "local_files", "relabelled", "robot", "survey"]

PAD = "pad"
PLACELESS = re.compile(r"(motor|dim|axis)?_?\d+|(state|actions?)(_?\d+)?")  # says no more than a place or a column does


def local_files(folder: Path, parts: tuple[str, ...]) -> dict[str, Path]:
    """The folder itself, if it is a data set; see `linked`."""
    return linked(folder, parts, tuple(SHARDS))


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
            path = data.root / data.file(episode.offset)
            raise IntegrityError(
                f"{path}: {column} has {numbers.shape[1]} numbers, {max(places) + 1} are promised", AGAIN
            )
        found.append(numbers[:, places])
    return found[0], found[1]


def relabelled(raw: Path) -> bool:
    """Whether OpenVLA's transform made this copy: its state is padded."""
    from avrl.lerobot import load

    return any(PAD in names_of(load(place), STATE) for place in (raw / FOLDER).glob("*"))


def _places(data: Dataset, column: str) -> list[int]:
    """Where x, y, z, roll, pitch, yaw and gripper stand in a column.

    Raises:
        IntegrityError: it is not said: there are names, but others, or there are none and not 7 numbers.
    """
    names = names_of(data, column)
    shape = data.features.get(column, {}).get("shape")
    placeless = names == sorted(names) and all(PLACELESS.fullmatch(one) for one in names)
    if shape == [7] and len(names) in (0, 1, 7) and placeless:
        return list(range(7))
    if shape != [len(names)] or not set(DIMENSIONS) <= set(names) or len(set(names)) < len(names):
        said = ", ".join(names) or f"shape {shape}"
        raise IntegrityError(
            f"{data.root}: {column} is ({said:.120}), not {', '.join(DIMENSIONS)}", "its frames are: avrl fetch lerobot"
        )
    return [names.index(one) for one in DIMENSIONS]

"""Bridge V2 in every form that it is published in: 60,064 trajectories of a WidowX arm, 5 Hz, 7-D state and action.

Source: Walke et al. 2023, "BridgeData V2", arXiv:2308.12952. `FORMS` is the one place that says which forms there
are. What is fetched over HTTP is RLDS; a local copy may be any of them, and the raw artifact's own top folder says
which. The same trajectories give the same labels in every form (tests/sources/test_bridge_forms.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from avrl.errors import ConfigError, NotFoundError
from avrl.sources import bridge_lerobot, bridge_raw, bridge_rlds

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy as np

    from avrl.episodes import Dropped, Episode, View

BASE_URL = "https://rail.eecs.berkeley.edu/datasets/bridge_release/data/tfds/"
PARTS = tuple(bridge_rlds.SHARDS)
DEFAULT_PARTS = PARTS
BYTES = {"train": 110_000_000_000, "val": 14_000_000_000}  # from the index page: 124 GB in all
LICENCE = "Bridge V2: CC BY 4.0"

remote_files = bridge_rlds.remote_files


class Form(Protocol):
    """What a form's module offers, beside `survey` and `frames` as a source has them."""

    def local_files(self, folder: Path, parts: tuple[str, ...]) -> dict[str, Path]:
        """As a source's; empty if the folder does not hold this form.

        Raises:
            NotFoundError: it holds this form, but not these parts.
        """
        ...

    def survey(self, raw: Path) -> tuple[list[Episode], list[Dropped]]:
        """As a source's."""
        ...

    def frames(self, raw: Path, episode: Episode, view: View, scratch: Path) -> tuple[Episode, Iterator[np.ndarray]]:
        """As a source's."""
        ...

    def robot(self, raw: Path, episode: Episode) -> tuple[np.ndarray, np.ndarray]:
        """State and action, (T, 7) float32 each, of every step of the source: x, y, z, roll, pitch, yaw, gripper.

        Raises:
            IntegrityError: they are damaged or missing.
            MismatchError: they and the pictures differ in number.
        """
        ...

    def relabelled(self, raw: Path) -> bool:
        """Whether the publisher has applied the rules of `avrl.labels` already (see there)."""
        ...


# Top folder of the raw artifact -> the module that reads what lies there; also the order in which a copy is tried.
FORMS: Mapping[str, Form] = {"bridge_dataset": bridge_rlds, "lerobot": bridge_lerobot, "raw": bridge_raw}


def form(raw: Path) -> Form:
    """The form that lies in a raw artifact; RLDS if it is empty."""
    return next((one for folder, one in FORMS.items() if (raw / folder).is_dir()), bridge_rlds)


def local_files(folder: Path, parts: tuple[str, ...]) -> dict[str, Path]:
    """Whatever form the folder holds.

    Raises:
        NotFoundError: it holds none, or lacks a part.
    """
    for one in FORMS.values():
        found = one.local_files(folder, parts)
        if found:
            return found
    raise NotFoundError(
        f"{folder} has no Bridge V2: no bridge_dataset/1.0.0/*.tfrecord-* shards, no meta/info.json, no raw zip",
        "name the folder above them",
    )


def chosen(names: list[str], tasks: tuple[str, ...], n_episodes: int) -> list[str]:
    """Shards hold trajectories of every task: there is nothing to choose before they are fetched.

    Raises:
        ConfigError: always.
    """
    raise ConfigError("bridge comes in shards of all tasks", "leave --task, --episodes and --stream out")


def survey(raw: Path) -> tuple[list[Episode], list[Dropped]]:
    """Every trajectory, in the form's own order."""
    return form(raw).survey(raw)


def frames(raw: Path, episode: Episode, view: View, scratch: Path) -> tuple[Episode, Iterator[np.ndarray]]:
    """Open a trajectory: its main camera's pictures, once its states and actions have proved whole.

    Raises:
        IntegrityError: damage, or images, states and actions that differ in number.
        DecodeError: a damaged picture (while iterating).
    """
    form(raw).robot(raw, episode)  # here, where it can be dropped: labels are made of what is left
    return form(raw).frames(raw, episode, view, scratch)


def robot(raw: Path, episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """State and action (T, 7) of every step; see `Form`."""
    return form(raw).robot(raw, episode)


def relabelled(raw: Path) -> bool:
    """Whether the form's publisher has applied the rules of `avrl.labels` already; see `Form`."""
    return form(raw).relabelled(raw)

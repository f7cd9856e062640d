"""LeRobotDataset v2.x or v3.x of whatever robot, as frames: one camera of every episode of a local folder.

A data set has no publisher here: ``avrl fetch lerobot --from DIR`` links a folder that holds ``meta/info.json``. The
camera is the first in ``info.json`` that is no dummy; depth maps are no cameras. A dummy (conversions fill absent
views with black) is told by content: in up to three episodes spread over the list its first picture is all one level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from avrl import stills, video
from avrl.episodes import Dropped, Episode, View
from avrl.errors import ConfigError, IntegrityError, NotFoundError
from avrl.lerobot import ACTION, INFO, STATE, Dataset, load

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from avrl.sources import Remote

ALL = "all"
BASE_URL = ""
PARTS: tuple[str, ...] = (ALL,)
DEFAULT_PARTS = PARTS
BYTES: Mapping[str, int] = {}
LICENCE = "LeRobot data set: as its own card says"
FOLDER = "lerobot"  # in the raw artifact: lerobot/<parts joined by -> is a link to the data set
SAMPLED = 3  # episodes looked at to tell a dummy camera
FLAT = 8  # levels between the darkest and the brightest of a dummy: video coding leaves a few


def remote_files(parts: tuple[str, ...]) -> list[Remote]:
    """There are none.

    Raises:
        ConfigError: always: it has no publisher.
    """
    raise ConfigError("a LeRobot data set has no address of its own", "type: avrl fetch lerobot --from DIR")


def local_files(folder: Path, parts: tuple[str, ...]) -> dict[str, Path]:
    """The folder itself, if it holds ``meta/info.json``.

    Raises:
        NotFoundError: it does not.
    """
    found = linked(folder, parts)
    if not found:
        raise NotFoundError(f"{folder} has no {INFO}", "name the folder above meta, data and videos")
    return found


def linked(folder: Path, parts: tuple[str, ...], known: tuple[str, ...] = PARTS) -> dict[str, Path]:
    """As `local_files`; empty if the folder is no data set. `known` are the parts that can be asked for.

    Raises:
        NotFoundError: the data set has no episode of a split that is asked for.
    """
    if not (folder / INFO).is_file():
        return {}
    data = load(folder)
    there = {ALL, *(data.split(index) for index in data.rows)}
    for part in parts:
        if part not in there:
            found = sorted(there - {ALL})
            typed = [one for one in known if one in there]
            raise NotFoundError(
                f"{folder} has no {part} episodes: its {INFO} names {', '.join(found) or 'no episode'}",
                f"try --part {','.join(typed)}" if typed else "its frames are: avrl fetch lerobot",
            )
    return {f"{FOLDER}/{'-'.join(parts)}": folder}


def chosen(names: list[str], tasks: tuple[str, ...], n_episodes: int) -> list[str]:
    """It comes in no zip: there is nothing to choose before it is linked.

    Raises:
        ConfigError: always.
    """
    raise ConfigError("a LeRobot data set comes in no zip", "leave --task, --episodes and --stream out")


def survey(raw: Path) -> tuple[list[Episode], list[Dropped]]:
    """Every episode of the splits asked for, by ``episode_index``; one whose files are not there is dropped."""
    episodes: list[Episode] = []
    dropped: list[Dropped] = []
    for place in sorted((raw / FOLDER).glob("*")):
        data = load(place)
        dropped += data.faults
        view = camera(data) if data.rows else ""
        for index in data.rows:
            name = f"episode {index}"
            try:
                split = data.split(index)
                if not {ALL, split} & set(place.name.split("-")):
                    continue
                shown = data.file(index, view if data.is_video(view) else "")
                missing = [one for one in (data.file(index), shown) if not (place / one).is_file()]
            except IntegrityError as error:
                dropped.append(Dropped(name, error.cause.replace(f"{place}/", "")))
                continue
            if missing:
                dropped.append(Dropped(name, f"has no {missing[0]}", "unpaired"))
                continue
            file = f"{FOLDER}/{place.name}/{shown}"
            episodes.append(Episode(len(episodes), name, "", "", split, 0, data.fps, file, member=view, offset=index))
    return episodes, dropped


def camera(data: Dataset) -> str:
    """The main camera's column: the first of which a picture shows something, or none can be read.

    Raises:
        IntegrityError: there is none that shows anything.
    """
    for name in data.cameras():
        there = [index for index in data.rows if _is_there(data, index, name)]
        flat = [_is_flat(data, index, name) for index in there[:: max(1, len(there) // SAMPLED)][:SAMPLED]]
        if flat and (False in flat or True not in flat):
            return name
    raise IntegrityError(
        f"{data.root / INFO} lists no camera whose clips are there and show anything", "fetch the data set's videos too"
    )


def _is_there(data: Dataset, index: int, name: str) -> bool:
    """Whether an episode's file is there; a path that is none is for its own episode to tell."""
    try:
        return (data.root / data.file(index, name if data.is_video(name) else "")).is_file()
    except IntegrityError:
        return True


def _is_flat(data: Dataset, index: int, name: str) -> bool | None:
    """Whether an episode's first picture is all one level; None if it is damaged, which its own episode will tell."""
    try:
        first: np.ndarray = next(pictures(data, index, name, View(64, "none")))
    except (IntegrityError, StopIteration):
        return None
    plane = (1, 2) if first.shape[-1] != 3 else (0, 1)
    return int(np.ptp(first, plane).max()) <= FLAT


def pictures(data: Dataset, index: int, name: str, view: View) -> Iterator[np.ndarray]:
    """Frames of one camera of an episode.

    Raises:
        IntegrityError: its rows or its time range are damaged.
        DecodeError: a picture is (while iterating).
    """
    path = data.root / data.file(index, name if data.is_video(name) else "")
    words, stride = f"{path} (episode {index})", view.stride(data.fps, str(path))
    if not data.is_video(name):
        return stills.decode(data.pictures(index, name)[::stride], view, words, stride)
    length, start = data.rows[index]["length"], data.start(index, name)
    return video.Clip(path, words).decode(view, length=length, fps=data.fps, start=start)


def dataset(raw: Path, episode: Episode) -> Dataset:
    """The data set that an episode is of."""
    return load(raw / "/".join(episode.file.split("/")[:2]))


def names_of(data: Dataset, column: str) -> list[str]:
    """Names of a column's numbers, lower case: a list, lists in groups or under a word, or a table name -> place.

    Empty if nothing is said; what is said in another shape stays as it is, to be refused.
    """
    said = data.features.get(column, {}).get("names")
    found = []
    for one in _listed(said):
        found += _listed(one)
    return [str(one).lower() for one in found]


def _listed(said: Any) -> list[Any]:
    """What a list, a table of groups or a table name -> place holds, in order; anything else is one name."""
    if isinstance(said, dict):
        places = list(said.values())
        if all(type(one) is int for one in places):
            return sorted(said, key=said.__getitem__) if sorted(places) == list(range(len(places))) else [str(said)]
        return places
    return said if isinstance(said, list) else [] if said is None else [said]


def frames(raw: Path, episode: Episode, view: View, scratch: Path) -> tuple[Episode, Iterator[np.ndarray]]:
    """Open an episode: its frames, of which there are as many as it has rows.

    Raises:
        IntegrityError: its rows, its time range or its task are damaged, or a state or an action is no number.
        MismatchError: they differ in length.
        DecodeError: a damaged clip or picture (while iterating).
    """
    data, index = dataset(raw, episode), episode.offset
    data.table(index, ())  # a clip alone does not say how many frames the robot saw
    for column in (STATE, ACTION):
        shape = data.features.get(column, {}).get("shape")
        if isinstance(shape, list) and len(shape) == 1:  # of others no labels are made
            data.numbers(index, column)  # here, where it can be dropped: labels are made of what is left
    language = data.language(index)
    stride = view.stride(data.fps, str(raw / episode.file))
    opened = episode.opened(data.rows[index]["length"], data.fps, stride, language=language)
    return opened, pictures(data, index, episode.member, view)

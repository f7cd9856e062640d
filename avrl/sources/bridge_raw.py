"""Bridge V2 as recorded: ``demos_8_17.zip`` and ``scripted_6_18.zip``, or the same unpacked; 640x480 JPEG at 5 Hz.

A trajectory is ``.../<date>/raw/traj_group<i>/traj<j>/`` with ``images0/im_<n>.jpg``, ``obs_dict.pkl`` (states),
``policy_out.pkl`` (actions) and ``lang.txt``. Three rules are those of the official converters: of data before
2021-07-23 the camera lagged by a step (the first observation and the last action go), folders named lmdb are none,
and the last step, after which nothing was commanded, gets an action of zeros, its gripper too.
Nothing is unpacked. Every worker holds a zip's directory, some 800 bytes a member: 5 GB where there are six million.

The published shards' pictures are these squeezed to 256x256: ``avrl prep bridge --crop none`` shows the same.
"""

from __future__ import annotations

import functools
import hashlib
import re
import zipfile
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from avrl import pickles, stills, zips
from avrl.episodes import Dropped, Episode
from avrl.errors import IntegrityError, MismatchError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from avrl.episodes import View

FOLDER = "raw"  # in the raw artifact: raw/<parts joined by ->/ holds links to the zips, or to the unpacked folder
ZIPS = ("demos_8_17.zip", "scripted_6_18.zip")
UNPACKED = "unpacked"
DEEPEST = 8  # folders above a trajectory's raw/
FPS = 5.0
LONGEST = 100_000  # steps; the longest trajectory has some hundreds
LIMIT = 64 * 2**20  # bytes of a member: a picture is far smaller
PICKLE_LIMIT = 4 * 2**20  # a trajectory's is far smaller, and a byte of it may ask for 200 bytes of memory
TRAJECTORY = re.compile(r"(?:(.*)/)?([^/]+)/raw/traj_group(\d{1,9})/traj(\d{1,9})(?:/(.+)|\.tar)?", re.ASCII)
PICTURE = re.compile(r"images0/im_(\d{1,9})\.jpg", re.ASCII)
STATES, ACTIONS, LANGUAGE = "obs_dict.pkl", "policy_out.pkl", "lang.txt"
LAGGED_BEFORE = datetime(2021, 7, 23)
AGAIN = "fetch it again, or list it as dropped with --on-error drop"


@dataclass(frozen=True)
class Place:
    """A zip, or a folder with what was in it; names are relative to either."""

    path: Path

    def names(self) -> list[str]:
        """Every file's name."""
        if self.path.is_dir():
            return [one.relative_to(self.path).as_posix() for one in self.path.rglob("*") if one.is_file()]
        return _archive(self.path).namelist()

    def read(self, name: str) -> bytes:
        """A file's bytes.

        Raises:
            IntegrityError: it is missing, damaged or too large.
        """
        limit = PICKLE_LIMIT if name.endswith(".pkl") else LIMIT
        if self.path.is_dir():
            path = self.path / name
            if not path.is_file() or path.stat().st_size > limit:
                raise IntegrityError(f"{path} is not there, or larger than {limit} bytes", AGAIN)
            return path.read_bytes()
        return zips.read_member(_archive(self.path), name, limit)

    def called(self, name: str) -> str:
        """A file's name for errors."""
        return str(self.path / name) if self.path.is_dir() else f"{self.path}:{name}"


@functools.lru_cache(maxsize=2)
def _archive(path: Path) -> zipfile.ZipFile:
    """An open zip a worker: reading a directory of millions of members takes a while."""
    return zipfile.ZipFile(path)


@functools.lru_cache(maxsize=2)
def _contents(path: Path) -> dict[str, list[str]]:
    """Trajectory -> the names of its files that are read here, pictures in the order of their numbers."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in Place(path).names():
        match = TRAJECTORY.fullmatch(name)
        if not match or "lmdb" in name:
            continue
        rest = match[5] or ""
        picture = PICTURE.fullmatch(rest)
        if picture or rest in (STATES, ACTIONS, LANGUAGE):
            stem = name.removesuffix(f"/{rest}")
            found.setdefault(stem, []).append((int(picture[1]) if picture else -1, name))
        elif name.endswith(".tar"):
            found.setdefault(name, [])
        else:
            found.setdefault(name.removesuffix(f"/{rest}"), [])
    return {stem: [name for _, name in sorted(files)] for stem, files in found.items()}


def local_files(folder: Path, parts: tuple[str, ...]) -> dict[str, Path]:
    """The zips by their published names, or the folder above unpacked trajectories; empty if there is neither."""
    inside = f"{FOLDER}/{'-'.join(parts)}"
    found = {f"{inside}/{name}": folder / name for name in ZIPS if (folder / name).is_file()}
    if found:
        return found
    unpacked = any(next(folder.glob("*/" * deep + "raw/traj_group*/traj*"), None) for deep in range(1, DEEPEST + 1))
    return {f"{inside}/{UNPACKED}": folder} if unpacked else {}


def survey(raw: Path) -> tuple[list[Episode], list[Dropped]]:
    """Every trajectory, by folder and number; one without pictures, states or actions is dropped.

    Raises:
        NotFoundError: a zip or the folder is gone.
        IntegrityError: a zip is damaged or hostile.
    """
    episodes: list[Episode] = []
    dropped: list[Dropped] = []
    for place in sorted((raw / FOLDER).glob("*/*")):
        wanted = place.parent.name.split("-")
        if not place.exists():
            raise NotFoundError(f"{place.resolve()} is gone, or was moved", "fetch --from DIR again")
        if not place.is_dir():
            zips.check(place)
        for stem, files in sorted(_contents(place).items(), key=lambda one: _order(one[0])):
            why = _fault(stem, files)
            split = _split(stem)
            if why:
                dropped.append(Dropped(stem, why, "unpaired"))
            elif split in wanted:
                file = place.relative_to(raw).as_posix()
                episodes.append(Episode(len(episodes), stem, "", "", split, 0, FPS, file, member=stem))
    return episodes, dropped


def _order(stem: str) -> tuple[Any, ...]:
    match = TRAJECTORY.fullmatch(stem)
    return (match[1] or "", match[2], int(match[3]), int(match[4]), stem) if match else (stem,)


def _fault(stem: str, files: list[str]) -> str:
    """Why a trajectory cannot be one; empty if it can."""
    if stem.endswith(".tar"):
        return "is a copy of the trajectory beside it"
    there = {name.removeprefix(f"{stem}/") for name in files}
    missing = [f"no {name}" for name in (STATES, ACTIONS) if name not in there]
    missing += ["no pictures"] * (not any(PICTURE.fullmatch(name) for name in there))
    missing += ["no date in its path, so whether its camera lagged is not known"] * (_date(stem) is None)
    return f"has {missing[0]}" if missing else ""


def _date(stem: str) -> datetime | None:
    match = TRAJECTORY.fullmatch(stem)
    try:
        return datetime.strptime(match[2], "%Y-%m-%d_%H-%M-%S") if match else None
    except ValueError:
        return None


def _split(stem: str) -> str:
    """``val`` for one trajectory in ten, by a hash of its path from the date on: the zips fix no split.

    It is not the split of the RLDS shards, which a random draw made.
    """
    words = "/".join(stem.split("/")[-4:])
    return "val" if hashlib.sha256(words.encode()).digest()[0] * 10 < 256 else "train"


def robot(raw: Path, episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """State and action (T, 7) of every step.

    Raises:
        IntegrityError: a pickle is damaged, hostile, or holds other things.
        MismatchError: pictures, states and actions differ in number.
    """
    place, stem = Place(raw / episode.file), episode.member
    name = place.called(stem)
    held = pickles.load(place.read(f"{stem}/{STATES}"), place.called(f"{stem}/{STATES}"))
    state = _vectors(held.get("full_state") if isinstance(held, dict) else None, f"{name}/{STATES}: full_state")
    steps = pickles.load(place.read(f"{stem}/{ACTIONS}"), place.called(f"{stem}/{ACTIONS}"))
    if isinstance(steps, list):
        steps = [one.get("actions") if isinstance(one, dict) else one for one in steps]
    action = _vectors(steps, f"{name}/{ACTIONS}: actions")
    n_pictures = len(_pictures(raw, episode, every=True))
    if len(state) != n_pictures or len(action) not in (len(state) - 1, len(state)):
        raise MismatchError(f"{name}: {n_pictures} pictures, {len(state)} states, {len(action)} actions", AGAIN)
    if _lagged(stem):
        state, action = state[1:], action[:-1]
    if len(action) < len(state):
        action = np.concatenate([action, np.zeros((1, 7), np.float32)])
    return state, action


def relabelled(raw: Path) -> bool:
    """Never: the pickles hold what was commanded."""
    return False


def _lagged(stem: str) -> bool:
    date = _date(stem)
    return date is not None and date < LAGGED_BEFORE


def _vectors(found: Any, name: str) -> np.ndarray:
    """(T, 7) float32 of an array, or of a list of arrays or lists of 7 numbers.

    Raises:
        IntegrityError: it is something else, or not finite.
    """
    rows = list(found.value) if isinstance(found, pickles.Array) and found.value.ndim == 2 else found
    good: list[list[float]] = []
    for row in rows if isinstance(rows, list) and len(rows) <= LONGEST else []:
        values = row.value.tolist() if isinstance(row, pickles.Array) else row
        values = values.tolist() if isinstance(values, np.ndarray) else values
        if not (isinstance(values, list | tuple) and len(values) == 7 and all(type(v) in (int, float) for v in values)):
            good = []
            break
        good.append(list(values))
    try:
        with np.errstate(over="ignore"):
            numbers = np.array(good, np.float64).astype(np.float32).reshape(-1, 7)
    except OverflowError:  # an integer of hundreds of digits
        numbers = np.empty((0, 7), np.float32)
    if len(numbers) < 2 or not np.isfinite(numbers).all():
        raise IntegrityError(f"{name} is not two or more vectors of 7 finite numbers", AGAIN)
    return numbers


def _pictures(raw: Path, episode: Episode, *, every: bool = False) -> list[str]:
    """Names of a trajectory's pictures in their order, without the one before the camera caught up unless every."""
    stem = episode.member
    names = _contents(raw / episode.file).get(stem, [])
    names = [one for one in names if PICTURE.fullmatch(one.removeprefix(f"{stem}/"))]
    return names if every or not _lagged(stem) else names[1:]


def frames(raw: Path, episode: Episode, view: View, scratch: Path) -> tuple[Episode, Iterator[np.ndarray]]:
    """Open a trajectory: the pictures of its first camera, cropped and scaled by area averaging.

    Raises:
        IntegrityError: the instruction's checksum, or the view's rate.
        DecodeError: a damaged picture (while iterating).
    """
    place, stem = Place(raw / episode.file), episode.member
    name = place.called(stem)
    stride = view.stride(FPS, name)
    names = _pictures(raw, episode)
    language = _language(place, stem) if f"{stem}/{LANGUAGE}" in _contents(place.path).get(stem, []) else ""
    opened = episode.opened(len(names), FPS, stride, language=language)
    return opened, stills.decode((place.read(one) for one in names[::stride]), view, f"{name}/images0", stride)


def _language(place: Place, stem: str) -> str:
    """The first line of the instructions; the annotators' confidence is on lines of its own."""
    lines = place.read(f"{stem}/{LANGUAGE}").decode(errors="replace").splitlines()
    return next((line.strip() for line in lines if line.strip() and "confidence" not in line), "")

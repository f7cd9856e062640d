"""EgoDex: zips of ``<part>/<task>/<n>.mp4`` + ``<n>.hdf5``, 1920x1080 at 30 Hz, 194 tasks of two hands.

Source: Hoque et al. 2025, "EgoDex: Learning Dexterous Manipulation from Large-Scale Egocentric Video",
arXiv:2505.11709. Sizes are Content-Lengths that users of the data published; ``extra``'s is not known.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import itertools
import re
import uuid
import zipfile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from avrl import remotezip, video, zips
from avrl.episodes import Dropped, Episode
from avrl.errors import IntegrityError, MismatchError, NotFoundError
from avrl.sources import Remote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import h5py

    from avrl.episodes import View
    from avrl.remotezip import RemoteZip

BASE_URL = "https://ml-site.cdn-apple.com/datasets/egodex/"
BYTES = {
    "part1": 321_588_941_964,
    "part2": 327_274_733_628,
    "part3": 326_263_668_370,
    "part4": 329_365_549_875,
    "part5": 331_277_374_642,
    "test": 17_304_529_397,
}
PARTS = (*BYTES, "extra", "sample")
DEFAULT_PARTS = ("part1",)
LICENCE = "EgoDex: CC-BY-NC-ND 4.0 (non-commercial; do not redistribute frames, stores or other derivatives)"
AGAIN = "fetch the part again, or list it as dropped with --on-error drop"
SAMPLE_LICENCE = "avrl sample: rendered from Meta-World (MIT)"


def remote_files(parts: tuple[str, ...]) -> list[Remote]:
    """One zip a part."""
    return [Remote(f"{part}.zip", BYTES.get(part)) for part in parts]


def local_files(folder: Path, parts: tuple[str, ...]) -> dict[str, Path]:
    """``<part>.zip`` as published, or the same unpacked as ``<part>/<task>/<n>.mp4``.

    Raises:
        NotFoundError: a part is there in neither form.
    """
    found = {}
    for part in parts:
        zipped, unpacked = folder / f"{part}.zip", folder / part
        if zipped.is_file():
            found[zipped.name] = zipped
        elif unpacked.is_dir():
            found[part] = unpacked
        else:
            raise NotFoundError(f"{folder} has neither {part}.zip nor {part}/", "name the folder that holds them")
    return found


def chosen(names: list[str], tasks: tuple[str, ...], n_episodes: int) -> list[str]:
    """The members of some episodes, clip and poses: of these tasks, and so many, spread evenly over the tasks.

    Args:
        names: Members of a part's zip.
        tasks: Names of tasks; empty means all.
        n_episodes: How many; 0 means all.

    Raises:
        NotFoundError: there is no such task; the message names those that are like it.
    """
    clips: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = re.fullmatch(r"(?:.*/)?([^/]+)/(\d{1,9})\.mp4", name, re.ASCII)
        if match:
            clips.setdefault(match[1], []).append((int(match[2]), name))
    for task in tasks:
        if task not in clips:
            like = difflib.get_close_matches(task, clips, 3, 0.4) or sorted(clips)[:3]
            raise NotFoundError(f"there is no task {task!r} among {len(clips)}", f"try one of: {', '.join(like)}")
    turns = itertools.zip_longest(*(sorted(clips[task]) for task in sorted(tasks or clips)))
    wanted = [one[1] for turn in turns for one in turn if one][: n_episodes or None]
    there = set(names)
    return sorted(name for clip in wanted for name in (clip, clip.removesuffix(".mp4") + ".hdf5") if name in there)


def survey(raw: Path) -> tuple[list[Episode], list[Dropped]]:
    """Pairs of ``<n>.mp4`` and ``<n>.hdf5`` in every zip or unpacked part; a clip or a pose file alone is dropped."""
    found: list[tuple[tuple[str, str, int], str, str, int]] = []
    dropped: list[Dropped] = []
    for place in _places(raw):
        names = {name: n for name, n in _sizes(place).items() if PurePosixPath(name).suffix in (".mp4", ".hdf5")}
        stems = {str(PurePosixPath(name).with_suffix("")) for name in names}
        for stem in stems:
            part, task, number = stem.split("/")[-3:] if stem.count("/") >= 2 else ("", "", "")
            missing = [ext for ext in (".mp4", ".hdf5") if stem + ext not in names]
            if missing or not re.fullmatch(r"\d{1,9}", number, re.ASCII):
                why = f"has no {missing[0]} beside it" if missing else "is not <part>/<task>/<n>"
                dropped.append(Dropped(stem, why, "unpaired"))
            else:
                found.append(((part, task, int(number)), place.name, stem, names[stem + ".mp4"]))
    episodes = [
        Episode(index, stem, task, "", _split(part), 0, 0.0, file, stem + ".mp4", bytes=n_bytes)
        for index, ((part, task, _), file, stem, n_bytes) in enumerate(sorted(found))
    ]
    return episodes, sorted(dropped, key=lambda one: one.episode_id)


def _split(part: str) -> str:
    return "test" if part == "test" else "train"


def _places(raw: Path) -> list[Path]:
    """Zips, unpacked parts, and zips that stay where they are, under the name that they would have here."""
    there = [place for place in raw.iterdir() if not place.name.startswith(".")]
    gone = [place for place in there if not place.exists()]
    if gone:
        raise NotFoundError(
            f"{gone[0]} is gone: {gone[0].resolve()} is not there", "fetch it again from where it is now"
        )
    found = {place for place in there if place.is_dir() or place.suffix == ".zip"}
    found |= {place.with_suffix("") for place in there if place.suffix == remotezip.SUFFIX}
    return sorted(found)


def _sizes(place: Path) -> dict[str, int]:
    """Name -> bytes of everything in a place."""
    if place.is_dir():
        files = [path for path in place.glob("*/*") if path.is_file()]
        return {f"{place.name}/{path.relative_to(place).as_posix()}": path.stat().st_size for path in files}
    members = _remote(place).members if _is_remote(place) else zips.check(place)
    return {one.filename: one.file_size for one in members}


def frames(raw: Path, episode: Episode, view: View, scratch: Path) -> tuple[Episode, Iterator[np.ndarray]]:
    """Open a clip and its poses, straight out of the zip: at most one clip a worker lies unpacked, in scratch.

    Raises:
        IntegrityError: the zip's checksum, or the pose file.
        MismatchError: clip and poses differ in length.
        DecodeError: see `avrl.video`.
    """
    (clip_path, name), (pose_path, poses_name) = (_file(raw, episode, ending, scratch) for ending in (".mp4", ".hdf5"))
    poses, language, sure = _poses(pose_path, poses_name)
    clip = video.Clip(clip_path, name)
    if clip.frames != poses:
        raise MismatchError(f"{name}: the clip has {clip.frames} frames, its hdf5 has {poses} poses", AGAIN)
    stride = view.stride(clip.fps, name)
    opened = episode.opened(clip.frames, clip.fps, stride, language=language, task=episode.task, unsure=not sure)
    return opened, clip.decode(view)


def skeleton(
    raw: Path, episode: Episode, joints: tuple[str, ...], scratch: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What moved in an episode, at every frame of the source.

    Returns:
        The camera's pose in the world (T, 4, 4), z forward and y down; where J joints are in the world, in m (T, J, 3);
        how sure that is, 0 to 1 (T, J), NaN where it is not said. All float32.

    Raises:
        IntegrityError: the zip's checksum, or the pose file: it lacks a joint, or has not one pose a frame.
    """
    path, name = _file(raw, episode, ".hdf5", scratch)
    with _reading(path, name) as file:
        shape = (len(file["transforms/camera"]), 4, 4)
        camera = _array(file, "transforms/camera", shape, name)
        at = np.stack([_array(file, f"transforms/{joint}", shape, name)[:, :3, 3] for joint in joints], 1)
        sure = np.full(at.shape[:2], np.nan, np.float32)
        if "confidences" in file:
            for j, joint in enumerate(joints):
                sure[:, j] = np.nan_to_num(_array(file, f"confidences/{joint}", shape[:1], name))
    return camera, at, sure


def _array(file: h5py.File, key: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    """A data set of this shape.

    Raises:
        IntegrityError: it is not there, or of another shape.
    """
    found = np.asarray(file[key], np.float32) if key in file else None
    if found is None or found.shape != shape:
        said = "has no" if found is None else f"has {found.shape} numbers, not {shape}, in"
        raise IntegrityError(f"{name} {said} {key}", "fetch the part again")
    return found


def _file(raw: Path, episode: Episode, ending: str, scratch: Path) -> tuple[Path, str]:
    """A file of an episode and its name for errors: out of a zip it is put into scratch, over the one before."""
    place, member = raw / episode.file, str(PurePosixPath(episode.member).with_suffix(ending))
    if place.suffix != ".zip":
        return raw / member, str(raw / member)
    target = scratch / f"{_worker()}{ending}"
    if _is_remote(place):
        _remote(place).copy(member, target)
    else:
        zips.copy_member(_archive(place), member, target)
    return target, f"{place}:{member}"


def kind_of_task(raw: Path, row: Mapping[str, Any]) -> str:
    """What EgoDex says of the task of an episode (a row of ``episodes.parquet``): ``reversible``, ``reset`` ...

    Empty if its pose file does not say or is not here. A reversible task is done and undone, in as many episodes each.
    """
    import h5py

    place, member = raw / row["file"], str(PurePosixPath(row["member"]).with_suffix(".hdf5"))
    try:
        if place.suffix != ".zip":
            with h5py.File(raw / member, "r") as file:
                return str(file.attrs.get("llm_type", ""))
        if _is_remote(place):
            return ""
        with h5py.File(io.BytesIO(_archive(place).read(member)), "r") as file:
            return str(file.attrs.get("llm_type", ""))
    except (OSError, KeyError, NotFoundError):
        return ""


@functools.cache
def _worker() -> str:
    """A name for this process that no process of another machine has: they may share the scratch folder."""
    return uuid.uuid4().hex


@functools.lru_cache(maxsize=8)
def _archive(path: Path) -> zipfile.ZipFile:
    """An open zip a worker: reading a directory of 92,000 members takes longer than decoding a clip.

    Raises:
        NotFoundError: it is gone.
    """
    if not path.exists():
        raise NotFoundError(f"{path} is gone: {path.resolve()} is not there", "fetch it again, with --from if it moved")
    return zipfile.ZipFile(path)


def _is_remote(place: Path) -> bool:
    """Whether only this is here: where a zip lies."""
    return place.with_name(place.name + remotezip.SUFFIX).exists()


@functools.lru_cache(maxsize=8)
def _remote(path: Path) -> RemoteZip:
    """A zip that stays where it is; its directory is read once a worker."""
    return remotezip.RemoteZip.recall(path)


def _poses(path: Path, name: str) -> tuple[int, str, bool]:
    """Number of poses, the instruction, and whether ``confidences`` are there: absent means unknown, not zero."""
    with _reading(path, name) as file:
        attributes = dict(file.attrs)
        chosen = "2" if str(attributes.get("which_llm_description", "1")) == "2" else ""
        language = attributes.get(f"llm_description{chosen}", attributes.get("task", ""))
        return int(file["transforms/camera"].shape[0]), str(language), "confidences" in file


@contextlib.contextmanager
def _reading(path: Path, name: str) -> Iterator[h5py.File]:
    """An open pose file; what is wrong with it is told with its name.

    Raises:
        IntegrityError: it is damaged.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield file
    except IntegrityError:
        raise
    except (OSError, LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        words = str(error).replace(str(path), name)
        raise IntegrityError(f"{name} is no EgoDex pose file: {words}", AGAIN) from error

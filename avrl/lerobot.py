"""LeRobotDataset v2.x and v3.x, read from its own files: no path is assumed that ``meta/info.json`` gives.

v2.x keeps a parquet and a clip an episode, and lists episodes in ``meta/episodes.jsonl``; v3.x packs many into one
file, an episode being rows of the one and a time range of the other, and lists them in ``meta/episodes/**.parquet``.
Source: the format's published description and the ``meta`` folders of data sets on the hub.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from avrl.claims import AGAIN, filled, json_object, number, parquet, whole
from avrl.episodes import Dropped
from avrl.errors import IntegrityError, MismatchError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import polars as pl

INFO = "meta/info.json"
VERSION = re.compile(r"v([23])\.\d+")
SPLITS = ("test", "val", "train")  # an episode that several claim is that of the first: one held out by any is so
EVERYTHING = "all"  # names no split
PLACES = ("data/chunk_index", "data/file_index")
STATE, ACTION = "observation.state", "action"  # columns of what a robot did


@dataclass(frozen=True)
class Dataset:
    """What the ``meta`` folder says.

    Attributes:
        root: Folder that holds ``meta``.
        version: 2 or 3.
        fps: Frames per second.
        features: Name of a column -> its description (``dtype``, ``shape``, ``names``).
        info: All of ``meta/info.json``.
        rows: ``episode_index`` -> its line of the list of episodes.
        faults: Lines of the list that are none.
    """

    root: Path
    version: int
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    info: Mapping[str, Any]
    rows: Mapping[int, Mapping[str, Any]]
    faults: tuple[Dropped, ...]

    @functools.cached_property
    def frames(self) -> int:
        """Frames of all episodes as promised, by the list or, where that lacks lines, by ``info.json``."""
        said = self.info.get("total_frames")
        return max(sum(int(row["length"]) for row in self.rows.values()), said if type(said) is int else 0)

    def cameras(self) -> list[str]:
        """Columns of pictures, in the order of ``info.json``; depth maps are none."""
        kinds = {name: one.get("dtype") for name, one in self.features.items() if not _is_depth(one)}
        return [name for name, kind in kinds.items() if kind in ("video", "image")]

    def is_video(self, camera: str) -> bool:
        """Whether a camera's pictures are a clip, and not a column of PNG or JPEG files."""
        return bool(self.features[camera]["dtype"] == "video")

    def file(self, index: int, camera: str = "") -> str:
        """The file below the root that holds an episode's rows or, given a camera that is a clip, its clip.

        Raises:
            IntegrityError: ``info.json`` has no such path, or one that leaves the folder.
        """
        row, key = self.rows[index], "video_path" if camera else "data_path"
        prefix = f"videos/{camera}" if camera else "data"
        values: dict[str, Any] = {"episode_index": index, "video_key": camera}
        if self.version == 2:
            values["episode_chunk"] = index // whole(
                self.info.get("chunks_size"), f"{self.root / INFO}: chunks_size", 1
            )
        else:
            what = f"{self.root}: episode {index}: {prefix}"
            values |= {n: whole(row.get(f"{prefix}/{n}"), f"{what}/{n}") for n in ("chunk_index", "file_index")}
        return filled(self.info.get(key), values, f"{self.root / INFO}: {key}")

    def start(self, index: int, camera: str) -> float | None:
        """Time in s of an episode's first frame in its clip; None if it has the clip to itself.

        Raises:
            IntegrityError: the time range is none, or does not fit the episode's length.
        """
        if self.version == 2:
            return None
        row, what = self.rows[index], f"{self.root}: episode {index} of {camera}"
        begin, end = (
            number(row.get(f"videos/{camera}/{side}_timestamp"), f"{what}: {side}_timestamp", 0)
            for side in ("from", "to")
        )
        if abs((end - begin) * self.fps - row["length"]) > 1.5:  # some end with their last frame, some after it
            span = f"{end - begin:g} s at {self.fps:g} frames per second"
            raise MismatchError(f"{what} has {row['length']} frames in {span}", AGAIN)
        return begin

    def table(self, index: int, columns: tuple[str, ...]) -> pl.DataFrame:
        """These columns of an episode's rows, one a frame.

        Raises:
            IntegrityError: the file is damaged or lacks a column.
            MismatchError: the rows are not the episode's frames, each once.
        """
        import polars as pl

        path, names = self.root / self.file(index), ("episode_index", "frame_index", *columns)
        pictures = any(self.features.get(one, {}).get("dtype") == "image" for one in columns)
        found = parquet(path, names, index, most=self.frames) if pictures else _numbers(path, names, self.frames)
        rows = found.filter(pl.col("episode_index") == index).sort("frame_index")
        length = self.rows[index]["length"]
        if len(rows) != length or rows["frame_index"].to_list() != list(range(length)):
            raise MismatchError(
                f"{path}: episode {index} has {len(rows)} rows, which are not its {length} frames, each once", AGAIN
            )
        return rows

    def numbers(self, index: int, column: str) -> np.ndarray:
        """A column of vectors, (T, D) float32; of one number each, they may be plain numbers.

        Raises:
            IntegrityError: they are no vectors of one length of finite numbers; and as `table`.
        """
        found = self.table(index, (column,))[column].to_list()
        try:
            values = np.array(found, np.float32)
        except (ValueError, TypeError):
            values = np.full(1, np.nan, np.float32)
        if self.features.get(column, {}).get("shape") == [1] and values.ndim == 1:
            values = values[:, None]
        if values.ndim != 2 or not np.isfinite(values).all():
            raise IntegrityError(
                f"{self.root / self.file(index)}: {column} of episode {index} is no finite vectors", AGAIN
            )
        return values

    def pictures(self, index: int, camera: str) -> list[bytes]:
        """The PNG or JPEG files of a camera that is a column of pictures.

        Raises:
            IntegrityError: a row has none; and as `table`.
        """
        found = self.table(index, (camera,))[camera].to_list()
        held = [one.get("bytes") if isinstance(one, dict) else one for one in found]
        files = [one for one in held if isinstance(one, bytes)]
        if len(files) < len(held):
            raise IntegrityError(
                f"{self.root / self.file(index)}: {camera} of episode {index} has rows without a picture", AGAIN
            )
        return files

    def language(self, index: int) -> str:
        """The instruction: the first of the episode's own list, else by its first row's ``task_index``; may be empty.

        Raises:
            IntegrityError: it has neither.
        """
        named = self.rows[index].get("tasks")
        first = named[0] if isinstance(named, list) and named else named
        if isinstance(first, str):
            return first
        key = first if type(first) is int else self.table(index, ("task_index",))["task_index"][0]
        tasks = _tasks(self.root, self.version)
        if key not in tasks:
            raise IntegrityError(f"{self.root}: episode {index} has task {key}, which meta/tasks does not list", AGAIN)
        return tasks[key]

    def split(self, index: int) -> str:
        """``train``, ``val`` or ``test`` as ``info.json`` says; ``train`` if it does not.

        Data sets call what they hold out ``validation``, ``eval``, ``heldout`` and more: whatever is not called
        ``train...`` is held out, and what is called ``test...`` is the test.

        Raises:
            IntegrityError: a split is no range.
        """
        said = self.info.get("splits")
        claims = set()
        for name, span in (said if isinstance(said, dict) else {}).items():
            match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", str(span), re.ASCII)
            if not match:
                raise IntegrityError(f"{self.root / INFO}: split {name:.60} is {span!r:.60}, no range", AGAIN)
            if name != EVERYTHING and int(match[1]) <= index < int(match[2]):
                begins = [one for one in SPLITS if name.strip().lower().startswith(one)]
                claims.add(begins[0] if begins else "val")
        return next((one for one in SPLITS if one in claims), "train")


@functools.lru_cache(maxsize=4)
def load(root: Path) -> Dataset:
    """Read the ``meta`` folder of a data set.

    Raises:
        NotFoundError: it is not there (any more).
        IntegrityError: it is damaged, or of a version that is not read here.
    """
    path = root / INFO
    if not path.is_file():
        raise NotFoundError(
            f"{root.resolve()} has no {INFO}: its folder is gone, or was moved", "fetch --from DIR again"
        )
    info = json_object(path.read_bytes(), str(path))
    version = VERSION.fullmatch(str(info.get("codebase_version")))
    if not version:
        found = info.get("codebase_version")
        raise IntegrityError(
            f"{path} is of version {found!r:.60}; v2.x and v3.x are read", "convert it with lerobot's scripts"
        )
    fps, features = number(info.get("fps"), f"{path}: fps", 0.01), info.get("features")
    if not isinstance(features, dict) or not all(isinstance(one, dict) for one in features.values()):
        raise IntegrityError(f"{path}: features is no table of columns", AGAIN)
    rows: dict[int, Mapping[str, Any]] = {}
    faults = []
    for name, line in _lines(root) if version[1] == "2" else _episodes(root, features):
        try:
            row = json_object(line, name) if isinstance(line, bytes) else line
            index = whole(row.get("episode_index"), "episode_index")
            whole(row.get("length"), "length", 1)
            if index in rows:
                raise IntegrityError(f"episode {index} is there twice")
            rows[index] = row
        except IntegrityError as error:
            faults.append(Dropped(name, error.cause))
    promised = info.get("total_episodes", len(rows))
    if promised != len(rows) + len(faults):
        said = f"{len(rows) + len(faults)} episodes are listed, info.json counts {promised!r:.60}"
        faults.append(Dropped("meta", said, "mismatch"))
    return Dataset(root, int(version[1]), fps, features, info, dict(sorted(rows.items())), tuple(faults))


def _lines(root: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each line of v2.x's list of episodes."""
    path = root / "meta/episodes.jsonl"
    if not path.is_file():
        raise IntegrityError(f"{path} is not there", AGAIN)
    for at, line in enumerate(path.read_bytes().splitlines(), 1):
        yield f"meta/episodes.jsonl line {at}", line


def _episodes(root: Path, features: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each row of v3.x's list of episodes: only the columns that are read here."""
    paths = sorted((root / "meta/episodes").glob("**/*.parquet"))
    if not paths:
        raise IntegrityError(f"{root}/meta/episodes has no parquet", AGAIN)
    sides = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    videos = [
        f"videos/{name}/{side}" for name, one in features.items() if one.get("dtype") == "video" for side in sides
    ]
    wanted = ("episode_index", "length", "tasks", *PLACES, *videos)
    for path in paths:
        for at, row in enumerate(parquet(path, wanted, lacking=True).iter_rows(named=True)):
            yield f"{path.relative_to(root)} row {at}", row


@functools.lru_cache(maxsize=4)
def _tasks(root: Path, version: int) -> dict[int, str]:
    path = root / f"meta/tasks.{'jsonl' if version == 2 else 'parquet'}"
    if not path.is_file():
        raise IntegrityError(f"{path} is not there, and the episodes do not name their tasks", AGAIN)
    if version == 2:
        rows = [json_object(line, str(path)) for line in path.read_bytes().splitlines()]
    else:  # the instruction is pandas' index there, which mostly has no name
        table = parquet(path)
        words = [name for name, kind in table.schema.items() if str(kind) == "String"]
        known = [one for one in ("task", "__index_level_0__") if one in words]
        if "task_index" not in table.columns or not (known or len(words) == 1):
            raise IntegrityError(f"{path} does not say which column is the task: {', '.join(table.columns)}", AGAIN)
        rows = table.select("task_index", task=(known or words)[0]).to_dicts()
    return {row["task_index"]: str(row.get("task", "")) for row in rows if type(row.get("task_index")) is int}


@functools.lru_cache(maxsize=4)
def _numbers(path: Path, columns: tuple[str, ...], most: int) -> pl.DataFrame:
    """Columns of all episodes of a file: they are small, and the next episode is in the same file."""
    return parquet(path, columns, most=most)


def _is_depth(feature: Mapping[str, Any]) -> bool:
    said = feature.get("info") or feature.get("video_info") or {}
    return isinstance(said, dict) and bool(said.get("video.is_depth_map"))

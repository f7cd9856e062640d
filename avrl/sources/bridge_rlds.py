"""Bridge V2 as RLDS shards (``bridge_dataset/1.0.0``): 256x256 JPEG at 5 Hz, 7-D state and action.

Source: Walke et al. 2023, "BridgeData V2", arXiv:2308.12952; the shards are those that OpenVLA and Octo read
(1,024 of train, 128 of val, 124 GB, 60,064 episodes). Sizes of single shards are not published.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from avrl import stills, tfrecord
from avrl.episodes import Dropped, Episode
from avrl.errors import IntegrityError, NotFoundError
from avrl.sources import Remote

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from avrl.episodes import View

FOLDER = "bridge_dataset/1.0.0"
SHARDS = {"train": 1024, "val": 128}
RECORDS = "tfrecord-?????-of-?????"  # and no more: downloaders add .part, .tmp or .1 to what they have not finished
DESCRIPTIONS = ("dataset_info.json", "features.json")
FPS = 5.0
CAMERA = "image_0"  # the main view; image_1..3 are black dummies in most episodes, whatever has_image_* says


def remote_files(parts: tuple[str, ...]) -> list[Remote]:
    """The shards of these splits, under TFDS's names, and the two files that describe them."""
    names = [
        f"bridge_dataset-{part}.tfrecord-{index:05d}-of-{SHARDS[part]:05d}"
        for part in parts
        for index in range(SHARDS[part])
    ]
    return [Remote(f"{FOLDER}/{name}") for name in [*DESCRIPTIONS, *names]]


def local_files(folder: Path, parts: tuple[str, ...]) -> dict[str, Path]:
    """Shards below ``folder``, below its ``bridge_dataset/1.0.0``, or a mirror's subset of them; empty if it has none.

    The two files that describe them come along where they are, so that a copy and a mirror give the same artifact.

    Raises:
        NotFoundError: a split has no shard there.
    """
    for place in (folder, folder / "1.0.0", folder / FOLDER):
        found = {part: sorted(place.glob(f"*-{part}.{RECORDS}")) for part in parts}
        if any(found.values()):
            for part, shards in found.items():
                if not shards:
                    raise NotFoundError(f"{place} has no *-{part}.tfrecord-* shard", "fetch that split too")
            files = [place / name for name in DESCRIPTIONS if (place / name).is_file()]
            files += [one for shards in found.values() for one in shards]
            return {f"{FOLDER}/{one.name}": one for one in files}
    return {}


def survey(raw: Path) -> tuple[list[Episode], list[Dropped]]:
    """Every record of every shard, in the order of shard names; a shard's unreadable rest is dropped by name."""
    episodes: list[Episode] = []
    dropped: list[Dropped] = []
    for path in sorted((raw / FOLDER).glob(f"*.{RECORDS}")):
        split = path.name.split(".")[0].rsplit("-", 1)[-1]
        starts: list[int] = []
        try:
            for start in tfrecord.offsets(path):
                starts.append(start)
        except IntegrityError as error:
            dropped.append(Dropped(f"{path.name} from record {len(starts)} on", error.cause.replace(f"{raw}/", "")))
        for number, (start, end) in enumerate(pairwise([*starts, path.stat().st_size])):
            name, file = f"{path.name}#{number}", f"{FOLDER}/{path.name}"
            found = Episode(len(episodes), name, "", "", split, 0, FPS, file, offset=start, bytes=end - start)
            episodes.append(found)
    return episodes, dropped


def frames(raw: Path, episode: Episode, view: View, scratch: Path) -> tuple[Episode, Iterator[np.ndarray]]:
    """Open a record: its main camera's JPEGs, cropped and scaled by area averaging.

    Raises:
        IntegrityError: checksums, or there are no images.
        DecodeError: a damaged JPEG (while iterating).
    """
    record = steps(raw, episode)
    language = text(record, "steps/language_instruction")
    # The instruction is the only name of a task in these shards.
    name = f"{raw / episode.file}#{episode.offset}"
    stride = view.stride(FPS, name)
    jpegs = _jpegs(record, episode)
    opened = episode.opened(len(jpegs), FPS, stride, language=language)
    return opened, stills.decode(jpegs[::stride], view, name, stride)


def robot(raw: Path, episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """State and action (T, 7) of every step.

    Raises:
        IntegrityError: the record is damaged, or images, states and actions differ in number.
    """
    record = steps(raw, episode)
    return numbers(record, "observation/state", episode), numbers(record, "action", episode)


def relabelled(raw: Path) -> bool:
    """Never: the shards hold what was commanded."""
    return False


def steps(raw: Path, episode: Episode) -> dict[str, tfrecord.Feature]:
    """The features of an episode's record, by their names in the RLDS spec.

    Raises:
        IntegrityError: the record is damaged.
    """
    path = raw / episode.file
    return tfrecord.parse_example(tfrecord.read(path, episode.offset), f"{path}#{episode.offset}")


def numbers(record: dict[str, tfrecord.Feature], name: str, episode: Episode) -> np.ndarray:
    """A float feature of every step, (T, 7): RLDS stores the floats of a whole episode end to end.

    Raises:
        IntegrityError: it is missing or not 7 finite floats for each image.
    """
    found = record.get(f"steps/{name}")
    length = len(_jpegs(record, episode))
    floats = isinstance(found, np.ndarray) and found.dtype == np.float32
    if not (isinstance(found, np.ndarray) and floats and found.size == 7 * length and np.isfinite(found).all()):
        raise IntegrityError(f"{episode.file}#{episode.offset}: steps/{name} is not {length} x 7 finite floats")
    return found.reshape(length, 7)


def text(record: dict[str, tfrecord.Feature], name: str) -> str:
    """The first value of a text feature; empty if there is none."""
    found = record.get(name)
    return found[0].decode(errors="replace") if isinstance(found, list) and found else ""


def _jpegs(record: dict[str, tfrecord.Feature], episode: Episode) -> list[bytes]:
    found = record.get(f"steps/observation/{CAMERA}")
    if not isinstance(found, list) or not found:
        raise IntegrityError(f"{episode.file}#{episode.offset} has no steps/observation/{CAMERA}")
    return found

"""Sources: one module each, from the published address to frames.

A source module is the whole knowledge of one data set's layout. `Source` says what it must offer; add a module
and a line in `SOURCES` (CONTRIBUTING.md has the three steps).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from avrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np

    from avrl.episodes import Dropped, Episode, View

SOURCES = {
    "egodex": "avrl.sources.egodex",
    "bridge": "avrl.sources.bridge",
    "lerobot": "avrl.sources.lerobot",
}
SAMPLED = ("egodex", "bridge")  # in whose layouts the bundled sample is
UNPUBLISHED = ("lerobot",)  # without an address to fetch from: only local copies
SAMPLE = Path(__file__).parent.parent / "sample"


@dataclass(frozen=True)
class Remote:
    """A published file: its name below the base address and its size in bytes, where that is published."""

    name: str
    bytes: int | None = None


class Source(Protocol):
    """What a source module offers.

    Attributes:
        PARTS: Names a user may ask for with ``--part``, and in the order of preference.
        DEFAULT_PARTS: What is fetched when nothing is asked for.
        BASE_URL: Address that the published files lie below; empty if there is no publisher, only local copies.
        BYTES: Published size in bytes of each part, where known.
        LICENCE: One line for the terminal and every manifest.
    """

    PARTS: tuple[str, ...]
    DEFAULT_PARTS: tuple[str, ...]
    BASE_URL: str
    BYTES: Mapping[str, int]
    LICENCE: str

    def remote_files(self, parts: tuple[str, ...]) -> list[Remote]:
        """The published files of these parts; also their names in the raw artifact.

        Raises:
            ConfigError: it has no publisher.
        """
        ...

    def local_files(self, folder: Path, parts: tuple[str, ...]) -> dict[str, Path]:
        """Name in the raw artifact -> file or folder of a local copy, for these parts.

        Raises:
            NotFoundError: the folder holds no such part in any known layout.
        """
        ...

    def chosen(self, names: list[str], tasks: tuple[str, ...], n_episodes: int) -> list[str]:
        """Of the members of a published zip, those of so many episodes of these tasks; 0 and () mean all.

        Raises:
            NotFoundError: there is no such task.
            ConfigError: this source does not come in zips.
        """
        ...

    def survey(self, raw: Path) -> tuple[list[Episode], list[Dropped]]:
        """List every episode of a raw artifact in sorted order, and what cannot be one. Opens no clip."""
        ...

    def frames(self, raw: Path, episode: Episode, view: View, scratch: Path) -> tuple[Episode, Iterator[np.ndarray]]:
        """Open an episode: what only its files tell (length, fps, language), and its frames to come.

        The frames are what `avrl.codec.encode` takes: uint8 RGB (image_size, image_size, 3), or JPEG's planes Y, Cb, Cr
        (3, image_size, image_size); in order, every one that the view keeps.

        Raises:
            IntegrityError: a file is damaged, or the view's rate does not fit.
            MismatchError: its files differ in length.
            DecodeError: fewer or more frames than promised, or a damaged one (while iterating).
        """
        ...


def source(name: str) -> Source:
    """The source module of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SOURCES:
        raise ConfigError(f"no source named {name!r}", f"known: {', '.join(SOURCES)}, sample")
    return cast("Source", importlib.import_module(SOURCES[name]))

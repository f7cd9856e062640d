"""The cache: ``<root>/<noun>/<slug>-<key>/``, a folder a stage. Any directory in it may be removed at any time.

Nothing here guesses "the newest": a reference names exactly one artifact, or the candidates are listed.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from avrl.artifact import MANIFEST, Artifact, load
from avrl.errors import DiskFullError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable

KEY_LENGTH = 12  # hex digits of the key in a directory's name: 48 bits, ample for one cache
PARTIAL = ".partial-"


@dataclass(frozen=True)
class Cache:
    """A folder of artifacts."""

    root: Path

    def path(self, stage: str, slug: str, key: str) -> Path:
        """Where the artifact of this key lives, once it is finished."""
        return self.root / stage / f"{slug}-{key[:KEY_LENGTH]}"

    def partial(self, stage: str, slug: str, key: str) -> Path:
        """Where the artifact of this key is built; a killed build goes on there."""
        return self.root / stage / f"{PARTIAL}{slug}-{key[:KEY_LENGTH]}"

    def find(self, stage: str, key: str) -> Artifact | None:
        """The finished artifact of this key, whatever its slug."""
        hits = [one for one in self.artifacts(stage) if one.manifest.key == key]
        return hits[0] if hits else None

    def artifacts(self, stage: str) -> list[Artifact]:
        """All finished artifacts of a stage, sorted by name."""
        folder = self.root / stage
        if not folder.is_dir():
            return []
        roots = sorted(one for one in folder.iterdir() if not one.name.startswith("."))
        return [load(one) for one in roots if (one / MANIFEST).is_file()]

    def resolve(
        self,
        stage: str,
        ref: str = "",
        *,
        where: Callable[[Artifact], bool] = lambda _: True,
        what: str = "",
        make: str = "",
        option: str = "",
    ) -> Artifact:
        """The one artifact that a reference means.

        Args:
            stage: Noun of the folder to look in.
            ref: A directory's name or what else `means` it, its key, or a path to it; empty means "the only one".
            where: Further condition on the artifact.
            what: What is looked for, in the user's words ("frames of egodex").
            make: Command that would make such an artifact, for the error line.
            option: Option that takes a reference, for the error line.

        Raises:
            NotFoundError: none fits, or more than one does; the candidates are listed.
        """
        what = what or stage
        fits = [one for one in self.artifacts(stage) if where(one)]
        if ref:
            name = ref.rstrip("/")
            exact = [one for one in fits if one.ref == name or one.root.resolve() == Path(name).resolve()]
            begins = [one for one in fits if means(name, one.ref) or one.manifest.key.startswith(name)]
            fits = exact or begins
        if len(fits) == 1:
            return fits[0]
        if not fits:
            named = f"no {what} named {ref!r}" if ref else f"no {what}"
            raise NotFoundError(f"{named} in {self.root.absolute()}", f"make it with: {make}" if make else "")
        names = ", ".join(one.ref for one in fits)
        raise NotFoundError(
            f"{what}: {len(fits)} fit in {self.root.absolute()}: {names}",
            f"name one with: {option} {fits[0].ref}" if option else "name one of them",
        )

    def _disk(self) -> Path:
        """The root, or the nearest folder above it that is there."""
        return next(folder for folder in (self.root, *self.root.absolute().parents) if folder.exists())

    def free(self) -> int:
        """Bytes free on the cache's disk."""
        return shutil.disk_usage(self._disk()).free

    def require_space(self, needed: int, what: str) -> None:
        """Refuse early what cannot fit on the cache's disk.

        Raises:
            DiskFullError: fewer bytes are free than needed, plus 1% for the file system's own use.
        """
        free = self.free()
        if needed * 1.01 > free:
            raise DiskFullError(
                f"{what} needs {size(needed)}, {self._disk()} has {size(free)} free",
                "name a larger disk with --cache DIR",
            )


def means(name: str, ref: str) -> bool:
    """Whether a name means a reference: the whole of it, its beginning, or beginning@end, as reports write it."""
    begin, _, end = name.partition("@")
    return bool(begin) and ref.startswith(begin) and ref.endswith(end)


def size(n_bytes: float) -> str:
    """Bytes in decimal units, as disks and download pages count: ``321.6 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"


def counted(n: int, what: str) -> str:
    """So many of something: ``1 file``, ``2,000 files``."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def hours(seconds: float) -> str:
    """A time as people say it: ``45 s``, ``12 min``, ``3.4 h``."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )

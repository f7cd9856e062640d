"""Holdings: what lies in a cache, how large and how old, what hangs on it, and what may be removed. Removes nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avrl.artifact import MANIFEST, load
from avrl.cache import PARTIAL, hours
from avrl.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from avrl.artifact import Artifact, Input
    from avrl.cache import Cache
    from avrl.lineage import Stock

STAGES = ("raw", "frames", "checkpoints", "features", "labels", "scores", "tables")  # in the order of the data's way
BETWEEN = ("features", "labels")  # made on the way to scores, and asked for by their parents alone
FINISHED, UNFINISHED, BUSY = "finished", "unfinished", "being made now"
DAMAGED, FOREIGN, COPY = "damaged", "not avrl's", "copy of a store in a bucket"
TRACKED, LOG = ("tensorboard", "wandb"), "a tracker's log of a run"  # of `avrl pretrain --tracker`, beside the stages
BROKEN, BEGUN, OLD = "damaged: avrl cannot use it", "begun and not finished", "older reports"
CHANGED = "made from something that was made again since, and came out different"
ORPHANED = "made from something that is gone"
UNUSED, SCORED = "features that no score here was made from yet", "features whose scores are done"
REASONS = (BROKEN, BEGUN, OLD, CHANGED, ORPHANED, UNUSED, SCORED)


@dataclass(frozen=True)
class Holding:
    """One folder in a cache.

    Attributes:
        place: Its path below the cache.
        state: One of the words above.
        bytes: What its files hold; of links that which they point to.
        freed: What the disk gets back if it is removed.
        changed: Seconds since the epoch: its manifest's time, or its newest file's.
        artifact: None if it is not finished.
        fault: What is wrong with it, in a line.
    """

    path: Path
    place: str
    state: str
    bytes: int
    freed: int
    changed: float
    artifact: Artifact | None = None
    fault: str = ""

    @property
    def stage(self) -> str:
        """The folder it lies in."""
        return self.place.split("/")[0]


@dataclass(frozen=True)
class Removable:
    """Something that may be removed: why, what that frees, what is lost, and the command that does it."""

    why: str
    place: str
    freed: int
    loss: str
    command: str


def survey(cache: Cache) -> list[Holding]:
    """Every folder of a cache, stage by stage, whatever its state."""
    folders = [one for one in cache.root.iterdir() if one.is_dir() and not one.name.startswith(".")]
    rank = {name: order for order, name in enumerate(STAGES)}
    found = []
    for folder in sorted(folders, key=lambda one: (rank.get(one.name, len(rank)), one.name)):
        here = [_holding(one, cache) for one in sorted(folder.iterdir()) if one.is_dir()]
        known = [one for one in here if one.state != FOREIGN]
        found += here if known or folder.name in STAGES else [_holding(folder, cache)]
    return found


def _holding(path: Path, cache: Cache) -> Holding:
    place, artifact, fault = path.relative_to(cache.root).as_posix(), None, ""
    if path.name.startswith(PARTIAL):
        state = BUSY if _locked(path) else UNFINISHED
    elif path.name.startswith("."):
        state = COPY if path.name.startswith(".s3-") else FOREIGN
    elif (path / MANIFEST).is_file():
        try:
            artifact, state = load(path), FINISHED
        except IntegrityError as error:
            state, fault = DAMAGED, error.cause.removeprefix(f"{path / MANIFEST} ").removeprefix("is damaged: ")
    elif path.parent.name in TRACKED:
        state = LOG
    else:
        state, fault = FOREIGN, "it has no manifest"
    n_bytes, freed, newest = _measured(path)
    if artifact:
        n_bytes, newest = artifact.bytes, (path / MANIFEST).stat().st_mtime
    return Holding(path, place, state, n_bytes, freed, newest, artifact, fault)


def _measured(root: Path) -> tuple[int, int, float]:
    """Bytes of a folder's files; bytes that removing it frees; time of its newest file, in seconds since the epoch.

    Links free nothing, and a file with a second name elsewhere neither; unfinished files are sparse.
    """
    stats = [root.lstat()]
    for folder, _, names in [] if root.is_symlink() else os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # somebody may be building there
                stats.append(Path(folder, name).lstat())
    names_here = Counter((one.st_dev, one.st_ino) for one in stats[1:])
    files = {(one.st_dev, one.st_ino): one for one in stats[1:]}
    freed = sum(one.st_blocks * 512 for inode, one in files.items() if names_here[inode] >= one.st_nlink)
    return sum(one.st_size for one in stats[1:]), freed, max(one.st_mtime for one in stats)


def _locked(partial: Path) -> bool:
    """Whether a process is building it, as far as this disk has locks."""
    with contextlib.suppress(FileNotFoundError), partial.with_name(partial.name + ".lock").open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def removable(holdings: list[Holding], stock: Stock) -> list[Removable]:
    """What may be removed, by reason; each thing once, for the first reason that it has.

    A product (checkpoint, scores) whose parent is gone is not among them: it is as good as before.
    """
    reports = [one for one in holdings if one.artifact and one.stage == "tables"]
    newest = max(reports, key=lambda one: one.changed, default=None)
    found = []
    for one in holdings:
        reason = _reason(one, stock, newest)
        if reason:
            found.append(Removable(reason[0], one.place, one.freed, reason[1], f"rm -r {quoted(one.path)}"))
    return sorted(found, key=lambda one: REASONS.index(one.why))


def _reason(one: Holding, stock: Stock, newest: Holding | None) -> tuple[str, str] | None:
    """Why something may be removed, and what is lost with it; None if it had better stay."""
    if one.state == DAMAGED:
        return BROKEN, one.fault
    if one.state == UNFINISHED:
        return BEGUN, "the same command would go on from there"
    if one.artifact is None:
        return None
    if one.stage == "tables":
        return (OLD, "nothing is lost: avrl report makes another") if one is not newest else None
    gone = [each for each in one.artifact.manifest.inputs if stock.find(each) is None]
    if any(stock.again(each) for each in gone):
        stays = "; its numbers leave the report" if one.stage == "scores" else ""
        return CHANGED, again(one.artifact, stock) + stays
    if gone and one.stage in BETWEEN:
        return ORPHANED, again(one.artifact, stock)
    if one.stage == "features":
        scored = any(each.manifest.stage == "scores" for each in stock.children(one.artifact))
        return SCORED if scored else UNUSED, again(one.artifact, stock)
    return None


def again(artifact: Artifact, stock: Stock) -> str:
    """In what time it can be made again, by what it took, or why it cannot."""
    gone = [each.role for each in artifact.manifest.inputs if stock.find(each) is None]
    took = hours(artifact.manifest.seconds)
    return f"cannot be made again as it is: no {', '.join(gone)}; it took {took}" if gone else f"made again in {took}"


def parents(artifact: Artifact, stock: Stock) -> Iterator[tuple[Input, str]]:
    """Each input, and whether it is ``there``, ``gone`` or ``changed`` (made again, with another result)."""
    for one in artifact.manifest.inputs:
        yield one, "there" if stock.find(one) else "changed" if stock.again(one) else "gone"


def quoted(path: Path) -> str:
    """A path as a shell takes it; one that no terminal should be shown, byte by byte."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(text))
    return f"$'{''.join(plain)}'"


def document(one: Holding, stock: Stock) -> dict[str, Any]:
    """A holding for a program."""
    found = {name: getattr(one, name) for name in ("place", "state", "bytes", "freed", "changed", "fault")}
    found["path"] = str(one.path)
    if one.artifact:
        manifest = one.artifact.manifest
        found |= {"stage": manifest.stage, "key": manifest.key, "digest": manifest.digest, "seconds": manifest.seconds}
        found["made_from"] = [asdict(each) | {"state": state} for each, state in parents(one.artifact, stock)]
        found["used_by"] = [child.ref for child in stock.children(one.artifact)]
    return found

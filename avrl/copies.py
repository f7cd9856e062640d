"""Copies that are linked where they lie, and whether what lies there is still what was linked.

A folder is known by names, sizes and times of change of its files: that is a listing, and nothing is read (300,000
files: 2 s on a local disk). So a change is missed that keeps a file's size and its time, and one of a picture that is
overwritten in a folder of pictures (`BULK`: Bridge V2 unpacked has six million): such a folder counts by its own time,
which moves when a picture comes, goes or is replaced by another file. Hidden files are no data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
from typing import TYPE_CHECKING, Any

from avrl.artifact import MANIFEST, sha256_of
from avrl.cache import Cache
from avrl.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from avrl.artifact import Artifact, File

    Listing = Mapping[str, tuple[int, int]]

log = logging.getLogger(__name__)

BULK = re.compile(r"(depth_)?images\d*")
STATE = "folder"  # the field of a raw artifact's config that says what its links led to


def listing(files: Mapping[str, Path]) -> Listing:
    """Name in the raw artifact -> bytes and time of change (ns) of all files below these; what is gone is left out.

    The name of a folder of pictures ends in a slash.
    """
    found = {}
    for name, top in files.items():
        if top.is_file():
            found[name] = _look(str(top))
        for here, inner, names in os.walk(top, followlinks=True):
            below = f"{name}{here.removeprefix(str(top))}/"
            found |= {f"{below}{one}/": _look(f"{here}/{one}") for one in inner if BULK.fullmatch(one)}
            inner[:] = [one for one in inner if not (one.startswith(".") or BULK.fullmatch(one))]
            for one in names:
                if not one.startswith("."):
                    with contextlib.suppress(FileNotFoundError):  # a link that leads nowhere
                        found[below + one] = _look(f"{here}/{one}")
    return found


def _look(path: str) -> tuple[int, int]:
    found = os.stat(path)  # noqa: PTH116 - a `Path` for each of 300,000 files takes longer than the call
    return (0 if stat.S_ISDIR(found.st_mode) else found.st_size), found.st_mtime_ns


def state(files: Mapping[str, Path]) -> str:
    """A `listing` in short, for a key: how many files and bytes, and 12 hex digits of all of it."""
    return _short(listing(files))


def _short(found: Listing) -> str:
    digest = hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()
    return f"{len(found)} files, {sum(n_bytes for n_bytes, _ in found.values())} bytes, {digest[:12]}"


def linked(raw: Artifact) -> dict[str, Path]:
    """The links of a raw artifact by their names, as `listing` takes them; empty if it holds its files itself."""
    config = raw.manifest.config
    if not str(config.get("origin", "")).startswith("/") or config.get("task") or config.get("episodes"):
        return {}
    return {one.name: one for one in sorted(raw.root.iterdir()) if one.name != MANIFEST}


def changes(raw: Artifact, now: Listing) -> list[str]:
    """Names of what was added, removed or changed since a raw artifact was made, as far as its manifest can tell."""
    known, made = _files(raw), _made(raw)
    there = {one for one in now if not one.endswith("/")}
    sizes = {one for one in there & known.keys() if known[one].bytes != now[one][0]}
    return sorted((there ^ {one for one in known if not _pictures(one)}) | sizes | _later(now, made))


def _files(raw: Artifact) -> dict[str, File]:
    return {one.path: one for one in raw.manifest.files if not any(word[0] == "." for word in one.path.split("/"))}


def _made(raw: Artifact) -> int:
    return (raw.root / MANIFEST).stat().st_mtime_ns


def _later(now: Listing, made: int) -> set[str]:
    return {one for one, (_, at) in now.items() if at > made}


def _pictures(name: str) -> str:
    """The folder of pictures that a file is in, as a listing has it; empty if it is in none."""
    words = name.split("/")
    return next(("/".join(words[: n + 1]) + "/" for n, one in enumerate(words[:-1]) if BULK.fullmatch(one)), "")


def words(raw: Artifact, names: Iterable[str]) -> str:
    """One line of what changed behind a raw artifact's links, for the user."""
    first, *others = [*names] or ["the times of its files"]
    more = f" and {len(others)} more" if others else ""
    return f"{raw.manifest.config['origin']} has changed since {raw.ref} was linked to it: {first}{more}"


def tell(cache: Cache, config: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Tell the user what changed since a folder was linked by the same request."""
    before = [one for one in cache.artifacts("raw") if _asked(one.manifest.config) == _asked(config)]
    if before:
        last = max(before, key=_made)
        names = changes(last, listing(files))
        if names or STATE in last.manifest.config:
            log.warning("%s: it is linked anew", words(last, names))


def outdated(raw: Artifact, cache: Cache) -> bool:
    """Whether a linked copy has changed, and has been linked again since."""
    links, config = linked(raw), raw.manifest.config
    others = [one.manifest.config for one in cache.artifacts("raw") if _asked(one.manifest.config) == _asked(config)]
    if not links or len(others) < 2:
        return False
    said = state(links)
    return config.get(STATE) != said and any(one.get(STATE) == said for one in others)


def _asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """A request without what the folder held."""
    return {name: value for name, value in config.items() if name != STATE}


def require_same(raw: Artifact) -> None:
    """Refuse to make anything of a linked copy that is not what it was: it would pass for made of what is gone.

    Where times alone say so, contents decide: a copy that was only touched is the same.

    Raises:
        IntegrityError: it has changed; the message names what, and what to type.
    """
    now, config = listing(linked(raw)), raw.manifest.config
    if not now:  # it is no link; or all is gone, which its source tells with where it was
        return
    said = _short(now)
    same = [one.manifest.config for one in Cache(raw.root.parent.parent).artifacts("raw") if one.digest == raw.digest]
    if any(one.get(STATE) == said for one in (config, *same)):
        return
    if STATE not in config and not changes(raw, now):  # made before that was kept
        return
    different = _different(raw, now)
    if different:
        part = ",".join(config["part"])
        raise IntegrityError(
            words(raw, sorted(different)),
            f"link it as it is now: avrl fetch {config['source']} --part {part} --from {config['origin']}",
        )


def _different(raw: Artifact, now: Listing) -> set[str]:
    """Names of files that were added, removed, or have another content; folders of pictures only if they moved."""
    moved = {one for one in _later(now, _made(raw)) if one.endswith("/")}
    known = {name: file for name, file in _files(raw).items() if _pictures(name) not in now.keys() - moved}
    there = {one for one in now if not one.endswith("/")}
    there |= {path.relative_to(raw.root).as_posix() for one in moved for path in (raw.root / one).rglob("*.*")}
    return (there ^ known.keys()) | {
        name
        for name in there & known.keys()
        if (raw.root / name).stat().st_size != known[name].bytes or sha256_of(raw.root / name) != known[name].sha256
    }

"""The stage ``raw``: a source's files as published, or links to a local copy of them.

Only the parts asked for are fetched. A finished file is never fetched again; an unfinished one goes on where
it stopped (`avrl.http`). Content is read only to see that a zip is whole and harmless (`avrl.zips`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote, urlsplit

from avrl.cache import Cache, size
from avrl.config import Opt
from avrl.errors import ConfigError
from avrl.sources import SAMPLE, source
from avrl.stage import Built, Inputs, Stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from avrl.sources import Remote

RATES = (25, 100)  # MB/s that a home line and a cluster see; a dry run gives the time for both


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Which files of which source, from where."""

    source: Annotated[str, Opt("Data set: a name in avrl.sources.SOURCES", hidden=True)] = "egodex"
    part: Annotated[tuple[str, ...], Opt("Parts: 1..5, test, extra; train, val for bridge; empty: 1, or both")] = ()
    origin: Annotated[str, Opt("Mirror's URL, or folder with a copy, which is linked", flag="--from")] = ""
    workers: Annotated[int, Opt("Ranges of a file fetched side by side", runtime=True)] = 4


def settled(config: FetchConfig) -> FetchConfig:
    """The same request in its one spelling, so that ``--part 1`` and ``--part part1`` have the same key.

    Raises:
        ConfigError: an unknown part, or an origin that is neither a plain URL nor a folder.
    """
    module = source(config.source)
    names = {f"part{name}" if f"part{name}" in module.PARTS else name for name in config.part}
    unknown = sorted(names - set(module.PARTS))
    if unknown:
        known = ", ".join(name.removeprefix("part") for name in module.PARTS)
        raise ConfigError(f"{config.source} has no part {unknown[0]!r}", f"known: {known}")
    parts = tuple(name for name in module.PARTS if name in names) or module.DEFAULT_PARTS
    origin = _origin(config.origin)
    if "sample" in parts and not origin:
        raise ConfigError("the sample is bundled, not published", "type: avrl fetch sample")
    if config.workers < 1:
        raise ConfigError(f"workers must be at least 1, got {config.workers}")
    return replace(config, part=parts, origin=origin)


def _origin(text: str) -> str:
    url = urlsplit(text)
    if text in ("", "sample"):
        return text
    if "://" not in text:
        return str(Path(text).expanduser().resolve())
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(
            f"--from {url.scheme}://{url.hostname or ''} is no address to fetch from", "http, https or DIR"
        )
    if url.query or "@" in url.netloc:
        raise ConfigError(
            f"--from {url.scheme}://{url.hostname} holds a query or password, and manifests keep it",
            "fetch it by other means, then --from DIR",
        )
    return text.rstrip("/") + "/"


def licence(config: FetchConfig) -> list[str]:
    """The licence lines of what a settled request fetches."""
    from avrl.sources import egodex

    bundled = config.origin == "sample"
    own = [] if bundled or config.part == ("sample",) else [source(config.source).LICENCE]
    return own + ([egodex.SAMPLE_LICENCE] if bundled or "sample" in config.part else [])


def expect(config: FetchConfig, cache: Cache) -> str:
    """What a dry run says of a settled request: files, bytes, time.

    Raises:
        NotFoundError: a local copy lacks a part.
        DiskFullError: the disk is too small.
    """
    module, key = source(config.source), STAGE.key(config, {})
    if cache.find(STAGE.name, key):
        return ""
    place = _place(config)
    if place:
        return f"{len(module.local_files(place, config.part))} files of {place} linked, nothing copied"
    n_files = len(module.remote_files(config.part))
    if config.origin:
        return f"{n_files} files; the mirror tells their sizes when asked"
    n_bytes = _require_space(config, cache, cache.partial(STAGE.name, _slug(config, {}), key))
    hours = ", ".join(f"{n_bytes / rate / 3.6e9:.1f} h at {rate} MB/s" for rate in RATES)
    return f"{n_files} files, {size(n_bytes)} to fetch: {hours}"


def _slug(config: FetchConfig, _: Inputs) -> str:
    return "-".join((config.source, *(("sample",) if config.origin == "sample" else config.part)))


def _place(config: FetchConfig) -> Path | None:
    """The local folder that is linked; None if the files come over HTTP."""
    if config.origin == "sample":
        return SAMPLE / "egodex" if config.source == "egodex" else SAMPLE
    return Path(config.origin) if config.origin.startswith("/") else None


def _build(config: FetchConfig, _: Inputs, folder: Path) -> Built:
    place = _place(config)
    parts: dict[str, Counter[str]] = {part: Counter() for part in config.part}
    for part, path in _link(config, place, folder) if place else _download(config, folder):
        parts[part].update(_count(path))
    kind = {"": "published", "sample": "sample"}.get(config.origin, "folder" if place else "mirror")
    totals = sum(parts.values(), Counter[str]())
    facts = {"origin": kind, **totals, "parts": {part: dict(+count) for part, count in parts.items()}}
    return Built(facts, licence(config))


def _link(config: FetchConfig, place: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Put links to a local copy's files where the published ones would lie."""
    module = source(config.source)
    for name, path in module.local_files(place, config.part).items():
        # A file counts for the part that its name says, what several share for the first of them.
        part = next((one for one in config.part if one in name), config.part[0])
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(path.absolute())
        yield part, link


def _download(config: FetchConfig, folder: Path) -> Iterator[tuple[str, Path]]:
    """Fetch the published files, one after the other, each in ranges side by side."""
    from avrl.http import download
    from avrl.progress import bar

    module = source(config.source)
    if not config.origin:
        _require_space(config, Cache(folder.parent.parent), folder)
    files: dict[str, tuple[str, Remote]] = {}
    for part in config.part:
        for file in module.remote_files((part,)):
            files.setdefault(file.name, (part, file))  # two splits may share the files that describe them
    with bar(_slug(config, {}), _total(config), "B", unit_scale=True) as shown:
        for name, (part, file) in files.items():
            download(
                (config.origin or module.BASE_URL) + quote(name),
                folder / name,
                # A mirror may hold another edition; only the publisher is held to the published sizes.
                expect_bytes=None if config.origin else file.bytes,
                workers=config.workers,
                progress=shown.update,
            )
            yield part, folder / name


def _total(config: FetchConfig) -> int | None:
    """Published bytes of the parts; None where they are not published."""
    sizes = source(config.source).BYTES
    return None if config.origin else sum(sizes.get(part, 0) for part in config.part) or None


def _require_space(config: FetchConfig, cache: Cache, partial: Path) -> int:
    """Bytes still to fetch by the published sizes, once the cache's disk has proved large enough for them."""
    there = sum(one.stat().st_blocks * 512 for one in partial.rglob("*") if one.is_file())  # parts are sparse
    missing = max(0, (_total(config) or 0) - there)
    cache.require_space(missing, _slug(config, {}))
    return missing


def _count(path: Path) -> dict[str, int]:
    """Files, bytes and clips of what has arrived; a zip is checked for wholeness and harm."""
    from avrl import zips

    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]
    zipped = path.suffix == ".zip"
    names = [one.filename for one in zips.check(path)] if zipped else [one.name for one in files]
    n_bytes = sum(one.stat().st_size for one in files)
    return {"files": len(files), "bytes": n_bytes, "clips": sum(name.endswith(".mp4") for name in names)}


STAGE = Stage(name="raw", version=1, config=FetchConfig, slug=_slug, build=_build)

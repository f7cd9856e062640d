"""The stage ``raw``: a source's files as published, links to a local copy of them, or only where they lie.

Only the parts asked for are fetched, or only some members of their zips (`avrl.members`). A finished file is never
fetched again; an unfinished one goes on where it stopped (`avrl.http`). Content is read only to see that a zip is whole
and harmless (`avrl.zips`), and to hold it to known checksums. A linked folder that has changed is another request.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

from avrl import copies
from avrl.addresses import origin_of, require_bucket
from avrl.artifact import SCRATCH
from avrl.cache import Cache, counted, hours, size
from avrl.config import AT_LEAST_0, AT_LEAST_1, Opt, as_json, require_ranges
from avrl.errors import ConfigError, IntegrityError
from avrl.locks import accept, listed, sums_of
from avrl.sources import SAMPLE, UNPUBLISHED, source
from avrl.stage import Built, Inputs, Stage

if TYPE_CHECKING:
    import zipfile
    from collections.abc import Iterable, Iterator

    from avrl.sources import Remote

RATES = (25, 100)  # MB/s that a home line and a cluster see; a dry run gives the time for both


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Which files of which source, from where."""

    source: Annotated[str, Opt("Data set: a name in avrl.sources.SOURCES", hidden=True)] = "egodex"
    part: Annotated[tuple[str, ...], Opt("Parts: 1..5, test, extra; train, val for bridge; empty: 1, or both")] = ()
    task: Annotated[tuple[str, ...], Opt("Only episodes of these tasks, out of the remote zip; empty: all")] = ()
    episodes: Annotated[int, Opt("Only so many episodes, spread evenly over the tasks; 0: all")] = 0
    origin: Annotated[str, Opt("Mirror (http, https, s3), or folder with a copy, which is linked", flag="--from")] = ""
    stream: Annotated[bool, Opt("Keep no zip, only where it lies", hidden=True)] = False
    price: Annotated[float, Opt("What this machine costs: --dry-run tells the money", unit="$/h", runtime=True)] = 0.0
    workers: Annotated[int, Opt("Ranges of a file fetched side by side", runtime=True)] = 4
    locked: Annotated[
        str, Opt("Hold files to the checksums in this file: sha256sum's, or an earlier fetch's manifest", runtime=True)
    ] = ""
    mirror: Annotated[str, Opt("Copy the artifact to s3://BUCKET/PREFIX, its manifest last", runtime=True)] = ""


@dataclass(frozen=True, kw_only=True)
class LinkedConfig(FetchConfig):
    """The same of a folder: what it holds now is part of what is asked, else its key would be its path alone."""

    folder: Annotated[str, Opt("Files, bytes, and a digest of names, sizes and times", hidden=True)] = ""


def settled(config: FetchConfig) -> FetchConfig:
    """The same request in its one spelling, so that ``--part 1`` and ``--part part1`` have the same key.

    Raises:
        ConfigError: an unknown part, an origin that is neither a plain URL nor a folder, or no folder of a LeRobot set.
        NotFoundError: the folder lacks a part.
    """
    module = source(config.source)
    names = {f"part{name}" if f"part{name}" in module.PARTS else name for name in config.part}
    unknown = sorted(names - set(module.PARTS))
    if unknown:
        known = ", ".join(name.removeprefix("part") for name in module.PARTS)
        raise ConfigError(f"{config.source} has no part {unknown[0]!r}", f"known: {known}")
    parts = tuple(name for name in module.PARTS if name in names) or module.DEFAULT_PARTS
    origin = origin_of(config.origin)
    if config.source in UNPUBLISHED and not origin.startswith("/"):
        module.remote_files(parts)  # refuses, before there is a partial folder
    if "sample" in parts and not origin:
        raise ConfigError("the sample is bundled, not published", "type: avrl fetch sample")
    require_ranges(config, {"workers": AT_LEAST_1, "episodes": AT_LEAST_0, "price": AT_LEAST_0})
    if config.stream and (origin.startswith("/") or origin == "sample"):
        raise ConfigError(f"{origin} is on this disk: nothing has to be streamed", "leave --stream out")
    if config.mirror:
        require_bucket(config.mirror)
    if config.task or config.episodes or config.stream:
        module.chosen([], (), 0)  # refuses where it makes no sense
    found = replace(config, part=parts, origin=origin, task=tuple(sorted(set(config.task))))
    if not origin.startswith("/"):
        return found
    return LinkedConfig(**{**vars(found), "folder": copies.state(module.local_files(Path(origin), parts))})


def licence(config: FetchConfig) -> list[str]:
    """The licence lines of what a settled request fetches."""
    from avrl.sources import egodex

    bundled = config.origin == "sample"
    own = [] if bundled or config.part == ("sample",) else [source(config.source).LICENCE]
    return own + ([egodex.SAMPLE_LICENCE] if bundled or "sample" in config.part else [])


def expect(config: FetchConfig, cache: Cache) -> str:
    """What a dry run says of a settled request: files, bytes, time.

    Raises:
        DiskFullError: the disk is too small.
    """
    module, key = source(config.source), STAGE.key(config, {})
    if cache.find(STAGE.name, key):
        return ""
    place = _place(config)
    partial = cache.partial(STAGE.name, _slug(config, {}), key)
    if _some(config) or config.stream:
        chosen = [one for members in _choice(config).values() for one in members]
        told = (
            f"{counted(sum(one.filename.endswith('.mp4') for one in chosen), 'clip')}, {size(_bytes(chosen))} to fetch"
        )
        if not config.stream:
            _require_room(config, chosen, cache, partial)
        kept = ", of which nothing is kept" if config.stream else ""
        return f"{told}{kept}: {_hours(_bytes(chosen), config.price)}"
    if place:
        return f"{counted(len(module.local_files(place, config.part)), 'file')} of {place} linked, nothing copied"
    files = counted(len(module.remote_files(config.part)), "file")
    if config.origin:
        return f"{files}; the mirror tells their sizes when asked"
    n_bytes = _require_space(config, cache, partial)
    return f"{files}, {size(n_bytes)} to fetch: {_hours(n_bytes, config.price)}"


def _hours(n_bytes: int, price: float) -> str:
    seconds = [(n_bytes / rate / 1e6, rate) for rate in RATES]
    money = f" (${{:,.2f}} at ${price:g}/h)" if price else ""
    return ", ".join(f"{hours(s)} at {rate} MB/s{money.format(s / 3600 * price)}" for s, rate in seconds)


def _slug(config: FetchConfig, _: Inputs) -> str:
    words = [config.source, *(("sample",) if config.origin == "sample" else config.part)]
    words += list(config.task) if len(config.task) < 3 else [f"{len(config.task)}tasks"]
    words += [f"{config.episodes}episodes"] * bool(config.episodes) + ["streamed"] * config.stream
    return "-".join(words)


def _place(config: FetchConfig) -> Path | None:
    """The local folder that is linked; None if the files come over HTTP."""
    if config.origin == "sample":
        return SAMPLE / "egodex" if config.source == "egodex" else SAMPLE
    return Path(config.origin) if config.origin.startswith("/") else None


def seen(config: FetchConfig) -> FetchConfig | None:
    """The request that makes a settled one's files readable where they lie; None if they must be fetched for that."""
    try:
        source(config.source).chosen([], (), 0)
    except ConfigError:
        return config if _place(config) else None
    return config if _place(config) else replace(config, stream=True)


def _some(config: FetchConfig) -> bool:
    """Whether only some members of the zips are wanted."""
    return bool(config.task or config.episodes)


def _build(config: FetchConfig, _: Inputs, folder: Path) -> Built:
    from avrl.members import tally

    place = _place(config)
    parts: dict[str, Counter[str]] = {part: Counter() for part in config.part}
    sums = sums_of(config.locked) if config.locked else {}
    if _some(config) or config.stream:
        arrivals = _pick(config, folder)
    else:
        sums = sums or listed(config.origin)
        arrivals = _link(config, place, folder) if place else _download(config, folder)
    for part, path in arrivals:
        try:
            parts[part].update(tally(path))
            if sums:
                accept(path, folder, sums, config.locked or config.origin)
        except IntegrityError:
            if not place:  # what came is whole and wrong: under its name it would be taken for done ever after
                path.unlink(missing_ok=True)
            raise
    kind = {"": "published", "sample": "sample"}.get(config.origin, "folder" if place else "mirror")
    told = {"origin": kind, **sum(parts.values(), Counter[str]())}
    return Built({**told, "parts": {part: dict(+count) for part, count in parts.items()}}, licence(config))


def _choice(config: FetchConfig) -> dict[str, list[zipfile.ZipInfo]]:
    """Part -> the members of its zip that are wanted, for parts that have some."""
    from avrl.members import directory

    members = {one.filename: (part, one) for part in config.part for one in directory(_zip(config, part))}
    found: dict[str, list[zipfile.ZipInfo]] = {part: [] for part in config.part}
    for name in source(config.source).chosen(list(members), config.task, config.episodes):
        found[members[name][0]].append(members[name][1])
    return {part: some for part, some in found.items() if some}


def _zip(config: FetchConfig, part: str) -> str | Path:
    """Address or file of a part's zip."""
    module, place = source(config.source), _place(config)
    (file,) = module.remote_files((part,))
    if not place:
        return (config.origin or module.BASE_URL) + quote(file.name)
    found = module.local_files(place, (part,))
    if file.name not in found:
        raise ConfigError(f"{place / part} is unpacked: choose among its folders", "leave --task and --episodes out")
    return found[file.name]


def _bytes(members: Iterable[zipfile.ZipInfo]) -> int:
    return sum(one.compress_size for one in members)


def _pick(config: FetchConfig, folder: Path) -> Iterator[tuple[str, Path]]:
    """Fetch the chosen members of each part into a zip of their own, or only note where they lie."""
    from avrl.members import extract
    from avrl.progress import bar
    from avrl.remotezip import SUFFIX, RemoteZip

    choice = _choice(config)
    if not config.stream:
        chosen = [one for some in choice.values() for one in some]
        _require_room(config, chosen, Cache(folder.parent.parent), folder)
    with bar(_slug(config, {}), sum(map(_bytes, choice.values())), "B", unit_scale=True) as shown:
        for part, members in choice.items():
            names, target, place = [one.filename for one in members], folder / f"{part}.zip", _zip(config, part)
            if config.stream:
                RemoteZip(str(place)).save(target, names if _some(config) else None)
                yield part, target.with_name(target.name + SUFFIX)
                continue
            if not target.exists():
                extract(place, names, target, folder / SCRATCH, workers=config.workers, progress=shown.update)
            yield part, target


def _link(config: FetchConfig, place: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Put links to a local copy's files where the published ones would lie."""
    files = source(config.source).local_files(place, config.part)
    copies.tell(Cache(folder.parent.parent), as_json(config, runtime=False), files)
    for name, path in files.items():
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
    return None if config.origin else sum(source(config.source).BYTES.get(part, 0) for part in config.part) or None


def _require_space(config: FetchConfig, cache: Cache, partial: Path) -> int:
    """Bytes still to fetch by the published sizes, once the cache's disk has proved large enough for them."""
    missing = max(0, (_total(config) or 0) - _there(partial))
    cache.require_space(missing, _slug(config, {}))
    return missing


def _require_room(config: FetchConfig, members: Iterable[zipfile.ZipInfo], cache: Cache, partial: Path) -> None:
    """The same for members, which lie in scratch until their zip is packed."""
    cache.require_space(2 * sum(one.file_size for one in members) - _there(partial), _slug(config, {}))


def _there(partial: Path) -> int:
    """Bytes on disk of what an interrupted fetch has left; unfinished files are sparse."""
    return sum(one.stat().st_blocks * 512 for one in partial.rglob("*") if one.is_file())


STAGE = Stage(name="raw", version=1, config=FetchConfig, slug=_slug, build=_build)

"""Stages: build once, find ever after. A stage only declares; this module runs it.

A build fills a partial directory that is named by the key, under a courtesy lock. Killed builds go on in the
same directory the next time the same key is asked, and only then: that is all that "resume" means here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from avrl.artifact import (
    MANIFEST,
    Artifact,
    Input,
    Manifest,
    digest_of,
    hash_files,
    key_of,
    publish,
    seal,
    sweep,
)
from avrl.cache import KEY_LENGTH, Cache
from avrl.config import as_json
from avrl.errors import AvrlError, BusyError, DiskFullError, IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

Inputs = Mapping[str, Artifact]
PACKAGES = (
    *("avrl", "torch", "timm", "torchvision", "transformers", "opencv-python-headless"),
    *("zarr", "polars", "numpy", "accelerate", "simplejpeg", "altair"),
)
NO_SPACE = 2**17  # bytes free below which a failed write is the disk's fault


@dataclass(frozen=True)
class Built:
    """What a build has to say of its work, for the manifest."""

    facts: dict[str, Any] = field(default_factory=dict)
    licence: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """A way of making one kind of artifact.

    Attributes:
        name: The noun it makes; also its folder in the cache.
        version: Bumped by hand when the same request would now write other bytes.
        config: The dataclass of its options.
        slug: (config, inputs) -> readable name; never part of the key.
        build: (config, inputs, folder) fills a folder that an interrupted build may have half filled.
    """

    name: str
    version: int
    config: type[Any]
    slug: Callable[[Any, Inputs], str]
    build: Callable[[Any, Inputs, Path], Built]

    def key(self, config: object, inputs: Inputs) -> str:
        """SHA-256 (hex) of this request."""
        digests = {role: one.digest for role, one in inputs.items()}
        return key_of(self.name, self.version, as_json(config, runtime=False), digests)


def run(stage: Stage, config: object, inputs: Inputs, cache: Cache, *, wait_s: float = 0.0) -> tuple[Artifact, bool]:
    """Find the artifact of this request, or build it. Returns it and whether it was found (a hit).

    `wait_s` is how long to wait for another process that is building it.

    Raises:
        BusyError: another process is building it.
        DiskFullError: the disk filled up; what was built so far is kept.
        IntegrityError: a folder without a manifest lies where the artifact belongs.
    """
    key = stage.key(config, inputs)
    found = cache.find(stage.name, key)
    if found:
        return found, True
    slug = stage.slug(config, inputs)
    partial, final = cache.partial(stage.name, slug, key), cache.path(stage.name, slug, key)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _lock(partial, wait_s):
            found = cache.find(stage.name, key)  # another process may have published while we waited for nothing
            if found:
                return found, True
            if final.exists():  # said before the work, not when its result cannot be renamed
                raise IntegrityError(f"{final} is in the way and has no manifest", f"remove it with: rm -r {final}")
            if not (partial / MANIFEST).is_file():  # else an earlier run was killed between sealing and publishing
                seal(partial, _build(stage, config, inputs, partial))
            return publish(partial, final), False
    except AvrlError:
        raise
    except Exception as error:
        found = cache.find(stage.name, key) if isinstance(error, FileNotFoundError) else None
        if found:  # where locks are no-ops, a twin has published what both were making
            return found, True
        if not _is_full(error, cache):
            raise
        raise DiskFullError(
            f"no space left while making {slug} in {cache.root}",
            "free some and run the same command: it goes on from here",
        ) from error


def _build(stage: Stage, config: object, inputs: Inputs, partial: Path) -> Manifest:
    """Fill a partial directory and list what came out."""
    started = time.monotonic()
    built = stage.build(config, inputs, partial)
    sweep(partial)
    files = hash_files(partial)
    return Manifest(
        stage=stage.name,
        version=stage.version,
        key=stage.key(config, inputs),
        digest=digest_of(files),
        config=as_json(config, runtime=False),
        runtime=as_json(config, runtime=True),
        inputs=[Input(role, one.ref, one.digest) for role, one in sorted(inputs.items())],
        files=files,
        facts=built.facts,
        licence=_licences(built, inputs),
        packages=_packages(),
        seconds=round(time.monotonic() - started, 3),
    )


def _is_full(error: Exception, cache: Cache) -> bool:
    """Whether a build failed for want of space: polars and safetensors say so in words, torch and numpy not at all."""
    full = (errno.ENOSPC, errno.EDQUOT)
    said = getattr(error, "errno", None) in full or any(os.strerror(code) in str(error) for code in full)
    return said or (cache.root.is_dir() and shutil.disk_usage(cache.root).free < NO_SPACE)


def why(stage: Stage, config: object, inputs: Inputs, cache: Cache) -> list[str]:
    """Why a request is a miss: what differs from the nearest artifact of the same stage. Empty for a hit."""
    key = stage.key(config, inputs)
    if cache.find(stage.name, key):
        return []
    slug = stage.slug(config, inputs)
    if cache.partial(stage.name, slug, key).is_dir():
        return ["begun before and not finished: it goes on from there"]
    asked: dict[str, Any] = {"version": stage.version, **as_json(config, runtime=False)}
    asked |= {f"input {role}": one.digest[:KEY_LENGTH] for role, one in inputs.items()}
    differences = [_differences(asked, one.manifest) for one in cache.artifacts(stage.name)]
    return min(differences, key=len) if differences else [f"no {stage.name} in the cache yet"]


def _differences(asked: dict[str, Any], manifest: Manifest) -> list[str]:
    there: dict[str, Any] = {"version": manifest.version, **manifest.config}
    there |= {f"input {one.role}": one.digest[:KEY_LENGTH] for one in manifest.inputs}
    names = sorted(set(asked) | set(there))
    return [f"{name}: {there.get(name)} -> {asked.get(name)}" for name in names if there.get(name) != asked.get(name)]


def changed(manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Which of some packages made an artifact in another version than is installed; what is unknown is left out."""
    there, now = manifest.packages, _packages()
    both = [name for name in names if name in there and name in now]
    return [f"{name} {there[name]} (installed: {now[name]})" for name in both if there[name] != now[name]]


def _licences(built: Built, inputs: Inputs) -> list[str]:
    lines = list(built.licence)
    for one in inputs.values():
        lines += [line for line in one.manifest.licence if line not in lines]
    return lines


def _packages() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@contextlib.contextmanager
def _lock(partial: Path, wait_s: float) -> Iterator[None]:
    """Courtesy lock against double work. No correctness rests on it: locks are no-ops on many cluster disks."""
    path = partial.with_name(partial.name + ".lock")
    with path.open("w") as handle:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.2)
                    continue
                raise BusyError(
                    f"another avrl is making {partial.name.removeprefix('.partial-')}",
                    "wait for it, or stop it",
                ) from None
            except OSError as error:
                log.debug("no lock on this file system: %s", error)
            break
        yield
        path.unlink(missing_ok=True)

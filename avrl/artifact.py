"""Artifacts: finished directories with a manifest that is written last. No manifest, no artifact.

The **key** is the SHA-256 of what was asked: stage, version, identity fields, digests of the inputs; it names
the directory. The **digest** is the SHA-256 over the files that came out (`digest_of`); it enters the children's keys.
Training is not bit-stable on a GPU, so a re-trained checkpoint has the same key and another digest, and nobody
can take features of the one for features of the other.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from avrl.errors import IntegrityError

FORMAT = 1
MANIFEST = "manifest.json"
SCRATCH = "scratch"  # a build's own temporary files; never published
LOOKS = "looks"  # how a build was watched: published, listed and verified, but no part of what came out
# Names under which `write_durably`, zarr and safetensors write a file before it gets its own.
LITTER = re.compile(r"\..+\.\d+\.tmp|.+\.[0-9a-f]{32}\.partial|\.tmp[0-9A-Za-z]{6}")
KINDS = {**dict.fromkeys(["config", "runtime", "facts", "packages"], dict), "licence": list, "seconds": int | float}
LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # what a refused fsync must not hide


@dataclass(frozen=True)
class File:
    """One file of an artifact: path below its root, size in bytes, SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Input:
    """What an artifact was made from: its role, a readable reference and the digest of its content."""

    role: str
    ref: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """The provenance of an artifact, as sorted JSON in ``manifest.json``.

    Attributes:
        stage: Stage that made it; also the noun that names its folder.
        config: Identity fields of the request.
        runtime: Fields that say how it was run; not part of the key.
        facts: Counts and other findings of the build (episodes, frames, dropped, splits, device).
        licence: Licence lines of the data it holds or derives from.
    """

    stage: str
    version: int
    key: str
    digest: str
    config: dict[str, Any]
    runtime: dict[str, Any]
    inputs: list[Input]
    files: list[File]
    facts: dict[str, Any]
    licence: list[str]
    packages: dict[str, str]
    seconds: float
    format: int = FORMAT

    def input(self, role: str) -> Input:
        """The input of this role.

        Raises:
            KeyError: the artifact has no such input.
        """
        for one in self.inputs:
            if one.role == role:
                return one
        raise KeyError(role)


@dataclass(frozen=True)
class Artifact:
    """A finished directory and its manifest."""

    root: Path
    manifest: Manifest = field(repr=False)

    @property
    def ref(self) -> str:
        """The readable name that the command line takes: ``egodex-part1-224px-1a2b3c4d5e6f``."""
        return self.root.name

    @property
    def digest(self) -> str:
        """SHA-256 over the names and contents of its files."""
        return self.manifest.digest

    @property
    def bytes(self) -> int:
        """Sum of its files' sizes."""
        return sum(file.bytes for file in self.manifest.files)


def key_of(stage: str, version: int, identity: dict[str, Any], inputs: dict[str, str]) -> str:
    """SHA-256 (hex) of what was asked; `inputs` maps a role to the digest of what fills it."""
    asked = {"stage": stage, "version": version, "config": identity, "inputs": inputs}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def digest_of(files: list[File]) -> str:
    """SHA-256 (hex) over the paths and contents of files, whatever their order; those of `LOOKS` do not count.

    How often a run is looked at is a runtime option: it must not make another checkpoint of the same weights.
    """
    lines = sorted(f"{file.sha256}  {file.path}\n" for file in files if not file.path.startswith(f"{LOOKS}/"))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes; the GIL is released, so threads hash side by side."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_files(root: Path) -> list[File]:
    """List every file below a root but manifest and scratch, sorted by path, with size and checksum."""
    own = (MANIFEST, SCRATCH)
    paths = sorted(path for path in _walk(root) if path.relative_to(root).parts[0] not in own)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = list(pool.map(sha256_of, paths))
    return [
        File(path.relative_to(root).as_posix(), path.stat().st_size, digest)
        for path, digest in zip(paths, sums, strict=True)
    ]


def _walk(root: Path) -> list[Path]:
    """Files below a root; a linked local folder (``fetch --from``) counts by its content."""
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        found += [Path(folder) / name for name in names]
    return found


def sweep(root: Path) -> None:
    """Remove the temporary files that killed processes left below a root; linked folders are not entered."""
    for folder, _, names in os.walk(root):
        for name in names:
            if LITTER.fullmatch(name):
                (Path(folder) / name).unlink(missing_ok=True)


def seal(partial: Path, manifest: Manifest) -> None:
    """Make the files of a partial directory durable, then say so in its manifest: from here on it is finished."""
    for file in manifest.files:
        make_durable(partial / file.path)
    for folder, _, _ in os.walk(partial):
        make_durable(Path(folder))
    write_durably(partial / MANIFEST, json.dumps(asdict(manifest), indent=1, sort_keys=True).encode())


def publish(partial: Path, final: Path) -> Artifact:
    """Turn a sealed partial directory into an artifact: remove its scratch, rename, fsync parent.

    A crash before the manifest leaves the scratch, so that the build can go on; a crash after it leaves a sealed
    directory, which only has to be published.
    """
    shutil.rmtree(partial / SCRATCH, ignore_errors=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(final)
    make_durable(final.parent)
    return load(final)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that its name never shows a part of it: temporary name, fsync, rename, fsync folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    make_durable(temporary)
    temporary.rename(path)
    make_durable(path.parent)


def make_durable(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk.

    Raises:
        OSError: they are lost.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse to sync a folder; the rename is still atomic there.
        if error.errno in LOST:
            raise
    finally:
        os.close(descriptor)


def load(root: Path) -> Artifact:
    """Read an artifact's manifest; its files are not touched (see `verify`).

    Raises:
        IntegrityError: the manifest is unreadable or of another format.
    """
    try:
        values = json.loads((root / MANIFEST).read_bytes())
        if values["format"] != FORMAT:
            raise IntegrityError(
                f"{root / MANIFEST} has format {values['format']}, this avrl reads {FORMAT}",
                _cure(root, f"remove it with: rm -r {root}"),
            )
        values["inputs"] = [Input(**one) for one in values["inputs"]]
        values["files"] = [File(**one) for one in values["files"]]
        manifest = Manifest(**values)
        _require_kinds(manifest)
        inputs = {one.role: one.digest for one in manifest.inputs}
        if manifest.digest != digest_of(manifest.files):
            raise ValueError("its digest is not that of its files")
        if manifest.key != key_of(manifest.stage, manifest.version, manifest.config, inputs):
            raise ValueError("its key is not that of its request")
        return Artifact(root, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cure = _cure(root, f"remove it with: rm -r {root}")
        raise IntegrityError(f"{root / MANIFEST} is damaged: {error}", cure) from error


def _require_kinds(manifest: Manifest) -> None:
    """Refuse values that no build writes, before somebody reckons with them."""
    texts = [text for one in manifest.inputs for text in (one.role, one.ref, one.digest)]
    wrong = [name for name, kind in KINDS.items() if not isinstance(getattr(manifest, name), kind)]
    wrong += ["inputs"] * (not all(isinstance(one, str) for one in texts))
    wrong += ["files"] * (not all(isinstance(one.bytes, int) for one in manifest.files))
    if wrong:
        raise TypeError(f"{wrong[0]} is of another kind")


def verify(artifact: Artifact) -> None:
    """Compare every file with its size and checksum in the manifest.

    Raises:
        IntegrityError: a file is missing, shorter, longer or changed; the message names it.
    """
    for file in artifact.manifest.files:
        path = artifact.root / file.path
        if not path.is_file() or path.stat().st_size != file.bytes or sha256_of(path) != file.sha256:
            raise spoilt(path, artifact.root)


def spoilt(path: Path, root: Path) -> IntegrityError:
    """The error for a file of the artifact at `root` that is not what its manifest says."""
    return IntegrityError(f"{path} is not what its manifest says", _cure(root, f"rm -r {root} and run the verb again"))


def _cure(root: Path, cheap: str) -> str:
    """What helps a damaged artifact: most are made again, but of a checkpoint that would throw days away."""
    if root.parent.name != "checkpoints":
        return cheap
    again = f"rm -r {root} and type the same avrl pretrain, which brings it from S3 with --sync and trains anew without"
    return f"copy it again from where it was mirrored; or {again}"

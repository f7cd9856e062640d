"""Locks: the checksums that a fetch is held to, as sha256sum writes them or as an earlier fetch's manifest has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from avrl.artifact import MANIFEST, load, sha256_of
from avrl.errors import ConfigError, IntegrityError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping


def sums_of(lock: str) -> dict[str, str]:
    """Name -> SHA-256 (hex) of a lock: a file that sha256sum wrote, a raw artifact, or its manifest.

    Raises:
        ConfigError: it is none of these.
        NotFoundError: there is no such file.
    """
    path = Path(lock).expanduser()
    path = path / MANIFEST if path.is_dir() else path
    if not path.is_file():
        raise NotFoundError(f"--locked {path} is not there", "name a file that sha256sum wrote, or a raw artifact")
    if path.name == MANIFEST:
        return {file.path: file.sha256 for file in load(path.parent).manifest.files}
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    found = [re.fullmatch(r"([0-9a-f]{64}) [ *](?:\./)?(.+)", line) for line in lines]
    sums = {one[2]: one[1] for one in found if one}
    if not lines or len(sums) < len(lines):
        raise ConfigError(f"--locked {path} is not what sha256sum writes", "name such a file, or a raw artifact")
    return sums


def listed(origin: str) -> dict[str, str]:
    """Name -> SHA-256 of what a bucket's manifest lists; empty for other origins, and buckets without one."""
    if not origin.startswith("s3://"):
        return {}
    from avrl.s3 import read_manifest

    manifest = read_manifest(origin) or {}
    return {file["path"]: file["sha256"] for file in manifest.get("files", ())}


def hold_to(sums: Mapping[str, str], files: Mapping[str, str], lock: str, again: str = "fetch it again") -> None:
    """Compare files with the checksums they are held to; both are name -> SHA-256, `lock` is who says so.

    Raises:
        IntegrityError: a file differs, or is not listed.
    """
    for name, found in files.items():
        if sums.get(name) != found:
            why = "is not the file that it was" if name in sums else "is not listed"
            raise IntegrityError(f"{name} {why}: its sha256 is {found}, {lock} says {sums.get(name, 'nothing')}", again)


def accept(path: Path, root: Path, sums: Mapping[str, str], lock: str) -> None:
    """Compare a file, or every file of a folder, with the checksums; names are relative to the root.

    Raises:
        IntegrityError: see `hold_to`.
    """
    for file in [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file()):
        hold_to(sums, {file.relative_to(root).as_posix(): sha256_of(file)}, lock)

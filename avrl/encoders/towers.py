"""Vision towers of robot policies: a small part of a large checkpoint, fetched and read without the rest.

A fetched tower is one safetensors file, ``$HF_HOME/avrl/NAME-REVISION.safetensors``: beside the hub's cache, whose
files are whole ones of the hub. Its metadata say where it is from. ``--weights`` takes such a file, a whole
checkpoint in one file, or a folder with shards and their ``model.safetensors.index.json``.
Importing this module needs no torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from avrl import remotetensors
from avrl.errors import IntegrityError
from avrl.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

    from avrl.encoders import Known

INDEX = "model.safetensors.index.json"


def kept(name: str, one: Known) -> Path:
    """Where the tower of an encoder is kept once it is fetched; it is there only when it is whole."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, "avrl", f"{name}-{one.revision[:12]}.safetensors")


def fetch(name: str, one: Known, file: str, index: Path | None) -> Path:
    """Fetch the tower's tensors by ranges.

    Args:
        name: The encoder's.
        one: Its row; `revision` and `part` are set.
        file: The checkpoint in the repository, or the index of its shards.
        index: The fetched index, if it is one.

    Raises:
        IntegrityError, NotFoundError, TemporaryError, DiskFullError: as `avrl.remotetensors.fetch`.
    """
    import huggingface_hub

    files: dict[str, set[str] | str] = {file: one.part}
    if index:
        files = dict(_shards(index, one.part).items())
    folder = huggingface_hub.hf_hub_url(one.hub, file, revision=one.revision).rpartition("/")[0]
    target = kept(name, one)
    told = {"format": "pt", "source": one.hub, "revision": one.revision}
    with bar(f"fetch {name}", None, "B", unit_scale=True) as shown:
        remotetensors.fetch(folder, files, target, told, progress=shown.update)
    return target


def _shards(index: Path, part: str) -> dict[str, set[str]]:
    """Shard -> the names of the tower's tensors in it.

    Raises:
        IntegrityError: no index, one without the tower, or with a shard that is no plain file name.
    """
    shards: dict[str, set[str]] = {}
    try:
        for name, shard in json.loads(index.read_bytes())["weight_map"].items():
            if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
                raise IntegrityError(f"{index}: {shard!r} is no shard beside it", "fetch the index again")
            if part in name:
                shards.setdefault(shard, set()).add(name)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise IntegrityError(f"{index} is no index of shards", "fetch it again") from None
    if not shards:
        raise IntegrityError(f"{index} names no tensor with {part!r}", "pass the checkpoint of this policy")
    return shards


def files(path: Path, part: str) -> list[Path]:
    """The files that the tower is read from: `path`, or the shards that an index names.

    Raises:
        IntegrityError: see `_shards`.
    """
    return [path.parent / shard for shard in sorted(_shards(path, part))] if path.suffix == ".json" else [path]


def read(path: Path, part: str) -> dict[str, Tensor]:
    """The tensors with `part` in their names, by what follows it: of a tower, a checkpoint, or an index's shards.

    Raises:
        IntegrityError: a file is missing or damaged, or shards and index disagree.
    """
    import safetensors

    wanted = _shards(path, part) if path.suffix == ".json" else {path.name: None}
    state: dict[str, Tensor] = {}
    for file, names in wanted.items():
        try:
            with safetensors.safe_open(path.parent / file, "pt") as opened:
                for name in names or [key for key in opened.keys() if part in key]:  # noqa: SIM118 (no mapping)
                    state[name.partition(part)[2]] = opened.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise IntegrityError(
                f"{path.parent / file} is missing or damaged: {' '.join(str(error).split())[:160]}",
                "pass a .safetensors file, or the folder of a checkpoint with all of its shards",
            ) from error
    return state

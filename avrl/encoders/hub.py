"""Where published weights are brought from: the Hugging Face hub, or a plain address. Importing this needs no torch."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import TYPE_CHECKING

from avrl.errors import AvrlError, DiskFullError, MissingError, TemporaryError

if TYPE_CHECKING:
    from avrl.encoders import Known

# Only asking whether the hub answers is bounded so. huggingface_hub's own download asks six times: 23 s
# offline.
ASK_TIMEOUT_S = 5.0
ELSEWHERE = "run it where there is network, with HF_HOME in a folder that both machines see"


class UnreachableError(MissingError):
    """Published weights are neither here nor to be had from here."""


def place(name: str, one: Known) -> Path:
    """Where the file of a plain address is kept: beside the hub's cache, so that HF_HOME is the one place to set."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME, "avrl", name + Path(one.url).suffix)


def from_address(name: str, one: Known) -> Path:
    """The file of a plain address, fetched the first time.

    Raises:
        UnreachableError: the address does not answer.
        TemporaryError: the download broke off.
        DiskFullError: no space for it.
    """
    from huggingface_hub import constants

    path = place(name, one)
    if path.is_file():
        return path
    if constants.HF_HUB_OFFLINE:
        raise _missing(name, one.url, "HF_HUB_OFFLINE is set")
    from avrl import http
    from avrl.server import Patience

    try:
        with contextlib.closing(http.connect(one.url, 1, Patience(1, 0, ASK_TIMEOUT_S))) as server:
            server.patiently(server.ask)
    except AvrlError as error:
        raise _missing(name, one.url, error.cause) from error
    http.download(one.url, path)
    return path


def _missing(name: str, where: str, reason: str) -> UnreachableError:
    return UnreachableError(
        f"{name}'s weights ({where}) are not in the cache and could not be fetched: {reason}",
        f"where there is network: avrl fetch encoders --encoder {name}; or pass --weights FILE",
    )


def cached(one: Known) -> Path | None:
    """The first of a row's files that is in the hub's cache."""
    import huggingface_hub

    for file in one.files:
        found = huggingface_hub.try_to_load_from_cache(one.hub, file, revision=one.revision or None)
        if isinstance(found, str):  # else None, or a marker that the hub has no such file
            return Path(found)
    return None


def published(name: str, one: Known) -> str:
    """The first of the files that the repository has.

    Raises:
        UnreachableError: the hub does not answer, or not to us.
        MissingError: it has none of them, or not the commit.
    """
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


def download(name: str, one: Known, file: str) -> Path:
    """Fetch a whole file of the repository; `huggingface_hub` checks length and ETag.

    Raises:
        TemporaryError: it broke off.
        DiskFullError: no space for it.
    """
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
    """First sentence of what a library said, short enough to be a part of ours."""
    return (" ".join(str(error).split()) or type(error).__name__).partition(". ")[0][:240]

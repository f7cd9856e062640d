"""Addresses that a user may type: where to fetch from, and the bucket to mirror to. None may hold a secret.

Manifests keep what was asked, so an address with a query or a password in it is refused, and never shown.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from avrl.errors import ConfigError


def origin_of(text: str) -> str:
    """An origin in its one spelling: empty, ``sample``, an absolute folder, or a URL that ends in a slash.

    Raises:
        ConfigError: it is neither a plain URL nor a folder.
    """
    url = urlsplit(text)
    if text in ("", "sample"):
        return text
    if "://" not in text:
        return str(Path(text).expanduser().resolve())
    if url.scheme not in ("http", "https", "s3") or not url.hostname:
        raise ConfigError(
            f"--from {url.scheme}://{url.hostname or ''} is no address to fetch from", "http, https, s3 or DIR"
        )
    if url.query or "@" in url.netloc:
        raise ConfigError(
            f"--from {url.scheme}://{url.hostname} holds a query or password, and manifests keep it",
            "fetch it by other means, then --from DIR",
        )
    return text.rstrip("/") + "/"


def require_bucket(text: str) -> None:
    """Refuse what is no address of a place in a bucket, before the work that is to go there.

    Raises:
        ConfigError: it is none.
    """
    from avrl.s3 import split  # loads urllib3

    split(text)

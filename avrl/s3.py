"""S3: addresses, signed requests, and one object as a source of ranges.

Requests are signed with the credentials that boto3 finds (environment, ~/.aws, role of the machine); where it finds
none they go unsigned, as public buckets want it. ``AWS_ENDPOINT_URL_S3`` names another store than Amazon's; S3's
checksums are then left out, unless ``AWS_REQUEST_CHECKSUM_CALCULATION`` asks for them. An ETag is a version, never an
md5. boto3's own errors and logs are never shown: they may hold signatures and whole URLs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from urllib3.exceptions import HTTPError

from avrl import __version__
from avrl.artifact import MANIFEST
from avrl.errors import AvrlError, ConfigError, IntegrityError, NotFoundError
from avrl.server import LATER, OVER, TEMPORARY, Origin, Patience, Published, RetryError

if TYPE_CHECKING:
    from collections.abc import Iterator

for _name in ("boto3", "botocore", "s3transfer"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # below it they tell headers, signatures and all

SCHEME = "s3://"


class MissingObjectError(NotFoundError):
    """The bucket answers, but holds no such object."""


CREDENTIALS = "check what boto3 finds: AWS_PROFILE, AWS_ACCESS_KEY_ID, ~/.aws; none are needed for public data"
GONE = (MissingObjectError, "it is not there", "check the address")
REFUSED = (NotFoundError, "access refused", CREDENTIALS)
EXPIRED = (NotFoundError, "the credentials have expired", f"renew them and {LATER}")
CHANGED = (IntegrityError, "it changed at the server", OVER)
ELSEWHERE = (NotFoundError, "the bucket is in another region", "name it with AWS_DEFAULT_REGION")
# What S3 says (a HEAD has only the status to say it with): error, cause, next step.
ANSWERS: dict[str, tuple[type[AvrlError], str, str]] = {
    "NoSuchBucket": (NotFoundError, "there is no such bucket", "check the address and AWS_ENDPOINT_URL_S3"),
    **dict.fromkeys(["NoSuchKey", "404"], GONE),
    **dict.fromkeys(["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403", "400"], REFUSED),
    **dict.fromkeys(["ExpiredToken", "InvalidToken", "TokenRefreshRequired"], EXPIRED),
    "RequestTimeTooSkewed": (NotFoundError, "this machine's clock is wrong", f"set it, then {LATER}"),
    **dict.fromkeys(["PreconditionFailed", "412"], CHANGED),
    **dict.fromkeys(["PermanentRedirect", "AuthorizationHeaderMalformed", "301"], ELSEWHERE),
    "InvalidRange": (IntegrityError, "it is empty or shorter than it was", OVER),
}
# Beside the statuses of `TEMPORARY`. A lost multipart upload, or a part damaged on its way, is sent again.
RETRIED = {
    *("RequestTimeout", "Throttling", "OperationAborted", "ConditionalRequestConflict", "NoSuchUpload", "InvalidPart"),
    *("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody"),
}


def is_s3(url: str) -> bool:
    """Whether an address is one of S3."""
    return url.startswith(SCHEME)


def split(url: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``; the key, which may be empty, is taken as it is.

    Raises:
        ConfigError: not such an address. What may hold a secret is not shown: ``KEY:SECRET@``, a query.
    """
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    if not is_s3(url) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}", bucket):
        # Not `shown`: a secret may hold a slash, and then stands before and behind it.
        secret = set("@:") & set(url.partition("://")[2] or url)
        said = "what is given" if secret else repr(re.split(r"[?#]", url)[0])
        raise ConfigError(f"{said} is no address of S3", "write s3://BUCKET/PREFIX; credentials: see AWS_PROFILE")
    return bucket, key


@dataclass(frozen=True)
class Body:
    """The bytes of an open answer, by the interface of urllib3."""

    raw: Any

    def stream(self, chunk_bytes: int) -> Iterator[bytes]:
        """Chunks of it; a body that is cut short raises, as boto3's reader counts and the one below it does not."""
        yield from self.raw.iter_chunks(chunk_bytes)


class Object(Origin):
    """One object; each range is signed when it is asked for, so that nothing expires on a long way."""

    def __init__(self, url: str, connections: int, patience: Patience, client: Any = None) -> None:
        super().__init__(url, patience)
        bucket, key = split(url)
        if not key:
            raise ConfigError(f"{url} names a bucket, not an object", "write s3://BUCKET/KEY")
        self.where = {"Bucket": bucket, "Key": key}
        self.client = client or connect(url, connections, patience, tries=1)

    def close(self) -> None:
        """Close its connections."""
        self.client.close()

    def ask(self) -> Published:
        """The first answer: version and length.

        Raises:
            NotFoundError: not there, or access refused.
            IntegrityError: empty, or a server without ranges or versions.
        """
        with told(self.shown):
            answer = self.client.get_object(**self.where, Range="bytes=0-0")
            answer["Body"].close()
        found = re.fullmatch(r"bytes 0-0/(\d+)", answer.get("ContentRange", ""))
        if not found or not answer.get("ETag"):
            raise IntegrityError(f"{self.shown}: no range or no ETag comes back", "check AWS_ENDPOINT_URL_S3")
        return Published(self.shown, answer["ETag"], "", int(found[1]), ranged=True)

    @contextlib.contextmanager
    def range(self, file: Published, start: int, n_bytes: int) -> Iterator[Body]:
        """An open answer with exactly these bytes of exactly this version.

        Raises:
            NotFoundError: gone, or access refused.
            IntegrityError: the object changed, or another range came.
        """
        wanted = f"{start}-{start + n_bytes - 1}"
        with told(self.shown):
            answer = self.client.get_object(**self.where, Range=f"bytes={wanted}", IfMatch=file.etag)
            with contextlib.closing(answer["Body"]) as body:
                if answer["ResponseMetadata"]["HTTPStatusCode"] != 206 or answer.get("ETag") != file.etag:
                    raise IntegrityError(f"{self.shown} changed at the server while it was fetched", OVER)
                came = answer.get("ContentRange", "none"), answer.get("ContentLength")
                if came != (f"bytes {wanted}/{file.length}", n_bytes):
                    raise IntegrityError(f"{self.shown}: asked for bytes {wanted}, told {came[0]!r}, {came[1]}", OVER)
                yield Body(body)

    def head(self) -> dict[str, Any] | None:
        """What S3 knows of it; None if it is not there."""
        with contextlib.suppress(MissingObjectError), told(self.shown):
            return dict(self.client.head_object(**self.where, ChecksumMode="ENABLED"))
        return None


def read_manifest(url: str, patience: Patience | None = None) -> dict[str, Any] | None:
    """The manifest below this address, None if there is none: then nothing below it is to be believed.

    Raises:
        NotFoundError: no such bucket, or access refused.
        IntegrityError: it is no JSON object.
        TemporaryError: the server failed more often than `patience` bears.
    """
    manifest = Object(f"{url.rstrip('/')}/{MANIFEST}", 1, patience or Patience())

    def read() -> bytes:
        with told(manifest.shown):
            return bytes(manifest.client.get_object(**manifest.where)["Body"].read())

    with contextlib.closing(manifest):
        try:
            values = json.loads(manifest.patiently(read))
        except MissingObjectError:
            return None
        except ValueError:
            values = None
    if not isinstance(values, dict):
        raise IntegrityError(f"{manifest.shown} is damaged", f"remove it with: aws s3 rm {manifest.shown}")
    return values


def connect(url: str, connections: int, patience: Patience, tries: int) -> Any:
    """A client of boto3 for this address.

    Raises:
        ConfigError: no address of S3, or boto3's settings make no sense.
    """
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    split(url)  # before it is shown
    settings: dict[str, Any] = {
        "connect_timeout": patience.timeout_s,
        "read_timeout": patience.timeout_s,
        "max_pool_connections": connections,
        "retries": {"total_max_attempts": tries, "mode": "standard"},
        "user_agent_extra": f"avrl/{__version__}",
    }
    try:
        with told(url):
            session = boto3.session.Session()
            if session.get_credentials() is None:
                settings["signature_version"] = UNSIGNED
            client = session.client("s3", config=Config(**settings))
            if ".amazonaws.com" in client.meta.endpoint_url or "AWS_REQUEST_CHECKSUM_CALCULATION" in os.environ:
                return client
            # Many other stores refuse the checksums that boto3 adds; all know the signed SHA-256 of what is sent.
            settings |= {"s3": {"payload_signing_enabled": True}}
            settings |= dict.fromkeys(["request_checksum_calculation", "response_checksum_validation"], "when_required")
            return session.client("s3", config=Config(**settings))
    except ValueError:
        raise ConfigError(f"{url}: boto3 refuses the endpoint", "write AWS_ENDPOINT_URL_S3=https://HOST") from None


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """Turn every error of boto3 into one of ours, by the tables above.

    Raises:
        RetryError: another try may cure it.
        AvrlError: it will not.
    """
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    lost = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.FlexibleChecksumError)
    try:
        yield
    except boto.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status in TEMPORARY or code in RETRIED:
            raise RetryError(f"the server answers {status} ({code})") from None
        other = (IntegrityError, "an unknown answer", OVER)
        kind, cause, step = ANSWERS.get(code, REFUSED if status == 403 else other)
        raise kind(f"{url}: {cause} ({error.operation_name}: {status} {code})", step) from None
    except (*lost, ResponseParserError, HTTPError) as error:
        raise RetryError(f"the connection fails ({type(error).__name__})") from None
    except boto.BotoCoreError as error:
        raise ConfigError(f"{url}: boto3 cannot ask for it ({type(error).__name__})", CREDENTIALS) from None

"""Every error a user can meet: one line that names the cause, the file or value, and what to type next.

The exit code belongs to the error's class, so scripts and schedulers can tell a full disk from a bad file.
"""

from __future__ import annotations

VERDICT = "AVRL_VERDICT"  # names a file: there a Slurm script learns of what is not worth another try


class AvrlError(Exception):
    """Base of all errors that are told in one line.

    Args:
        cause: What is wrong, naming the file or the value.
        next_step: What to type or do next, if there is such a thing.
    """

    exit_code = 1

    def __init__(self, cause: str, next_step: str = "") -> None:
        super().__init__(cause, next_step)
        self.cause = " ".join(cause.split())
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.cause}; {self.next_step}" if self.next_step else self.cause


class ConfigError(AvrlError):
    """An option's value makes no sense."""

    exit_code = 2


class UnsharedError(ConfigError):
    """The processes of one run do not see the same cache."""


class NotFoundError(AvrlError):
    """A reference names no artifact, or more than one."""

    exit_code = 3


class TemporaryError(AvrlError):
    """A server or a worker failed in a way that a second try may cure."""

    exit_code = 5


class DiskFullError(AvrlError):
    """The disk is full, or too small for what was asked."""

    exit_code = 6


class BusyError(AvrlError):
    """Another avrl process is building this very artifact."""

    exit_code = 7


class IntegrityError(AvrlError):
    """A file is not what its checksum, its length or its format says."""

    exit_code = 8


class StaleError(AvrlError):
    """A server has another version of a file than the one begun with; not a fault of any one member of it."""

    exit_code = 8


class DecodeError(IntegrityError):
    """A clip or an image does not decode to exactly the frames its container promises.

    Args:
        path: The file, with the zip member behind a colon.
        frame: Index of the first frame that could not be had.
        words: What the decoder said.
    """

    def __init__(self, path: str, frame: int, words: str) -> None:
        self.path, self.frame, self.words = path, frame, " ".join(words.split())
        super().__init__(
            f"{path}: frame {frame} does not decode: {self.words}",
            "fetch the file again, or list it as dropped with --on-error drop",
        )

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, int, str]]:
        return type(self), (self.path, self.frame, self.words)


class MismatchError(IntegrityError):
    """Two files of one episode differ in length."""


class DivergedError(AvrlError):
    """The loss is no longer a finite number."""

    exit_code = 9


class SyncError(AvrlError):
    """The copy on S3 is not complete, or not proven to be, or the machine would not power off: it stays up."""

    exit_code = 10


class MissingError(AvrlError):
    """An optional dependency or a model's weights are not at hand."""

    exit_code = 11

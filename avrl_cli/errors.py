"""Every way a run can end badly, as one line on stderr and an exit code (DESIGN 4)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import traceback
from pathlib import Path

from avrl.errors import VERDICT, AvrlError, TemporaryError

BUG = 1
USAGE = 2
DISK_FULL = 6
SIGNALLED = 128  # + the number of the signal
INTERRUPTED = 130
TERMINATED = 143
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


def end(error: BaseException, argv: list[str]) -> int:
    """Tell of an error in one line and return the exit code; the traceback only with ``--debug``."""
    code, line = explain(error)
    if "--debug" in argv:
        traceback.print_exception(error)
    if "--json" in argv:
        with contextlib.suppress(BrokenPipeError):  # whoever was to read it may be what stopped us
            print(json.dumps({"error": line, "kind": type(error).__name__, "exit_code": code}, indent=1), flush=True)
    print(f"avrl: {line}", file=sys.stderr)
    if os.environ.get(VERDICT) and code not in (TemporaryError.exit_code, INTERRUPTED, TERMINATED):
        with contextlib.suppress(OSError):
            Path(os.environ[VERDICT]).write_text(str(code))
    return code


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and line of an error."""
    if isinstance(error, AvrlError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; the same command goes on from here"
    if isinstance(error, SystemExit):
        return int(error.code or 0), "stopped by a signal; the same command goes on from here"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DISK_FULL, f"no space left on device: {error.filename}; free some and run the same command again"
    if isinstance(error, OSError) and error.errno in UNUSABLE:
        return USAGE, f"{error.filename}: {error.strerror}; name a folder of your own with --cache DIR"
    if isinstance(error, ModuleNotFoundError):
        return 11, f"the Python package {error.name!r} is not installed; try: pip install {error.name}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
        return USAGE, f"the GPU's memory is too small: {' '.join(str(error).split())[:120]}; lower --batch-size"
    # Typer vendors its own click, so its usage errors are known by their method, not by an import.
    message = getattr(error, "format_message", None)
    if message is not None:
        text = " ".join(str(message()).split()).rstrip(".") or "no command given"
        command = getattr(getattr(error, "ctx", None), "command_path", "avrl")
        return getattr(error, "exit_code", USAGE), f"{text}; see: {command} --help"
    where = traceback.extract_tb(error.__traceback__)
    at = f" at {os.path.relpath(where[-1].filename)}:{where[-1].lineno}" if where else ""
    return BUG, f"bug: {type(error).__name__}: {error}{at}; run it again with --debug and report what it prints"

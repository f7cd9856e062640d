"""Progress bars: on a terminal only, and never with ``--quiet``."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

QUIET = "AVRL_QUIET"  # environment variable: it reaches the processes of other GPUs too


def bar(what: str, total: int | None, unit: str, *, initial: int = 0, hidden: bool = False, **options: Any) -> Any:
    """A tqdm bar on stderr.

    Args:
        what: The verb or hop, at the left.
        total: Units in all, if known.
        unit: What is counted.
        initial: Units done by an earlier run.
        hidden: True on ranks other than the first.
        options: Further options of tqdm.
    """
    from tqdm import tqdm

    # Its own lock is a semaphore of the system, which a killed process leaves behind with a warning on the terminal.
    tqdm.set_lock(threading.RLock())
    silent = hidden or QUIET in os.environ or not sys.stderr.isatty()
    return tqdm(desc=what, total=total, unit=unit, initial=initial, disable=silent, **options)

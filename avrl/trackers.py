"""Trackers: TensorBoard, W&B and Trackio as sinks of the log. The log is the truth; a sink may fail as it likes.

A thread of its own feeds the sink from a queue of bounded length. A sink that hangs fills the queue, and rows are then
dropped; one that raises is left alone from there on. Each is told in one warning, and the run never waits.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import math
import queue
import threading
from typing import TYPE_CHECKING, Any, Protocol

from avrl.errors import MissingError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

log = logging.getLogger(__name__)

WAITING = 100  # rows: a tenth of a run
PATIENCE_S = 5.0  # at the end, for the rows that still wait; a spot machine has two minutes for everything


class Tracker(Protocol):
    """What takes in numbers."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        ...

    def finish(self) -> None:
        """No more will come."""
        ...


class TensorBoard:
    """Event files below a folder; what an interrupted run wrote beyond `step` is hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """See `Tracker`."""
        self._writer.close()


def require(name: str) -> None:
    """Look for a tracker's package; it is not imported here, for that takes seconds.

    Raises:
        MissingError: it is not installed.
    """
    found = importlib.util.find_spec(name) if name != "none" else None
    if name != "none" and (found is None or found.origin is None):  # W&B leaves a folder ./wandb: that is no package
        raise MissingError(f"--tracker {name}: its package is not installed", f"pip install {name}")


def opened(name: str, folder: Path, run: str, step: int, config: dict[str, Any]) -> Sink | None:
    """The sink of a tracker, or None for ``none``.

    Args:
        name: ``none``, ``tensorboard``, ``wandb`` or ``trackio``.
        folder: For what the tracker keeps on this disk, a folder a run.
        run: Name of the run; the same run goes on under it.
        step: Where it goes on.
        config: What the run is.
    """
    if name == "none":
        return None

    def start() -> Tracker:
        if name == "tensorboard":
            return TensorBoard(folder / run, step)
        module: Any = importlib.import_module(name)
        if name == "wandb":
            folder.mkdir(parents=True, exist_ok=True)
            module.init(project="avrl", name=run, id=run, resume="allow", dir=str(folder), config=config)
        else:
            module.init(project="avrl", name=run, resume="allow", config=config)
        return module  # type: ignore[no-any-return]  # both have `log(values, step=)` and `finish()`

    return Sink(name, start)


class Sink:
    """A tracker on a thread of its own.

    Args:
        name: For the warnings.
        start: Makes the tracker; called on the thread.
    """

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self._name, self._start, self._full = name, start, False
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._feed, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, row: Mapping[str, Any]) -> None:
        """Hand over a row of the log; it never waits."""
        values = {name: value for name, value in row.items() if value is not None and math.isfinite(value)}
        try:
            self._rows.put_nowait((int(row["step"]), values))
        except queue.Full:
            if self._thread.is_alive() and not self._full:
                self._full = True
                log.warning("tracker %s does not keep up: rows are missing there, the log has them all", self._name)

    def close(self) -> None:
        """Wait a little for what is still in the queue."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._rows.put(None, timeout=PATIENCE_S)
                self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            log.warning("tracker %s has not finished after %.0f s: left behind", self._name, PATIENCE_S)
            atexit._clear()  # W&B waits there as well, for ever; of our own nothing is left to do

    def _feed(self) -> None:
        try:
            tracker = self._start()
            while (item := self._rows.get()) is not None:
                tracker.log(item[1], step=item[0])
            tracker.finish()
        except BaseException as error:  # one that calls sys.exit is no better than one that raises
            log.warning("tracker %s failed (%s): the run goes on without it", self._name, " ".join(str(error).split()))

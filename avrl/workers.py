"""Workers: the same function of the same unit of work, in processes of this machine or as tasks of a Ray cluster.

Units are idempotent and write only to their own names, so nothing is lost by doing one twice; there is no scheduler of
ours and no state beside the files.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any, TypeVar

from avrl.errors import AvrlError, MissingError, TemporaryError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    Submit = Callable[..., "Future[Any]"]

AHEAD = 4  # units in flight a worker: enough to ride out a long one, few enough to keep scratch small
AGAIN = "run the same command: it goes on"
OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # for the parent to answer, though the group gets them
T = TypeVar("T")


def count(workers: int, engine: str) -> int:
    """Units at a time that `in_order` will do; 0 workers means one a core, of this machine or of the cluster."""
    if workers or engine == "processes":
        return workers or len(os.sched_getaffinity(0))
    with _ray(count, 0) as (_, many):
        return many


def in_order(function: Callable[..., T], calls: Iterable[tuple[Any, ...]], workers: int, engine: str) -> Generator[T]:
    """Results of ``function(*call)`` in the order of the calls, so many of them at once.

    Args:
        function: Importable by its name.
        calls: Arguments; taken one by one, so many ahead as are in flight.
        workers: Processes, or Ray tasks at a time; 0 means one a core of this machine, or of the cluster.
        engine: ``processes`` or ``ray``.

    Raises:
        TemporaryError: a worker died.
        MissingError: Ray is not installed, or no cluster answers.
    """
    todo = iter(calls)
    with (_ray if engine == "ray" else _processes)(function, workers) as (submit, many):
        flying = [submit(*one) for one in islice(todo, AHEAD * many)]
        while flying:
            yield flying.pop(0).result()
            flying += [submit(*one) for one in islice(todo, 1)]


@contextmanager
def _processes(function: Callable[..., T], workers: int) -> Iterator[tuple[Submit, int]]:
    many = count(workers, "processes")
    pool = ProcessPoolExecutor(many, mp_context=get_context("spawn"), initializer=_attend)
    try:
        yield lambda *call: _deaf()(pool.submit)(function, *call), many
    except BrokenProcessPool:
        raise TemporaryError("a decoder process was killed", AGAIN) from None
    finally:
        pool.shutdown(cancel_futures=True)  # the pool's own way: it trips over a future that others cancelled


@contextmanager
def _deaf() -> Iterator[None]:
    """Hold signals back while a worker may be started: it inherits that, until `_attend` has told it to ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OURS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _attend() -> None:
    """Begin a worker: signals to the group are for the parent to answer; without it a worker would wait for ever."""
    for one in OURS:
        signal.signal(one, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OURS)
    leave_with_parent()


def leave_with_parent() -> None:
    """End this process when the one that started it has ended, even by SIGKILL: it would work for nobody."""
    threading.Thread(target=_leave, daemon=True).start()


def _leave() -> None:
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)


@contextmanager
def _ray(function: Callable[..., T], workers: int) -> Iterator[tuple[Submit, int]]:
    """Tasks of the cluster that ``RAY_ADDRESS`` names, or of one on this machine; all nodes must see the cache."""
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingError("--engine ray needs the package ray", "pip install 'avrl[ray]'") from None
    begun, terminate = not ray.is_initialized(), signal.getsignal(signal.SIGTERM)
    try:
        if begun:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
            signal.signal(signal.SIGTERM, terminate)  # Ray's own would end without a word, and with another code
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise MissingError(f"no Ray cluster answers: {error}", "see RAY_ADDRESS, or leave --engine out") from None
    # A failed decode is an answer, not a failure of the machine: only the latter is worth another try.
    task = ray.remote(max_retries=2)(function)
    try:
        yield lambda *call: task.remote(*call).future(), workers or int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AvrlError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise TemporaryError(f"a Ray worker was lost ({type(error).__name__})", AGAIN) from None
    finally:
        if begun:
            ray.shutdown()

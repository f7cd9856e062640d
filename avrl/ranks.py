"""Ranks: the processes of one training run. Starting them, joining those of torchrun or Slurm, stopping together.

All ranks decide by the same all-reduced flags: ranks that disagree on whether to go on would wait for ever.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

import torch

from avrl import errors
from avrl.artifact import SCRATCH, write_durably
from avrl.errors import AvrlError, ConfigError, DivergedError, TemporaryError, UnsharedError
from avrl.workers import AGAIN, leave_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

    from accelerate import Accelerator
    from torch import Tensor

# Signals and the codes that a run ends with: USR1, Slurm's warning, asks for the same as SIGTERM.
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
# How long a collective waits for a rank that neither works nor dies: more than the longest save of the first rank,
# for which the others wait. A rank that dies is noticed at once.
PATIENCE_S = 600.0
PATIENCE = "AVRL_RANK_TIMEOUT"  # seconds, instead of that
SAVING_S = 100  # ranks that were sent a signal have so long to save: Slurm's warning comes 120 s before its kill
# What gloo says, and torch's store, when another rank is gone; NCCL has exceptions of its own.
GONE = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


def patience() -> timedelta:
    """How long the ranks wait for each other."""
    return timedelta(seconds=float(os.environ.get(PATIENCE, PATIENCE_S)))


@contextlib.contextmanager
def lost_ranks() -> Iterator[None]:
    """Tell what a rank hears of another one's end for what it is; also a decorator.

    Raises:
        TemporaryError: another rank has died, or has not answered for `patience`.
        ConfigError: NCCL cannot work as it is asked to.
    """
    try:
        yield
    except RuntimeError as error:
        line = " ".join(str(error).split())
        gone = isinstance(error, torch.distributed.DistError) or any(words in line for words in GONE)
        if not gone or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        if "ncclInvalidUsage" in line:  # it would say so again
            raise ConfigError(f"NCCL refuses: {line[-200:]}", "NCCL_DEBUG=WARN tells more") from error
        raise TemporaryError(f"another training process died or hangs: {line[-200:]}", AGAIN) from error


@dataclass
class Stop:
    """Set by SIGTERM, SIGINT or USR1 (Slurm's warning); looked at after every step.

    Attributes:
        code: The exit code that the signal asks for, or 0.
    """

    code: int = 0
    before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Stop:
        for one in SIGNALS:
            self.before[one] = signal.signal(one, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self.before.items():
            signal.signal(one, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.code = SIGNALS[signal.Signals(signum)]


class Stopped(SystemExit):
    """The run was asked to stop, and its state is saved. Its code is 130 for SIGINT, 143 for the others."""


# What all ranks find out together: the first one tells it.
AGREED = (Stopped, DivergedError, UnsharedError)


def agree(accelerator: Accelerator, loss: Tensor, norm: Tensor, stop: Stop, due: bool, step: int) -> tuple[int, bool]:
    """All ranks look at the same flags before the optimizer moves: what is not finite ends the run everywhere.

    The one exchange of a step beside that of gradients, and the one place where it waits for the device.

    Args:
        accelerator: The ranks.
        loss: This rank's.
        norm: Of the gradients, which may overflow where the loss does not.
        stop: What signals it was sent.
        due: Whether a snapshot is due; rank 0 says so for all, as clocks differ.
        step: For the message.

    Returns:
        The exit code that a signal to any rank asks for, or 0; and whether to save.

    Raises:
        DivergedError: the loss or a gradient is not finite on some rank.
    """
    due = due and accelerator.is_main_process
    bad, steep = ((~torch.isfinite(one.detach())).float() for one in (loss, norm))
    flags = torch.stack([bad, steep, torch.full_like(bad, stop.code), torch.full_like(bad, due)])
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    lost, overflown, code, save = flags.tolist()
    if lost or overflown:
        what = "the loss is" if lost else "the gradients are"
        raise DivergedError(
            f"{what} not finite at step {step}", "the last snapshot is intact: lower --lr, which starts over"
        )
    return int(code), bool(save or code)


def rank_of_job(gpus: int) -> int | None:
    """This process's rank if torchrun or Slurm has started several; None if it stands alone.

    Slurm's variables are translated to torch's, so that ``srun avrl pretrain ...`` needs no wrapper, on one node or on
    many. Their source is srun(1). A batch script has ``SLURM_NTASKS`` and ``SLURM_PROCID`` too, though nobody stands
    beside it: only what ``srun`` has started knows ``SLURM_STEP_NUM_TASKS``.

    Raises:
        ConfigError: more than one GPU is asked for, and not so many processes were started: some would stand idle.
    """
    here = os.environ
    if "RANK" not in here and int(here.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        here.setdefault("MASTER_ADDR", first_host(here["SLURM_STEP_NODELIST"]))
        here.setdefault("MASTER_PORT", str(20000 + int(here["SLURM_JOB_ID"]) % 20000))
        here["RANK"], here["WORLD_SIZE"] = here["SLURM_PROCID"], here["SLURM_STEP_NUM_TASKS"]
        # Where Slurm binds a GPU to each task, a task sees no other, and its own as number 0.
        here["LOCAL_RANK"] = "0" if torch.cuda.device_count() == 1 else here["SLURM_LOCALID"]
    started = int(here.get("WORLD_SIZE", "1"))
    if started > 1 and gpus not in (1, started):
        raise ConfigError(f"--gpus {gpus}, but {started} processes were started", "start one a GPU: srun --ntasks")
    return int(here["RANK"]) if started > 1 else None


def first_host(nodes: str) -> str:
    """The first node of a list as Slurm writes it, ``gpu[03-05,9]-a,login``: where the first rank is.

    ``scontrol show hostnames`` would tell, but a container seldom has it.
    """
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0] if first else nodes)


def require_shared(accelerator: Accelerator, out: Path, step: int) -> None:
    """Refuse ranks that would not go on from the same point of the same run: each sees a cache of its own.

    Raises:
        UnsharedError: on all of them.
    """
    if accelerator.num_processes == 1:
        return
    said: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(said, (f"step {step} of {out.name}", os.uname().nodename))
    for rank, (what, node) in enumerate(said):
        if what != said[0][0]:
            raise UnsharedError(
                f"process {rank}, on {node}, would train from {what}; the first, on {said[0][1]}, from {said[0][0]}",
                "let all nodes see one cache, and name it with --cache",
            )


def launch(train: Callable[..., dict[str, Any]], out: Path, processes: int, *args: Any) -> dict[str, Any]:
    """Run ``train(out, *args)`` on so many processes of this machine, started by torch's elastic launcher.

    Args:
        train: An importable function; what rank 0's call returns is returned.
        out: Directory that the processes share.
        processes: Number of ranks.
        args: Plain values, that travel to the processes.

    Raises:
        AvrlError: whatever a rank raised.
        TemporaryError: a process was killed.
        Stopped: a signal came; the state is saved.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    scratch = out / SCRATCH
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="avrl",
        max_restarts=0,
        start_method="spawn",
        signals_to_handle=",".join(one.name for one in SIGNALS),
        shutdown_timeout=SAVING_S,
        logs_specs=DefaultLogsSpecs(str(scratch / "ranks")),  # else each start leaves a folder in /tmp
    )
    for name in [
        one for one in logging.root.manager.loggerDict if one.startswith(("torch.distributed.", "torch.multi"))
    ]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # we say in one line what it says in thirty
    verdict = scratch / "verdict.json"
    scratch.mkdir(parents=True, exist_ok=True)
    verdict.unlink(missing_ok=True)
    before = {one: signal.getsignal(one) for one in SIGNALS}  # the launcher leaves its own behind
    _start_tracker()
    try:
        elastic_launch(config, _child)(train, out, verdict, logging.getLogger("avrl").getEffectiveLevel(), *args)
    except SignalException as error:
        raise Stopped(SIGNALS[error.sigval]) from None
    except ChildFailedError as error:
        _raise(verdict)
        words = str(error.get_first_failure()[1].message)[:200]
        raise TemporaryError(f"a training process died: {words}", AGAIN) from error
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    return _raise(verdict)


def together(train: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """``train(*args)`` as one rank, or alone; the group that it has joined ends with it, or NCCL complains at exit."""
    facts = train(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return facts


def _start_tracker() -> None:
    """Start Python's own helper so that USR1, which Slurm sends to all, does not end it: ignoring is inherited."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    resource_tracker.ensure_running()
    signal.signal(signal.SIGUSR1, before)


def _child(train: Callable[..., dict[str, Any]], out: Path, verdict: Path, level: int, *args: Any) -> None:
    """One rank's process: train, and leave a verdict that the parent can read.

    A process that returns waits for a word from the launcher, which gives none when a run is stopped: so it exits.
    """
    leave_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("avrl").setLevel(level if os.environ["RANK"] == "0" else max(level, logging.WARNING))
    word: dict[str, Any]
    try:
        facts = together(train, out, *args)
        if os.environ["RANK"] == "0":
            write_durably(verdict, json.dumps({"facts": facts}).encode())
        return
    except Stopped as stopped:
        word = {"stopped": stopped.code}
    except AvrlError as error:
        word = {"error": type(error).__name__, "args": error.args}
    except Exception as error:
        word = {"bug": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}
    if not verdict.exists():  # the first error is the cause: what the other ranks then hear is its echo
        write_durably(verdict, json.dumps(word).encode())
    sys.exit(word.get("stopped", 1))


def _raise(verdict: Path) -> dict[str, Any]:
    """A child's facts, or its error raised again."""
    word = json.loads(verdict.read_bytes()) if verdict.exists() else {}
    if "error" in word:
        raise getattr(errors, word["error"])(*word["args"])
    if "bug" in word:
        bug = RuntimeError(word["bug"])
        bug.add_note(word["where"])
        raise bug
    if "stopped" in word:
        raise Stopped(word["stopped"])
    facts: dict[str, Any] = word.get("facts", {})
    return facts

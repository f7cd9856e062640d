"""Ranks: the processes of one training run. Starting them, joining those of torchrun or Slurm, stopping together.

All ranks decide by the same all-reduced flags: ranks that disagree on whether to go on would wait for ever.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from avrl import errors
from avrl.artifact import SCRATCH, write_durably
from avrl.errors import AvrlError, DivergedError, TemporaryError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

    from accelerate import Accelerator
    from torch import Tensor


@dataclass
class Stop:
    """Set by SIGTERM, SIGINT or USR1 (Slurm's warning); looked at after every step."""

    signum: int = 0
    before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Stop:
        for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self.before[one] = signal.signal(one, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self.before.items():
            signal.signal(one, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum


class Stopped(SystemExit):
    """The run was asked to stop, and its state is saved. Its code is 130 or 143."""


def agree(accelerator: Accelerator, loss: Tensor, stop: Stop, step: int) -> int:
    """All ranks look at the same flags before the optimizer moves: a non-finite loss ends the run everywhere.

    Returns:
        The signal that any rank was sent, or 0.

    Raises:
        DivergedError: the loss is not finite on some rank.
    """
    flags = torch.stack([(~torch.isfinite(loss.detach())).float(), torch.full_like(loss.detach(), stop.signum)])
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    bad, signum = flags.tolist()
    if bad:
        raise DivergedError(
            f"the loss is not finite at step {step}", "the last snapshot is intact: lower --lr, which starts over"
        )
    return int(signum)


def told_by_first(accelerator: Accelerator, flag: bool) -> bool:
    """Whether rank 0 says so: clocks differ, and ranks that disagree on when to save would wait for ever."""
    if accelerator.num_processes == 1:
        return flag
    told = torch.tensor(float(flag), device=accelerator.device)
    torch.distributed.broadcast(told, 0)
    return bool(told.item())


def rank_of_job() -> int | None:
    """This process's rank if torchrun or Slurm has started several; None if it stands alone.

    Slurm's variables are translated to torch's, so that ``srun avrl pretrain ...`` needs no wrapper.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        if "MASTER_ADDR" not in os.environ:
            words = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
            os.environ["MASTER_ADDR"] = subprocess.check_output(words, text=True).split()[0]
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    return int(os.environ["RANK"]) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


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
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    verdict = out / SCRATCH / "verdict.json"
    verdict.parent.mkdir(parents=True, exist_ok=True)
    verdict.unlink(missing_ok=True)
    try:
        elastic_launch(config, _child)(train, out, verdict, *args)
    except SignalException as error:
        raise Stopped(128 + int(error.sigval)) from None
    except ChildFailedError as error:
        _raise(verdict)
        words = str(error.get_first_failure()[1].message)[:200]
        raise TemporaryError(f"a training process died: {words}", "run the same command: it goes on") from error
    return _raise(verdict)


def _child(train: Callable[..., dict[str, Any]], out: Path, verdict: Path, *args: Any) -> None:
    """One rank's process: train, and leave a verdict that the parent can read."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("avrl").setLevel(logging.INFO if os.environ["RANK"] == "0" else logging.WARNING)
    word: dict[str, Any]
    try:
        word = {"facts": train(out, *args)}
    except Stopped as stopped:
        word = {"stopped": stopped.code}
    except AvrlError as error:
        write_durably(verdict, json.dumps({"error": type(error).__name__, "args": error.args}).encode())
        raise
    if os.environ["RANK"] == "0":
        write_durably(verdict, json.dumps(word).encode())


def _raise(verdict: Path) -> dict[str, Any]:
    """A child's facts, or its error raised again."""
    word = json.loads(verdict.read_bytes()) if verdict.exists() else {}
    if "error" in word:
        raise getattr(errors, word["error"])(*word["args"])
    if "stopped" in word:
        raise Stopped(word["stopped"])
    facts: dict[str, Any] = word.get("facts", {})
    return facts

"""Job scripts that start one pretraining run: for Slurm, or for SkyPilot. They are printed, never submitted."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from avrl.config import fields_of
from avrl.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

GB_A_RANK = 40  # a g5.12xlarge has 48 for each of its four GPUs
SPARE_CORES = 2  # a rank's own, beside its decoder threads


def words(config: Any) -> list[str]:
    """The options that make a config, as they are typed; those that stand at their defaults are left out."""
    typed: list[str] = []
    for field in fields_of(type(config)):
        value, flag = getattr(config, field.name), field.opt.flag or f"--{field.name.replace('_', '-')}"
        if field.opt.hidden or value == field.default:
            continue
        typed += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
    return typed


def slurm(name: str, typed: list[str], cache: Path, *, gpus: int, workers: int) -> str:
    """An sbatch script: a task a GPU, warned two minutes before the time is up, queued again until it is done.

    Args:
        name: Of the job.
        typed: The command line after ``avrl``.
        cache: Where artifacts live; all nodes must see it.
        gpus: Of the node, a task each; `avrl.ranks` reads Slurm's variables.
        workers: Decoder threads a task.
    """
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={workers + SPARE_CORES}
#SBATCH --mem={GB_A_RANK * gpus}G
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.log
# Edit --time, and add --partition and --account as your cluster wants them.

export AVRL_CACHE={shlex.quote(str(cache.absolute()))}
srun {shlex.join(["avrl", *typed])}
code=$?
# 138: warned by USR1, and all is saved. The same command goes on from there.
if [ $code -eq 138 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
"""


def skypilot(name: str, typed: list[str], *, gpus: int, frames: str, sync: str) -> str:
    """A SkyPilot task on spot machines: for ``sky jobs launch``, which starts it again where it was taken back.

    Args:
        name: Of the task.
        typed: The command line after ``avrl``.
        gpus: A10G, of one machine.
        frames: Address of the frame store.
        sync: Where the run is kept.

    Raises:
        ConfigError: frames or run would lie on a disk that is gone with the machine.
    """
    for flag, address in (("--frames", frames), ("--sync", sync)):
        if not address.startswith("s3://"):
            raise ConfigError(
                f"--launch-script skypilot: a rented machine needs {flag} s3://...",
                "mirror the frames with: avrl prep --mirror s3://BUCKET/PREFIX",
            )
    return f"""name: {name}
resources:
  cloud: aws
  accelerators: A10G:{gpus}
  use_spot: true
  disk_size: 500  # GB, for the shards that have come
workdir: .  # a checkout of avrl
setup: |
  pip install -c constraints.txt -e .
run: |
  {shlex.join(["avrl", *typed])}
"""

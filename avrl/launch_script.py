"""Launch scripts: the text that runs one `avrl pretrain` on a Slurm cluster or by SkyPilot. Nothing is submitted here.

Both run the very words that were typed, so that what they make has the key of the run that was asked for, and a
job that was stopped goes on when the same script runs again.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from avrl import __version__
from avrl.errors import VERDICT, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

WARNING_S = 120  # before Slurm's kill: a snapshot of ViT-B takes seconds, on a slow disk a minute
MEMORY_GB = 8  # a process: torch beside a GPU takes some 4
DISK_GB = 100  # beside the frames: a system image with drivers takes some 50


@dataclass(frozen=True)
class Launch:
    """One run, as its scripts need it.

    Attributes:
        name: Of the job.
        words: What was typed after ``avrl``, without the options that the script takes over.
        gpus: Processes, one a GPU.
        workers: Decoder threads a process.
        on_gpu: False with ``--device cpu``.
        cache: Absolute path of the cache.
        folder: Absolute path of the folder that relative paths among the words start from.
        frames: Absolute path of the frames, or None if they lie on S3.
        frames_gb: Their size.
        source: What avrl was installed from, see `source`.
    """

    name: str
    words: Sequence[str]
    gpus: int
    workers: int
    on_gpu: bool
    cache: Path
    folder: Path
    frames: Path | None
    frames_gb: float
    source: Path | None = None


def source() -> Path | None:
    """The checkout or the wheel that this avrl comes from, as pip has noted it (PEP 610); None: a package index."""
    tree = Path(__file__).parents[1]
    if (tree / "pyproject.toml").is_file():  # installed with -e, or not at all
        return tree
    noted = json.loads(distribution("avrl").read_text("direct_url.json") or "{}")
    found = Path(url2pathname(urlsplit(noted.get("url", "")).path))
    return found if found.is_absolute() and found.exists() else None


def without(words: Sequence[str], *options: str) -> list[str]:
    """The words less these options and their values, ``--option value`` or ``--option=value``."""
    left, skip = [], False
    for word in words:
        name, given, _ = word.partition("=")
        if not skip and name not in options:
            left.append(word)
        skip = not skip and name in options and not given
    return left


def slurm(run: Launch) -> str:
    """An sbatch script: one task a GPU, on as many nodes as it takes; a warning before the time is over, and again.

    Source of the options: sbatch(1), srun(1), scontrol(1). How many GPUs a node has is known to Slurm alone, so tasks
    are asked for and no nodes; each must see all GPUs of its node (``--gpu-bind=none``), or NCCL cannot copy from one
    to the other directly. Since Slurm 22.05 ``srun`` does not take over ``--cpus-per-task``. A dead task takes the
    others with it at once; the other way round, the first one still copies to S3 when the others have ended, which the
    cluster's own limit for that (``--wait``) must not cut short.

    Raises:
        ConfigError: a word or path that a script cannot hold.
    """
    cores = run.workers + 1
    gpu, bind = (["#SBATCH --gpus-per-task=1"], " --gpu-bind=none") if run.on_gpu else ([], "")
    lines = [
        "#!/bin/bash",
        f"# Printed by avrl {__version__}, and not submitted. Save it in a file and type: sbatch FILE",
        "# Edit this line: the longest turn that your queue gives. A run that needs more goes on in the next turn.",
        "#SBATCH --time=24:00:00",
        f"#SBATCH --job-name={run.name}",
        "# Slurm places the tasks on one node or several, all of which must see the cache. To say how many nodes:",
        "# sbatch --nodes=2 FILE",
        f"#SBATCH --ntasks={run.gpus}",
        f"#SBATCH --cpus-per-task={cores}",
        *gpu,
        f"#SBATCH --mem-per-cpu={-(-MEMORY_GB * 1024 // cores)}M",
        f"#SBATCH --signal=USR1@{WARNING_S}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=%x-%j.out",
        "",
        f"cd {_quoted(run.folder)} || exit 2",
        f"export AVRL_CACHE={_quoted(run.cache)}",
        "# Why a process failed for good: srun may only tell that the others were killed then (137).",
        f'export {VERDICT}="$AVRL_CACHE/.slurm-$SLURM_JOB_ID"',
        f'rm -f "${VERDICT}"',
        "# If avrl is not on the PATH that you submit with, activate its environment here.",
        f"srun --kill-on-bad-exit=1 --wait=0 --cpus-per-task={cores}{bind} avrl {_line(run.words)}",
        "code=$?",
        f'[ ! -s "${VERDICT}" ] || code=$(cat "${VERDICT}")',
        f'rm -f "${VERDICT}"',
        "# 143: stopped and saved. 5, or a process killed (134, 137): another try may help, but not for ever.",
        "case $code in",
        '143) scontrol requeue "$SLURM_JOB_ID" ;;',
        '5 | 134 | 137) [ "${SLURM_RESTART_COUNT:-0}" -ge 10 ] || scontrol requeue "$SLURM_JOB_ID" ;;',
        "esac",
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def skypilot(run: Launch) -> str:
    """A SkyPilot task: a spot machine with the GPUs, the frames copied to it or read from S3, and the same words.

    Source of the fields: SkyPilot's task YAML specification. avrl itself comes as it is installed here.

    ``--gpus N`` starts torch's launcher with a process a GPU, as torchrun would, and has avrl's exit codes.

    Raises:
        ConfigError: a word or path that a script cannot hold; ``--like``, whose folder is not on that machine.
    """
    accelerators = [f"  accelerators: A10G:{run.gpus}"] * run.on_gpu
    if any(word.partition("=")[0] == "--like" for word in run.words):
        raise ConfigError("--like names a folder that another machine lacks", "type the options that it stands for")
    # SkyPilot ends its machines itself, and takes one that powers itself off for lost: it would get another.
    words, workdir, mounts, package = [one for one in run.words if one != "--shutdown"], [], {}, f"avrl=={__version__}"
    if run.source and run.source.is_dir():
        workdir, package = [f"workdir: {_text(str(run.source))}"], "."
    elif run.source:
        package = f"~/{_quoted(run.source.name)}"
        mounts[f"~/{run.source.name}"] = run.source
    if run.frames:
        words = [*without(words, "--frames"), "--frames", run.frames.name]
        mounts[f"~/avrl-cache/frames/{run.frames.name}"] = run.frames
    lines = [
        f"# Printed by avrl {__version__}, and not submitted. Save it in a file and type: sky jobs launch FILE",
        "# A spot machine may be taken away at any time: what is not on S3 by then is lost.",
        f"name: {run.name}",
        *workdir,
        "resources:",
        *accelerators,
        f"  cpus: {run.gpus * (run.workers + 1)}+",
        f"  memory: {MEMORY_GB * run.gpus}+",
        f"  disk_size: {DISK_GB + round(run.frames_gb)}",
        "  use_spot: true",
        "  job_recovery:  # 143: EC2 takes the machine back, and the run is saved; 5: another try may help",
        "    recover_on_exit_codes: [5, 143]",
        *["file_mounts:"] * bool(mounts),
        *[f"  {_text(there)}: {_text(str(here))}" for there, here in mounts.items()],
        "setup: |",
        "  # Of its own: SkyPilot's machines have an older Python, or none. Its own uv, if there is one, lies there.",
        "  export PATH=~/.local/bin:$PATH",
        "  command -v uv || python3 -m pip install --user uv",
        "  uv venv --seed --python 3.11 ~/avrl-env",
        f"  ~/avrl-env/bin/pip install {package}",
        "run: |",
        "  export AVRL_CACHE=~/avrl-cache PATH=~/avrl-env/bin:$PATH",
        f"  avrl {_line(words)}",
    ]
    return "\n".join(lines) + "\n"


SCRIPTS = {"slurm": slurm, "skypilot": skypilot}


def _line(words: Sequence[str]) -> str:
    return " ".join(_quoted(word) for word in words)


def _quoted(word: object) -> str:
    """A word as a shell takes it."""
    return shlex.quote(_printable(str(word)))


def _text(text: str) -> str:
    """A YAML scalar in double quotes: JSON's are YAML's."""
    return json.dumps(_printable(text), ensure_ascii=False)


def _printable(word: str) -> str:
    """YAML has no raw control characters, and a line of #SBATCH or of YAML no second line."""
    if not word.isprintable():
        raise ConfigError(f"{word!r} has characters that a script cannot hold", "use another name")
    return word

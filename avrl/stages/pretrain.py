"""The ``checkpoints`` stage: frame store -> pretrained encoder. Its only data input is ``frames``: no action."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from avrl.config import Opt, as_json
from avrl.errors import ConfigError
from avrl.stage import Built, Inputs, Stage

if TYPE_CHECKING:
    from pathlib import Path

    from avrl.cache import Cache
    from avrl.training import Recipe


OBJECTIVES = ("two-stream", "single-stream", "videomae")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What to pretrain, and how. Defaults are the plan's: 30 epochs, global batch 24, AdamW."""

    objective: Annotated[Literal["two-stream", "single-stream", "videomae"], Opt("Objective", hidden=True)] = (
        "two-stream"
    )
    size: Annotated[Literal["tiny", "small", "base"], Opt("Encoder: ViT-B/16, ViT-S/16, or tiny for a CPU")] = "base"
    image_size: Annotated[int, Opt("Side of the square input", unit="px")] = 224
    epochs: Annotated[int, Opt("Passes over all episodes")] = 30
    pairs_per_episode: Annotated[int, Opt("Frame pairs of each episode in one epoch")] = 100
    batch_size: Annotated[int, Opt("Global batch, over all GPUs", unit="pairs")] = 24
    lr: Annotated[float, Opt("Peak learning rate of AdamW")] = 1e-4
    weight_decay: Annotated[float, Opt("Weight decay of matrices")] = 0.05
    warmup_epochs: Annotated[float, Opt("Linear warm-up before the cosine", unit="epochs")] = 1.0
    max_gap: Annotated[int, Opt("Largest gap between the two frames", unit="frames")] = 10
    sample_decay: Annotated[float, Opt("p(gap) is proportional to this^(gap-1)")] = 0.8
    loss_decay: Annotated[float, Opt("A gap's weight in the loss is this^(gap-1)")] = 0.5
    mask_ratio: Annotated[float, Opt("Share of patches that VideoMAE hides")] = 0.75
    precision: Annotated[Literal["auto", "fp32", "bf16"], Opt("auto: bf16 where the GPU has it")] = "auto"
    seed: Annotated[int, Opt("Of initial weights, order, gaps and masks")] = 0
    gpus: Annotated[int, Opt("Processes to start here, one a GPU", runtime=True)] = 1
    device: Annotated[Literal["auto", "cpu"], Opt("auto: a GPU if there is one", runtime=True)] = "auto"
    workers: Annotated[int, Opt("Decoder threads a process", runtime=True)] = 2
    frames_cap: Annotated[float, Opt("Disk for frames that lie on S3; 0: all but 1 GB", unit="GB", runtime=True)] = 0.0
    save_minutes: Annotated[float, Opt("Between snapshots", unit="minutes", runtime=True)] = 10.0

    def __post_init__(self) -> None:
        if self.image_size < 16 or self.image_size % 16:
            raise ConfigError(f"--image-size {self.image_size} is not a multiple of 16 px", "try 224")
        for name in ("epochs", "pairs_per_episode", "batch_size", "max_gap", "gpus", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} is less than 1")
        for name in ("sample_decay", "loss_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} is not in (0, 1]")
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"--mask-ratio {self.mask_ratio} is not in (0, 1)")
        if self.batch_size % self.gpus:
            raise ConfigError(f"--batch-size {self.batch_size} does not divide among {self.gpus} GPUs")


def _slug(config: PretrainConfig, inputs: Inputs) -> str:
    return f"{config.objective}-{config.size}-{inputs['frames'].manifest.facts['source']}"


def recipe(config: PretrainConfig) -> Recipe:
    """The training code's view of the config."""
    from avrl.pairs import Sampling
    from avrl.training import Recipe

    network: dict[str, Any] = {
        name: getattr(config, name) for name in ("objective", "size", "image_size", "loss_decay", "mask_ratio", "seed")
    }
    return Recipe(
        network=network,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        weight_decay=config.weight_decay,
        warmup_epochs=config.warmup_epochs,
        sampling=Sampling(config.seed, config.max_gap, config.sample_decay, config.pairs_per_episode),
        precision=config.precision,
        device=config.device,
        threads=config.workers,
        save_minutes=config.save_minutes,
    )


def _build(config: PretrainConfig, inputs: Inputs, out: Path) -> Built:
    from avrl.export import export
    from avrl.ranks import launch, rank_of_job
    from avrl.training import train

    frames = inputs["frames"]
    if rank_of_job() is None and config.gpus > 1:
        facts = launch(train, out, config.gpus, frames.root, recipe(config))
    else:
        facts = train(out, frames.root, recipe(config))
    export(out, as_json(config, runtime=False), facts, frames)
    return Built(facts)


STAGE = Stage(name="checkpoints", version=3, config=PretrainConfig, slug=_slug, build=_build)


def follow(config: PretrainConfig, inputs: Inputs, cache: Cache) -> bool:
    """Join a run as one of the ranks that torchrun or Slurm started beside the first.

    The first rank finds, builds and publishes; the others only train in the same directory.

    Returns:
        False for the first rank and for a process that stands alone: they run the stage.
    """
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        return False
    from avrl.ranks import rank_of_job
    from avrl.training import train

    key = STAGE.key(config, inputs)
    if rank_of_job() is None or cache.find(STAGE.name, key):
        return rank_of_job() is not None
    partial = cache.partial(STAGE.name, STAGE.slug(config, inputs), key)
    partial.mkdir(parents=True, exist_ok=True)
    train(partial, inputs["frames"].root, recipe(config))
    return True

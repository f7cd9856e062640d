"""The ``checkpoints`` stage: frame store -> pretrained encoder. Its only data input is ``frames``: no action."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from avrl.addresses import require_bucket
from avrl.cache import PARTIAL
from avrl.config import Opt, as_json, seconds
from avrl.errors import ConfigError
from avrl.stage import Built, Inputs, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from avrl.artifact import Artifact
    from avrl.cache import Cache
    from avrl.objectives import Network
    from avrl.training import Recipe


OBJECTIVES = ("two-stream", "single-stream", "videomae")
MEANT_FOR = {  # options that are refused with any other objective
    "decoder": ("two-stream", "single-stream"),
    "ablate": ("two-stream",),
    "exchanges": ("two-stream",),
    "num_frames": ("videomae",),
    "mask_ratio": ("videomae",),
}
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(
        ("epochs", "pairs_per_episode", "batch_size", "max_gap", "gpus", "accumulate"),
        (lambda n: n >= 1, "is less than 1"),
    ),
    **dict.fromkeys(
        ("look_every", "probe_every", "workers", "weight_decay", "warmup_epochs", "save_minutes", "frames_cap"),
        (lambda n: n >= 0, "is less than 0"),
    ),
    "lr": (lambda x: x > 0, "is not above 0"),
    **dict.fromkeys(("sample_decay", "loss_decay"), (lambda x: 0 < x <= 1, "is not in (0, 1]")),
    **dict.fromkeys(("mask_ratio", "ema"), (lambda x: 0 <= x < 1, "is not in [0, 1)")),
}
MASK_RATIO = {2: 0.75, 16: 0.9}  # the plan's; Tong et al. 2022 (VideoMAE)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What to pretrain, and how. Defaults are the plan's: 30 epochs, global batch 24, AdamW."""

    objective: Annotated[Literal["two-stream", "single-stream", "videomae"], Opt("Objective", hidden=True)] = (
        "two-stream"
    )
    size: Annotated[Literal["tiny", "small", "base"], Opt("Encoder: ViT-B/16, ViT-S/16, or tiny for a CPU")] = "base"
    image_size: Annotated[int, Opt("Side of the square input", unit="px")] = 224
    decoder: Annotated[
        Literal["bottleneck", "fused"], Opt("Sees frame t's patches and change_emb, or the change's patches too")
    ] = "bottleneck"
    ablate: Annotated[
        Literal["none", "m-only", "p-only", "no-exchange", "early-fusion"],
        Opt("Two-Stream without a part; p-only cannot know what changes"),
    ] = "none"
    exchanges: Annotated[Literal[0, 1, 2, 3], Opt("Stages after which Two-Stream's CLS exchange, 0 to 3")] = 2
    num_frames: Annotated[Literal[2, 16], Opt("VideoMAE's frames a sample, 2 or 16, a gap apart each")] = 2
    epochs: Annotated[int, Opt("Passes over all episodes")] = 30
    pairs_per_episode: Annotated[int, Opt("Frame pairs of each episode in one epoch")] = 100
    batch_size: Annotated[int, Opt("Global batch, over all GPUs", unit="pairs")] = 24
    lr: Annotated[float, Opt("Peak learning rate of AdamW")] = 1e-4
    weight_decay: Annotated[float, Opt("Weight decay of matrices")] = 0.05
    warmup_epochs: Annotated[float, Opt("Linear warm-up before the cosine", unit="epochs")] = 1.0
    gaps: Annotated[
        Literal["ratio", "uniform", "triangular"],
        Opt("Shape of p(gap): falling by --sample-decay, flat, or highest at half of --max-gap"),
    ] = "ratio"
    max_gap: Annotated[int, Opt("Largest gap between the two frames", unit="frames")] = 10
    sample_decay: Annotated[float, Opt("With --gaps ratio, p(gap) is proportional to this^(gap-1)")] = 0.8
    loss_decay: Annotated[float, Opt("A gap's weight in the loss is this^(gap-1); 1 learns sooner")] = 0.5
    mask_ratio: Annotated[float, Opt("Share of patches VideoMAE hides; 0: .75, or .9 of 16 frames")] = 0.0
    augment: Annotated[bool, Opt("One random crop, flip and change of colours for both frames of a pair")] = False
    ema: Annotated[float, Opt("Keep a running mean of the weights, of this decay, instead of the last; 0: off")] = 0.0
    precision: Annotated[Literal["auto", "fp32", "bf16"], Opt("auto: bf16 where the GPU has it")] = "auto"
    seed: Annotated[int, Opt("Of initial weights, order, gaps, masks and augmentation")] = 0
    gpus: Annotated[int, Opt("Processes to start here, one a GPU", runtime=True)] = 1
    accumulate: Annotated[int, Opt("Parts that a GPU's share of a batch is worked off in", runtime=True)] = 1
    compile: Annotated[bool, Opt("Compile the blocks: a minute at first, then faster steps", runtime=True)] = False
    device: Annotated[Literal["auto", "cpu"], Opt("auto: a GPU if there is one", runtime=True)] = "auto"
    workers: Annotated[int, Opt("Decoder threads a process; 0: none beside the training", runtime=True)] = 2
    frames_cap: Annotated[float, Opt("Disk for frames that lie on S3; 0: all but 1 GB", unit="GB", runtime=True)] = 0.0
    save_minutes: Annotated[float, Opt("Between snapshots", unit="minutes", runtime=True)] = 10.0
    look_every: Annotated[
        int,
        Opt("Between pictures and meters of held-out pairs; 0: 20 a run, more at first", unit="steps", runtime=True),
    ] = 0
    probe_every: Annotated[
        int, Opt("Between probes of held-out motion, no labels; 0: none", unit="steps", runtime=True)
    ] = 0
    tracker: Annotated[
        Literal["none", "tensorboard", "wandb", "trackio"], Opt("Where the log goes as well", runtime=True)
    ] = "none"
    sync: Annotated[str, Opt("Keep the run on s3://BUCKET/PREFIX, and go on from there", runtime=True)] = ""
    sync_every: Annotated[str, Opt("Snapshots go to S3 at most this often", unit="90s, 10m, 2h", runtime=True)] = "10m"
    shutdown: Annotated[bool, Opt("Power this machine off once all is on S3 and verified", runtime=True)] = False

    def __post_init__(self) -> None:
        if self.image_size < 16 or self.image_size % 16:
            raise ConfigError(f"--image-size {self.image_size} is not a multiple of 16 px", "try 224")
        for name, (fits, words) in RANGES.items():
            if not fits(getattr(self, name)):
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} {words}")
        _require_somewhere_to_keep(self)
        if self.gaps != "ratio" and self.sample_decay != PretrainConfig.sample_decay:
            raise ConfigError(f"--sample-decay {self.sample_decay} has no part in --gaps {self.gaps}", "leave it out")
        if self.batch_size % (self.gpus * self.accumulate):
            parts = f" x --accumulate {self.accumulate}" if self.accumulate > 1 else ""
            raise ConfigError(f"--batch-size {self.batch_size} does not divide among {self.gpus} GPUs{parts}")


def _require_somewhere_to_keep(config: PretrainConfig) -> None:
    seconds(config.sync_every, "sync_every")
    if config.sync:
        require_bucket(config.sync)
    elif config.shutdown:
        raise ConfigError("--shutdown without --sync would lose the checkpoint", "add --sync s3://BUCKET/PREFIX")


def settled(config: PretrainConfig) -> PretrainConfig:
    """The config with one spelling for one network; ask again for what is settled and it stays.

    Raises:
        ConfigError: an option has no meaning for the objective, or for the ablation.
    """
    of = config.objective
    for name, objectives in MEANT_FOR.items():
        value, default = getattr(config, name), getattr(PretrainConfig, name)
        if value != default and of not in objectives:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} {value} has no meaning for {of}", f"leave it at {default}")
    apart = config.ablate == "no-exchange"
    if config.ablate != "none" and config.exchanges not in ((0, 2) if apart else (2,)):
        raise ConfigError(
            f"--exchanges {config.exchanges} has no meaning with --ablate {config.ablate}", "leave it out"
        )
    if config.ablate == "p-only" and config.decoder == "fused":
        raise ConfigError("--decoder fused has no meaning with --ablate p-only: there is no M to fuse", "leave it out")
    if apart or config.exchanges == 0:
        return replace(config, ablate="no-exchange", exchanges=0)
    if of == "videomae" and not config.mask_ratio:
        return replace(config, mask_ratio=MASK_RATIO[config.num_frames])
    return config


def network(config: Mapping[str, Any]) -> Network:
    """The network of a manifest's config; what one of an earlier avrl lacks has its default."""
    from avrl.objectives import Network

    return Network(**{field.name: config[field.name] for field in fields(Network) if field.name in config})


def _slug(config: PretrainConfig, inputs: Inputs) -> str:
    return f"{network(vars(config)).name}-{config.size}-{inputs['frames'].manifest.facts['source']}"


def recipe(config: PretrainConfig) -> Recipe:
    """The training code's view of the config."""
    from avrl.pairs import Sampling
    from avrl.training import Recipe

    return Recipe(
        network=asdict(network(vars(settled(config)))),
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        weight_decay=config.weight_decay,
        warmup_epochs=config.warmup_epochs,
        sampling=Sampling(
            config.seed,
            config.max_gap,
            config.sample_decay,
            config.pairs_per_episode,
            gaps=config.gaps,
            num_frames=config.num_frames,
        ),
        precision=config.precision,
        device=config.device,
        threads=config.workers,
        save_minutes=config.save_minutes,
        augment=config.augment,
        ema=config.ema,
        accumulate=config.accumulate,
        compile=config.compile,
        look_every=config.look_every,
        probe_every=config.probe_every,
        tracker=config.tracker,
    )


def _build(config: PretrainConfig, inputs: Inputs, out: Path) -> Built:
    from avrl.trackers import require

    require(config.tracker)
    if not config.sync:
        return _trained(config, inputs["frames"], out)
    from avrl.sync import syncing

    with syncing(_bucket(config), STAGE.key(config, inputs), out, seconds(config.sync_every, "sync_every")):
        return _trained(config, inputs["frames"], out)


def _bucket(config: PretrainConfig) -> str:
    return config.sync.rstrip("/")


def _trained(config: PretrainConfig, frames: Artifact, out: Path) -> Built:
    from avrl.devices import require_gpus
    from avrl.export import export
    from avrl.ranks import launch, rank_of_job, together
    from avrl.training import train

    if rank_of_job(config.gpus) is None and config.gpus > 1:
        require_gpus(config.device, config.gpus)
        facts = launch(train, out, config.gpus, frames.root, recipe(config))
    else:
        facts = together(train, out, frames.root, recipe(config))
    export(out, as_json(config, runtime=False), facts, frames)
    return Built(facts)


STAGE = Stage(name="checkpoints", version=5, config=PretrainConfig, slug=_slug, build=_build)


def arrive(config: PretrainConfig, inputs: Inputs, cache: Cache) -> None:
    """With ``--sync``, bring the finished checkpoint of this request from S3 if it is there and not here.

    Raises:
        ConfigError: ``--shutdown``, and this machine has no command for it.
        TemporaryError: S3 fails, and there is nothing here to go on from.
        IntegrityError: it is damaged there.
    """
    if config.shutdown:
        from avrl.machine import require_power_off

        require_power_off()
    key, slug = STAGE.key(config, inputs), STAGE.slug(config, inputs)
    if config.sync and not cache.find(STAGE.name, key):
        from avrl.remoterun import bring_artifact

        bring_artifact(_bucket(config), cache.partial(STAGE.name, slug, key), cache.path(STAGE.name, slug, key), key)


def leave(config: PretrainConfig, artifact: Artifact) -> None:
    """With ``--sync``, and the checkpoint on S3: its snapshots go from there, and with ``--shutdown`` the machine.

    Raises:
        SyncError: the copy on S3 does not verify, or the machine would not power off.
    """
    from avrl.machine import power_off
    from avrl.remoterun import Snapshots, verify

    if config.shutdown:
        verify(artifact, _bucket(config))
    Snapshots(f"{_bucket(config)}/{PARTIAL}{artifact.ref}", artifact.manifest.key).forget()
    if config.shutdown:
        power_off()


def is_first() -> bool:
    """Whether this process stands alone, or is the first of those that torchrun or Slurm started."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def follow(config: PretrainConfig, inputs: Inputs, cache: Cache) -> bool:
    """Join a run as one of the ranks that torchrun or Slurm started beside the first.

    The first rank finds, builds and publishes; the others only train in the same directory. What all find out
    together is the first one's to tell: a second exit code would hide it, and srun kills the others at the first.

    Returns:
        False for the first rank and for a process that stands alone: they run the stage.
    """
    if is_first():
        return False
    from avrl.machine import heeding
    from avrl.ranks import AGREED, rank_of_job, together
    from avrl.remoterun import is_finished
    from avrl.training import train

    key, rank = STAGE.key(config, inputs), rank_of_job(config.gpus)
    if rank is None or cache.find(STAGE.name, key):
        return rank is not None
    slug = STAGE.slug(config, inputs)
    partial = cache.partial(STAGE.name, slug, key)
    if config.sync and is_finished(_bucket(config), cache.path(STAGE.name, slug, key).name, partial):
        return True  # the first rank brings it
    partial.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(*AGREED), heeding() if config.sync else contextlib.nullcontext():
        together(train, partial, inputs["frames"].root, recipe(config))
    return True

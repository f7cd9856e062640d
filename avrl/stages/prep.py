"""The ``frames`` stage: raw -> frame store."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from avrl.artifact import SCRATCH
from avrl.cache import Cache
from avrl.config import Opt
from avrl.errors import ConfigError
from avrl.stage import Built, Inputs, Stage

if TYPE_CHECKING:
    from avrl.artifact import Artifact
    from avrl.frames import Job, Share
    from avrl.plan import Plan


AMPLE = 20  # times the source's bytes: with so much room, a store fits that nobody has planned


@dataclass(frozen=True, kw_only=True)
class PrepConfig:
    """How episodes become frames."""

    image_size: Annotated[int, Opt("Side of the square frames", unit="px")] = 224
    crop: Annotated[
        Literal["center", "none"], Opt("Keep the central square, or squeeze the whole picture into one")
    ] = "center"
    fps: Annotated[float, Opt("Keep so many frames a second; 0 keeps all", unit="1/s")] = 0.0
    quality: Annotated[int, Opt("JPEG quality of the store, 4:4:4", unit="1..100")] = 90
    on_error: Annotated[
        Literal["fail", "drop"], Opt("Damaged episode: stop, or list it in dropped.parquet and go on")
    ] = "fail"
    shard: Annotated[str, Opt("Make only the i-th of n shares; `avrl prep` without it joins them", unit="i/n")] = ""
    workers: Annotated[int, Opt("Decoders at a time; 0 means one a core", runtime=True)] = 0
    mirror: Annotated[str, Opt("Copy the store to s3://BUCKET/PREFIX, its manifest last", runtime=True)] = ""
    price: Annotated[float, Opt("What this machine costs: --dry-run tells the money", unit="$/h", runtime=True)] = 0.0
    engine: Annotated[
        Literal["processes", "ray"], Opt("Decode in processes here, or as tasks of a Ray cluster", runtime=True)
    ] = "processes"

    def __post_init__(self) -> None:
        if self.image_size < 16 or self.image_size % 16:
            raise ConfigError(f"--image-size {self.image_size} is not a multiple of 16 px", "try 224")
        if self.mirror and not self.mirror.startswith("s3://"):
            raise ConfigError(f"--mirror {self.mirror} is no bucket", "s3://BUCKET/PREFIX")
        if self.fps < 0:
            raise ConfigError(f"--fps {self.fps:g} is less than none", "try 10, or 0 for all")
        if self.shard:
            match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.shard)
            if not match or int(match[1]) > int(match[2]):
                raise ConfigError(f"--shard {self.shard} is not i/n with i from 1 to n", "try --shard 1/8")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality {self.quality} is not in 1..100", "try 90")


def _slug(config: PrepConfig, inputs: Inputs) -> str:
    words = [inputs["raw"].ref.rsplit("-", 1)[0], f"{config.image_size}px"]
    words += [f"{config.fps:g}fps"] * (config.fps > 0)
    words += [config.shard.replace("/", "of")] * bool(config.shard)
    return "-".join(words)


def _build(config: PrepConfig, inputs: Inputs, out: Path) -> Built:
    from avrl.frames import prepare
    from avrl.video import chain

    cache, job, share = Cache(out.parent.parent), _job(config, inputs, out / SCRATCH), _share(config)
    partials = [] if config.shard else _partials(config, inputs, cache)
    scarce = cache.free() < AMPLE * inputs["raw"].manifest.facts.get("bytes", 0)
    if scarce and not partials and not (out / SCRATCH).exists():  # else what is begun has been found to fit
        _plan(config, inputs, out / SCRATCH, cache)
    facts = prepare(job, out, workers=config.workers, engine=config.engine, share=share, partials=partials)
    return Built({**facts, "pixels": chain()})


def _job(config: PrepConfig, inputs: Inputs, scratch: Path) -> Job:
    from avrl.episodes import View
    from avrl.frames import Job

    return Job(
        source=inputs["raw"].manifest.config["source"],
        raw=inputs["raw"].root,
        scratch=scratch,
        view=View(config.image_size, config.crop, config.fps),
        quality=config.quality,
        drop=config.on_error == "drop",
    )


def _share(config: PrepConfig) -> Share:
    from avrl.frames import Share

    return Share(*map(int, config.shard.split("/"))) if config.shard else Share()


def _plan(config: PrepConfig, inputs: Inputs, scratch: Path, cache: Cache) -> Plan:
    from avrl.plan import estimate

    job = _job(config, inputs, scratch)
    plan = estimate(job, workers=config.workers, engine=config.engine, share=_share(config))
    cache.require_space(plan.bytes, f"the frame store of {inputs['raw'].ref}")
    return plan


def plan(config: PrepConfig, inputs: Inputs, cache: Cache) -> Plan:
    """What a build would come to, from a few clips that are decoded and thrown away.

    Raises:
        DiskFullError: it does not fit.
        IntegrityError: there is no usable clip.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A damaged clip is for the build to refuse or to drop.
        return _plan(replace(config, on_error="drop"), inputs, Path(folder), cache)


def _partials(config: PrepConfig, inputs: Inputs, cache: Cache) -> list[Artifact]:
    """The finished shares of this very request, whoever made them."""
    shares = [(one, one.manifest.config.get("shard")) for one in cache.artifacts(STAGE.name)]
    return [one for one, i_n in shares if i_n and one.manifest.key == STAGE.key(replace(config, shard=i_n), inputs)]


STAGE = Stage(name="frames", version=2, config=PrepConfig, slug=_slug, build=_build)


def whole(frames: Artifact) -> bool:
    """Whether a frame store has all of its source, not only a share of it."""
    return not frames.manifest.config.get("shard")

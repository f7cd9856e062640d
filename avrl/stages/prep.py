"""The ``frames`` stage: raw -> frame store."""

from __future__ import annotations

import logging
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from avrl.addresses import require_bucket
from avrl.artifact import SCRATCH
from avrl.cache import Cache
from avrl.config import AT_LEAST_0, Opt, require_ranges
from avrl.errors import ConfigError
from avrl.stage import Built, Inputs, Stage

if TYPE_CHECKING:
    from avrl.artifact import Artifact
    from avrl.frames import Job, Share
    from avrl.plan import Plan


log = logging.getLogger(__name__)

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
        if self.mirror:
            require_bucket(self.mirror)
        require_ranges(self, dict.fromkeys(("fps", "workers", "price"), AT_LEAST_0))
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
    from avrl.copies import require_same
    from avrl.frames import prepare
    from avrl.video import chain

    require_same(inputs["raw"])
    cache, job, share = Cache(out.parent.parent), _job(config, inputs, out / SCRATCH), _share(config)
    partials = _partials(config, inputs, cache)
    planned = out / SCRATCH / "planned"  # to fit
    if cache.free() < AMPLE * inputs["raw"].manifest.facts.get("bytes", 0) and not planned.exists():
        _plan(config, inputs, job, partials, cache)
        planned.touch()
    facts = prepare(job, out, workers=config.workers, engine=config.engine, share=share, partials=partials)
    pixels = {chain(), *(text for one in partials for text in one.manifest.facts["pixels"])}
    if len(pixels) > 1:
        log.warning("shares were made by different libavs, which may round differently: %s", ", ".join(sorted(pixels)))
    return Built({**facts, "pixels": sorted(pixels)})


def _job(config: PrepConfig, inputs: Inputs, scratch: Path) -> Job:
    from avrl.episodes import View
    from avrl.frames import Job

    return Job(
        source=inputs["raw"].manifest.config["source"],
        raw=inputs["raw"].root.absolute(),  # a Ray worker has another working directory
        scratch=scratch.absolute(),
        view=View(config.image_size, config.crop, config.fps),
        quality=config.quality,
        drop=config.on_error == "drop",
    )


def _share(config: PrepConfig) -> Share:
    from avrl.frames import Share

    return Share(*map(int, config.shard.split("/"))) if config.shard else Share()


def _plan(config: PrepConfig, inputs: Inputs, job: Job, partials: list[Artifact], cache: Cache) -> Plan:
    from avrl.frames import made_units
    from avrl.packing import Packer, episodes_of
    from avrl.plan import estimate

    begun = cache.partial(STAGE.name, _slug(config, inputs), STAGE.key(config, inputs))
    linked = [index for unit in made_units(partials) for index in episodes_of(unit)]
    done = {*range(Packer(begun).next), *linked}
    plan = estimate(job, workers=config.workers, engine=config.engine, share=_share(config), done=done)
    cache.require_space(plan.bytes, f"the frame store of {inputs['raw'].ref}")
    return plan


def plan(config: PrepConfig, inputs: Inputs, cache: Cache) -> Plan:
    """What a build would come to, from a few clips that are decoded and thrown away.

    Raises:
        DiskFullError: it does not fit.
        IntegrityError: there is no usable clip.
    """
    if config.engine == "ray":  # other machines see the cache, not this one's /tmp
        cache.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.root if config.engine == "ray" else None) as folder:
        job = replace(_job(config, inputs, Path(folder)), drop=True)  # damage is for the build to refuse
        return _plan(config, inputs, job, _partials(config, inputs, cache), cache)


def _partials(config: PrepConfig, inputs: Inputs, cache: Cache) -> list[Artifact]:
    """The finished shares of this very request, whoever made them; none for a request that is a share itself."""
    if config.shard:
        return []
    shares = [(one, one.manifest.config.get("shard")) for one in cache.artifacts(STAGE.name)]
    return [one for one, i_n in shares if i_n and one.manifest.key == STAGE.key(replace(config, shard=i_n), inputs)]


STAGE = Stage(name="frames", version=3, config=PrepConfig, slug=_slug, build=_build)


def whole(frames: Artifact) -> bool:
    """Whether a frame store has all of its source, not only a share of it."""
    return not frames.manifest.config.get("shard")

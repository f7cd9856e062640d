"""The ``frames`` stage: raw -> frame store."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from avrl.config import Opt
from avrl.errors import ConfigError
from avrl.stage import Built, Inputs, Stage

if TYPE_CHECKING:
    from pathlib import Path


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
    workers: Annotated[int, Opt("Decoder processes; 0 means one a core", runtime=True)] = 0

    def __post_init__(self) -> None:
        if self.image_size < 16 or self.image_size % 16:
            raise ConfigError(f"--image-size {self.image_size} is not a multiple of 16 px", "try 224")
        if self.fps < 0:
            raise ConfigError(f"--fps {self.fps:g} is less than none", "try 10, or 0 for all")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality {self.quality} is not in 1..100", "try 90")


def _slug(config: PrepConfig, inputs: Inputs) -> str:
    words = [inputs["raw"].ref.rsplit("-", 1)[0], f"{config.image_size}px"]
    words += [f"{config.fps:g}fps"] * (config.fps > 0)
    return "-".join(words)


def _build(config: PrepConfig, inputs: Inputs, out: Path) -> Built:
    from avrl.episodes import View
    from avrl.frames import prepare

    facts = prepare(
        inputs["raw"].manifest.config["source"],
        inputs["raw"].root,
        out,
        view=View(config.image_size, config.crop, config.fps),
        quality=config.quality,
        drop=config.on_error == "drop",
        workers=config.workers or os.cpu_count() or 1,
    )
    return Built(facts)


STAGE = Stage(name="frames", version=2, config=PrepConfig, slug=_slug, build=_build)

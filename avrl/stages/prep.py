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
    quality: Annotated[int, Opt("JPEG quality of the store, 4:4:4", unit="1..100")] = 90
    on_error: Annotated[
        Literal["fail", "drop"], Opt("Damaged episode: stop, or list it in dropped.parquet and go on")
    ] = "fail"
    workers: Annotated[int, Opt("Decoder processes; 0 means one a core", runtime=True)] = 0

    def __post_init__(self) -> None:
        if self.image_size < 16 or self.image_size % 16:
            raise ConfigError(f"--image-size {self.image_size} is not a multiple of 16 px", "try 224")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality {self.quality} is not in 1..100", "try 90")


def _slug(config: PrepConfig, inputs: Inputs) -> str:
    return f"{inputs['raw'].ref.rsplit('-', 1)[0]}-{config.image_size}px"


def _build(config: PrepConfig, inputs: Inputs, out: Path) -> Built:
    from avrl.frames import prepare

    facts = prepare(
        inputs["raw"].manifest.config["source"],
        inputs["raw"].root,
        out,
        image_size=config.image_size,
        quality=config.quality,
        drop=config.on_error == "drop",
        workers=config.workers or os.cpu_count() or 1,
    )
    return Built(facts)


STAGE = Stage(name="frames", version=1, config=PrepConfig, slug=_slug, build=_build)

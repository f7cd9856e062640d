"""``avrl prep``: raw -> frame store."""

from __future__ import annotations

from typing import Annotated

import typer

from avrl.cache import size
from avrl.errors import ConfigError
from avrl.sources import SAMPLED, SOURCES
from avrl.stages.prep import STAGE, PrepConfig
from avrl_cli.options import verb
from avrl_cli.output import Session

NAME = "prep"


@verb(PrepConfig)
def command(
    session: Session,
    config: PrepConfig,
    source: Annotated[str, typer.Argument(help="egodex, bridge, lerobot or sample")] = "egodex",
    raw: Annotated[str, typer.Option(help="Which raw artifact, if there are several")] = "",
) -> None:
    """Decode, crop and scale the clips once, into one checksummed Zarr array."""
    if source not in (*SOURCES, "sample"):
        raise ConfigError(f"no source named {source!r}", f"known: {', '.join(SOURCES)}, sample")
    for name in SAMPLED if source == "sample" else (source,):
        part = f"{name}-sample" if source == "sample" else raw
        found = session.store.resolve(
            "raw",
            part,
            where=lambda one, name=name: one.manifest.config["source"] == name,  # type: ignore[misc]
            what=f"raw data of {name}",
            make=f"avrl fetch {source}",
            option="--raw",
        )
        expect = f"reads {size(found.bytes)}; free on the cache's disk: {size(session.store.free())}"
        session.run(STAGE, config, {"raw": found}, expect)

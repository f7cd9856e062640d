"""``avrl prep``: raw -> frame store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from avrl.artifact import Artifact
from avrl.cache import Cache, size
from avrl.copies import outdated
from avrl.errors import AvrlError, ConfigError
from avrl.sources import SAMPLED, SOURCES
from avrl.stage import run, send_back
from avrl.stages import fetch
from avrl.stages.prep import STAGE, PrepConfig, plan
from avrl_cli import advice
from avrl_cli.options import listed, verb
from avrl_cli.output import Session

NAME = "prep"
SOON_S = 120.0  # ample for the directory of a zip, or for links


@verb(PrepConfig)
def command(
    session: Session,
    config: PrepConfig,
    source: Annotated[str, typer.Argument(help="egodex, bridge, lerobot or sample")] = "egodex",
    raw: Annotated[str, typer.Option(help="Which raw artifact, if there are several")] = "",
    stream: Annotated[
        bool, typer.Option("--stream", help="Decode clips as they arrive and keep no zip: no fetch before it")
    ] = False,
    part: Annotated[list[str] | None, typer.Option(help="With --stream or --from: as in avrl fetch")] = None,
    task: Annotated[list[str] | None, typer.Option(help="With --stream or --from: as in avrl fetch")] = None,
    episodes: Annotated[int, typer.Option(help="With --stream or --from: as in avrl fetch")] = 0,
    origin: Annotated[
        str, typer.Option("--from", help="Mirror to stream from, or folder to link, fetched by the way")
    ] = "",
) -> None:
    """Decode, crop and scale the clips once, into one checksummed Zarr array.

    avrl prep | avrl prep bridge | avrl prep --part 1 --stream | avrl prep --shard 1/8
    """
    if source not in (*SOURCES, "sample"):
        raise ConfigError(f"no source named {source!r}", f"known: {', '.join(SOURCES)}, sample")
    if (stream or origin) and (source == "sample" or raw):
        raise ConfigError("--stream and --from go neither with the sample nor with --raw", "leave one of them out")
    if source == "sample" and raw:
        raise ConfigError(f"--raw {raw} does not go with the sample, which is one piece", "leave out --raw")
    if stream or origin:
        chosen = fetch.FetchConfig(
            source=source, part=tuple(listed(part or ())), task=tuple(listed(task or ())), episodes=episodes
        )
        asked = fetch.settled(replace(chosen, stream=stream, origin=origin))
        for line in fetch.licence(asked):
            session.say(line)
        told = fetch.expect(asked, session.store) if session.dry_run else ""
        # The tasks of a Slurm array begin at once, and all of them want to know where the zip lies.
        here = session.run(fetch.STAGE, asked, {}, told, wait_s=SOON_S)
        if here:
            _prepare(session, config, here)
        elif seen := fetch.seen(asked):  # a dry run: where a zip lies, or a copy, is soon told
            with TemporaryDirectory() as folder:
                _prepare(session, config, run(fetch.STAGE, seen, {}, Cache(Path(folder)))[0])
        else:
            session.missing("frames", "what is not here yet, and comes in no zip, cannot be planned")
        return
    if part or task or episodes:
        raise ConfigError("--part, --task and --episodes go with --stream or --from", "or name the artifact with --raw")
    for name in SAMPLED if source == "sample" else (source,):
        ref = f"{name}-sample" if source == "sample" else raw
        found = session.store.resolve(
            "raw",
            ref,
            where=lambda one, name=name, ref=ref: (  # type: ignore[misc]
                one.manifest.config["source"] == name and (ref != "" or not outdated(one, session.store))
            ),
            what=f"raw data of {name}",
            make=advice.fetch(source),
            option="--raw",
        )
        _prepare(session, config, found)


def _prepare(session: Session, config: PrepConfig, raw: Artifact) -> None:
    """Run the stage, or tell its plan."""
    inputs, expect = {"raw": raw}, ""
    if session.dry_run and not session.store.find(STAGE.name, STAGE.key(config, inputs)):
        try:
            told = plan(config, inputs, session.store)
        except AvrlError as error:
            send_back(error, inputs, session.store)
            raise
        session.document.setdefault("plan", []).append(told.as_json(config.price))
        expect = f"{told.words(config.price)}; {size(session.store.free())} free: it fits"
    session.mirror(session.run(STAGE, config, inputs, expect), config.mirror)

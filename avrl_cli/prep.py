"""``avrl prep``: raw -> frame store."""

from __future__ import annotations

from typing import Annotated

import typer

from avrl.cache import size
from avrl.errors import ConfigError
from avrl.sources import SOURCES
from avrl.stages import fetch
from avrl.stages.prep import STAGE, PrepConfig
from avrl_cli.options import verb
from avrl_cli.output import Session

NAME = "prep"


@verb(PrepConfig)
def command(
    session: Session,
    config: PrepConfig,
    source: Annotated[str, typer.Argument(help="egodex, bridge or sample")] = "egodex",
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
    if stream or origin:
        lists = {"part": _listed(part), "task": _listed(task)}
        words = {**lists, "episodes": episodes, "origin": origin}
        asked = fetch.settled(fetch.FetchConfig(source=source, stream=stream, **words))  # type: ignore[arg-type]
        for line in fetch.licence(asked):
            session.say(line)
        here = session.run(fetch.STAGE, asked, {}, fetch.expect(asked, session.store) if session.dry_run else "")
        if not here:
            return
        raw = here.ref
    elif part or task or episodes:
        raise ConfigError("--part, --task and --episodes go with --stream or --from", "or name the artifact with --raw")
    for name in SOURCES if source == "sample" else (source,):
        ref = f"{name}-sample" if source == "sample" else raw
        found = session.store.resolve(
            "raw",
            ref,
            where=lambda one, name=name: one.manifest.config["source"] == name,  # type: ignore[misc]
            what=f"raw data of {name}",
            make=f"avrl fetch {source}",
            option="--raw",
        )
        expect = f"reads {size(found.bytes)}; free on the cache's disk: {size(session.store.free())}"
        session.run(STAGE, config, {"raw": found}, expect)


def _listed(given: list[str] | None) -> tuple[str, ...]:
    """A repeated option, or a comma-separated list."""
    return tuple(word.strip() for one in given or () for word in one.split(",") if word.strip())

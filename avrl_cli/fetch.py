"""``avrl fetch``: a source's files into the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from avrl.cache import size
from avrl.config import fields_of
from avrl.errors import ConfigError, MissingError
from avrl.locks import hold_to, sums_of
from avrl.stages.fetch import STAGE, FetchConfig, expect, licence, settled
from avrl.stages.flow import RAFT, weights_of
from avrl_cli.options import listed, verb
from avrl_cli.output import Session

NAME = "fetch"
SAMPLE = [
    FetchConfig(source="egodex", part=("sample",), origin="sample"),
    FetchConfig(source="bridge", origin="sample"),
]


@verb(FetchConfig)
def command(
    session: Session,
    config: FetchConfig,
    source: Annotated[
        str,
        typer.Argument(
            help="egodex (if left out), bridge, lerobot, sample, encoders", show_default=False, metavar="SOURCE"
        ),
    ] = "",
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="Whose published weights, or raft's, for: avrl fetch encoders", metavar="NAME"),
    ] = None,
) -> None:
    """Fetch raw data; a killed fetch goes on where it stopped.

    avrl fetch --part 1,test | avrl fetch bridge | avrl fetch --from DIR_OR_URL | avrl fetch sample
    """
    names = listed(encoder or ())
    if (source == "encoders") != bool(names) and not (source == "encoders" and session.dry_run):
        raise ConfigError("encoders and --encoder go together", "type: avrl fetch encoders --encoder dinov2")
    if source == "encoders":
        if idle := [one for one in fields_of(FetchConfig) if getattr(config, one.name) != one.default]:
            flag = idle[0].opt.flag or f"--{idle[0].name}"
            raise ConfigError(f"{flag} has no part in avrl fetch encoders", f"leave out {flag}")
        fetched = {} if session.dry_run else {n: (_teacher if n in RAFT else _weights)(session, n) for n in names}
        session.document["weights"] = fetched or _planned(session, names)
        return
    if source == "sample" and (config.part or config.origin or config.task or config.episodes):
        raise ConfigError("the sample is one piece and bundled", "type: avrl fetch sample")
    runs = {"workers": config.workers, "locked": config.locked, "mirror": config.mirror}
    sample = [replace(one, **runs) for one in SAMPLE]  # type: ignore[arg-type]
    wanted = sample if source == "sample" else [replace(config, source=source or config.source)]
    requests = [settled(one) for one in wanted]
    for line in dict.fromkeys(line for one in requests for line in licence(one)):
        session.say(line)
    for one in requests:
        plan = expect(one, session.store) if session.dry_run else ""
        made = session.run(STAGE, one, {}, f"{plan}; {size(session.store.free())} free" if plan else "")
        if made and one.locked:  # a hit was not compared when it was made
            sums = {file.path: file.sha256 for file in made.manifest.files}
            hold_to(sums_of(one.locked), sums, one.locked, f"rm -r {made.root} and run the same command")
        session.mirror(made, one.mirror)


def _planned(session: Session, names: list[str]) -> dict[str, dict[str, str]]:
    """What is here of each encoder's weights, and what would come from where; without names, of all that there are."""
    from avrl.encoders import ENCODERS, known, pins, weights

    told: dict[str, dict[str, str]] = {}
    for name in names or [*ENCODERS, *RAFT]:
        try:
            row = RAFT[name] if name in RAFT else known(name)
            held = {} if name in RAFT else {"pinned": pins.told(row)}
            told[name] = {"plan": weights.expected(name, row), "licence": row.licence, **held}
        except (ConfigError, MissingError) as error:
            if names:
                raise
            told[name] = {"plan": str(error)}
        session.tell(f"{name}: {'; '.join(told[name].values())}")
    return told


def _weights(session: Session, name: str) -> dict[str, object]:
    """Fetch an encoder's weights, or find them; tell their file, licence, size and origin."""
    from avrl.encoders import known, pins, weights

    path, licence, pinned = weights.fetch(name), known(name).licence, pins.told(known(name))
    told = {"licence": licence, "path": str(path), "bytes": path.stat().st_size, "origin": weights.origin(name)}
    session.say(f"{name}: {licence}; {size(path.stat().st_size)}; {told['origin']}; {pinned}")
    session.tell(f"{name}: {path}")
    return {**told, "pinned": pinned}


def _teacher(session: Session, name: str) -> dict[str, object]:
    """The same of RAFT, which is a teacher of flow and no encoder."""
    from avrl.encoders import hub

    row = RAFT[name]
    try:
        path = weights_of(name)
    except MissingError as error:
        raise MissingError(error.cause, hub.ELSEWHERE) from error
    assert path
    told = {"licence": row.licence, "path": str(path), "bytes": path.stat().st_size, "origin": row.url}
    session.say(f"{name}: {row.licence}; {size(path.stat().st_size)}; {row.url}")
    session.tell(f"{name}: {path}")
    return told

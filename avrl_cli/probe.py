"""``avrl probe``: frozen features -> scores, with floors and untrained twins beside every encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from avrl.errors import ConfigError, NotFoundError
from avrl.stages.prep import whole
from avrl.stages.pretrain import OBJECTIVES, network
from avrl.stages.probe import FEATURES, KINDS, LABELS, SCORES, Entry, LabelsConfig, ProbeConfig, require_split
from avrl_cli.options import listed, verb
from avrl_cli.output import Session

if TYPE_CHECKING:
    from avrl.artifact import Artifact

NAME = "probe"
ALONG = ("random", "pixels")  # untrained twins and pixel floors: scored along with any encoder, so naming them is idle


@verb(ProbeConfig)
def command(
    session: Session,
    config: ProbeConfig,
    what: Annotated[
        Literal["bridge", "order", "clusters"],
        typer.Argument(help="bridge (robot actions), order (which frame came first), clusters (tasks apart)"),
    ],
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="two-stream, a checkpoint's name, dinov2, clip, r3m, timm:NAME ...; several, with commas"),
    ] = None,
    weights: Annotated[str, typer.Option(help="Weights file of the (single) outside encoder")] = "",
    on: Annotated[
        Literal["", "egodex", "bridge", "lerobot", "sample"],
        typer.Option(help="Whose frames, if not those that the probe is about", show_default=False),
    ] = "",
    frames: Annotated[str, typer.Option(help="Which frame store, if there are several")] = "",
) -> None:
    """Probe frozen encoders with closed-form ridge. Floors and untrained twins are scored along."""
    names = [name for name in dict.fromkeys(listed(encoder or [])) if name not in (*ALONG, *KINDS[what].floors)]
    if not names:
        raise ConfigError("probe needs an encoder", f"type: avrl probe {what} --encoder dinov2")
    if weights and len(names) != 1:
        raise ConfigError("--weights goes with exactly one --encoder", "probe the encoders one by one")
    entries = [entry for name in names for entry in _entries(session, name, weights)]  # a typo shows at once
    kind = KINDS[what]
    source = kind.source if on in ("", "sample") else on
    if kind.labelled and source != kind.source:
        raise ConfigError(f"{what} is about frames of {kind.source}, not of {on}", "leave out --on")
    store = session.store.resolve(
        "frames",
        frames,
        where=lambda one: (
            whole(one)
            and one.manifest.facts["source"] == source
            and (on != "sample" or one.ref.startswith(f"{source}-sample-"))
        ),
        what=f"frames of {source}",
        make=f"avrl prep {on or source}",
        option="--frames",
    )
    require_split(store, config.gap)
    for entry in entries:
        entry.identity()  # weights that are missing show before hours of others' features
    labels = _labels(session, store) if kind.labelled else None
    for gap in config.gap:
        for entry in [*(Entry(name, "none") for name in kind.floors), *entries]:
            _score(session, config, entry, (what, gap), store, labels)


def _labels(session: Session, store: Artifact) -> Artifact | None:
    raw_digest, source = store.manifest.input("raw").digest, store.manifest.facts["source"]
    same = [one.ref for one in session.store.artifacts("raw") if one.digest == raw_digest]
    raw = session.store.resolve(
        "raw",
        *same[:1],  # several of one digest are the same data
        where=lambda one: one.digest == raw_digest,
        what=f"raw data of {store.ref}",
        make=f"avrl fetch {source}",
    )
    return session.run(LABELS, LabelsConfig(), {"raw": raw, "frames": store})


def _entries(session: Session, name: str, weights: str) -> list[Entry]:
    """An encoder and its untrained twin."""
    checkpoint = _checkpoint(session, name)
    if checkpoint:
        called = network(checkpoint.manifest.config).name
        return [Entry(called, "trained", checkpoint), Entry(called, "random", checkpoint)]
    return [Entry(name, "pretrained", weights=weights), Entry(name, "random")]


def _checkpoint(session: Session, name: str) -> Artifact | None:
    """The checkpoint that an encoder's name means; None if it is the name of an outside encoder."""
    from avrl.encoders import ENCODERS

    if name in ENCODERS or name.startswith("timm:"):
        return None
    try:
        return session.store.resolve(
            "checkpoints",
            "" if name in OBJECTIVES else name,
            where=lambda one: name not in OBJECTIVES or network(one.manifest.config).name == name,
            what=f"{name} checkpoint" if name in OBJECTIVES else "checkpoints",
            make=f"avrl pretrain {name}" if name in OBJECTIVES else "",
            option="--encoder",
        )
    except NotFoundError as error:
        if name in OBJECTIVES or error.next_step:
            raise
        known = ", ".join([*ENCODERS, "timm:NAME", *OBJECTIVES])
        raise ConfigError(f"no encoder or checkpoint named {name!r}", f"known: {known}") from None


def _score(
    session: Session,
    config: ProbeConfig,
    entry: Entry,
    asked: tuple[str, int],
    store: Artifact,
    labels: Artifact | None,
) -> None:
    kind, inputs = KINDS[asked[0]], {"frames": store}
    own = {"checkpoint": entry.checkpoint} if entry.checkpoint else {}
    wanted = None if kind.dense else entry.features(config, asked[1])
    if wanted:
        found = session.run(FEATURES, wanted, {"frames": store, **own}, f"{store.manifest.facts['frames']} frames")
        if found:
            inputs["features"] = found
    if (kind.labelled and labels is None) or (wanted and "features" not in inputs):
        session.missing("scores", f"{entry.name} ({entry.init}): its features or labels are to be made first")
        return
    inputs |= {"labels": labels} if labels else {}
    raw_digest = store.manifest.input("raw").digest
    raw = [one for one in session.store.artifacts("raw") if kind.told and one.digest == raw_digest]
    inputs |= {"raw": raw[0]} if raw else {}
    session.run(SCORES, entry.scores(config, *asked), {**inputs, **(own if kind.dense else {})})

"""``avrl probe``: frozen features -> scores, with floors and untrained twins beside every encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from avrl.errors import ConfigError, NotFoundError
from avrl.stages.prep import whole
from avrl.stages.pretrain import OBJECTIVES, network
from avrl.stages.probe import FEATURES, LABELS, SCORES, Entry, LabelsConfig, ProbeConfig, require_split
from avrl_cli.options import verb
from avrl_cli.output import Session

if TYPE_CHECKING:
    from avrl.artifact import Artifact

NAME = "probe"
FLOORS = [Entry("mean", "none"), Entry("state", "none"), Entry("pixels-8", "none"), Entry("pixels-16", "none")]


@verb(ProbeConfig)
def command(
    session: Session,
    config: ProbeConfig,
    what: Annotated[Literal["bridge"], typer.Argument(help="What to predict: bridge (robot actions)")],
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="two-stream, a checkpoint's name, dinov2, clip, r3m, efficientnet-lite0, timm:NAME"),
    ] = None,
    weights: Annotated[str, typer.Option(help="Weights file of the (single) outside encoder")] = "",
    frames: Annotated[str, typer.Option(help="Which frame store, if there are several")] = "",
) -> None:
    """Probe frozen encoders with closed-form ridge. Floors and untrained twins are scored along."""
    if not encoder:
        raise ConfigError("probe needs an encoder", "type: avrl probe bridge --encoder dinov2")
    if weights and len(encoder) != 1:
        raise ConfigError("--weights goes with exactly one --encoder", "probe the encoders one by one")
    entries = [entry for name in encoder for entry in _entries(session, name, weights)]  # a typo shows at once
    store = session.store.resolve(
        "frames",
        frames,
        where=lambda one: whole(one) and one.manifest.facts["source"] == what,
        what=f"frames of {what}",
        make=f"avrl prep {what}",
        option="--frames",
    )
    require_split(store, config.gap)
    raw_digest = store.manifest.input("raw").digest
    same = [one.ref for one in session.store.artifacts("raw") if one.digest == raw_digest]
    raw = session.store.resolve(
        "raw",
        *same[:1],  # several of one digest are the same data
        where=lambda one: one.digest == raw_digest,
        what=f"raw data of {store.ref}",
        make=f"avrl fetch {what}",
    )
    labels = session.run(LABELS, LabelsConfig(), {"raw": raw, "frames": store})
    for gap in config.gap:
        for entry in [*FLOORS, *entries]:
            _score(session, config, entry, gap, store, labels)


def _entries(session: Session, name: str, weights: str) -> list[Entry]:
    """An encoder and its untrained twin; a floor has none."""
    if name in {floor.name for floor in FLOORS}:
        return []
    checkpoint = _checkpoint(session, name)
    if checkpoint:
        called = network(checkpoint.manifest.config).name
        return [Entry(called, "trained", checkpoint), Entry(called, "random", checkpoint)]
    return [Entry(name, "pretrained", weights=weights), Entry(name, "random")]


def _checkpoint(session: Session, name: str) -> Artifact | None:
    """The checkpoint that an encoder's name means; None if it is the name of an outside encoder."""
    from avrl.encoders import ENCODERS, known

    if name in ENCODERS:
        known(name)  # refuses what is not public, before anything is looked for
        return None
    if name.startswith("timm:"):
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
        names = ", ".join([*ENCODERS, "timm:NAME", *OBJECTIVES])
        raise ConfigError(f"no encoder or checkpoint named {name!r}", f"known: {names}") from None


def _score(
    session: Session, config: ProbeConfig, entry: Entry, gap: int, store: Artifact, labels: Artifact | None
) -> None:
    inputs = {"frames": store}
    wanted = entry.features(config, gap)
    if wanted:
        own = {"checkpoint": entry.checkpoint} if entry.checkpoint else {}
        found = session.run(FEATURES, wanted, {"frames": store, **own}, f"{store.manifest.facts['frames']} frames")
        if found:
            inputs["features"] = found
    if labels is None or (wanted and "features" not in inputs):
        session.missing("scores", f"{entry.name} ({entry.init}): its features or labels are to be made first")
        return
    session.run(SCORES, entry.scores(config, gap), {**inputs, "labels": labels})

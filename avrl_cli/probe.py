"""``avrl probe``: frozen features -> scores, with floors and untrained twins beside every encoder."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from avrl.artifact import load, verify
from avrl.cache import size
from avrl.errors import AvrlError, ConfigError
from avrl.sources import SAMPLED
from avrl.stages import fetch, flow, prep
from avrl.stages.features import FEATURES, outdated, plan, readouts
from avrl.stages.prep import whole
from avrl.stages.probe import (
    KINDS,
    LABELS,
    SCORES,
    Entry,
    LabelsConfig,
    ProbeConfig,
    looks,
)
from avrl_cli import advice
from avrl_cli.entries import named
from avrl_cli.options import verb
from avrl_cli.output import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from avrl.artifact import Artifact
    from avrl.stages.features import FeaturesConfig, Plan

    Asked = tuple[str, int, int]  # what, gap, seed

NAME = "probe"


@verb(ProbeConfig)
def command(
    session: Session,
    config: ProbeConfig,
    what: Annotated[
        Literal["bridge", "egodex", "lerobot", "flow", "order", "clusters"],
        typer.Argument(
            help="What to predict: motion of robots (bridge, lerobot) or hands (egodex), optical flow, which frame "
            "came first (order); or how tasks lie apart (clusters)"
        ),
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
    origin: Annotated[str, typer.Option("--from", help="Folder with the data, linked and prepared by the way")] = "",
) -> None:
    """Probe frozen encoders with closed-form ridge. Floors and untrained twins are scored along."""
    kind = KINDS[what]
    _require_part(what, on, config)
    entries = named(session.store, what, on, encoder or [], weights)  # a typo shows at once
    source = kind.source if on in ("", advice.SAMPLE) else on
    if kind.labelled and source != kind.source:
        raise ConfigError(f"{what} is about frames of {kind.source}, not of {on}", "leave out --on")
    if config.readout and (kind.dense or config.solver == "attentive"):
        session.say(f"--readout has no part in {what if kind.dense else '--solver attentive'}, which looks at patches")
    if origin and on == advice.SAMPLE:
        raise ConfigError("--from does not go with the sample", "leave out --on")
    raw = _linked(session, source, origin) if origin else None
    if origin and raw is None:
        session.missing("frames", f"avrl prep {source} --from {origin} makes them")
        return
    store = session.store.resolve(
        "frames",
        frames,
        where=lambda one: (
            whole(one)
            and one.manifest.facts["source"] == source
            and (on != advice.SAMPLE or advice.is_sample(one))
            and (raw is None or one.manifest.input("raw").digest == raw.digest)
        ),
        what=f"frames of {source}" + (f" in {origin}" if origin else ""),
        make=advice.prep(on or source, origin),
        option="--frames",
    )
    from avrl.splits import require_split

    require_split(store, config.gap)
    _require_ready(session, config, entries, (what, config.gap[0], config.seed[0]), store)
    labels = _labels(session, store) if kind.labelled else None
    asked = [(what, gap, seed) for gap, seed in itertools.product(config.gap, config.seed)]
    _matrix(session, config, ([Entry(name, "none") for name in kind.floors], entries), asked, store, labels)


def _require_part(what: str, on: str, config: ProbeConfig) -> None:
    """Refuse options that would change nothing: who typed them would believe that they did."""
    kind, attentive = KINDS[what], config.solver == "attentive"
    if on == advice.SAMPLE and kind.source not in SAMPLED:
        raise ConfigError(f"the sample holds no data of {what}", f"type: avrl probe {what} --from DIR --encoder NAME")
    if attentive and not kind.labelled:
        raise ConfigError(f"--solver {config.solver} predicts motion; {what} has its own probe", "leave out --solver")
    parts = {"target": kind.commands, "samples": attentive, **dict.fromkeys(("pairs", "teacher"), kind.flow)}
    for name, has_part in {**parts, "teacher_weights": kind.flow}.items():
        given = getattr(config, name)
        if given != getattr(ProbeConfig, name) and not has_part:
            flag, ridge = f"--{name.replace('_', '-')}", " --solver ridge" * (name == "samples")
            raise ConfigError(f"{flag} {given} has no part in avrl probe {what}{ridge}", f"leave out {flag}")


def _require_ready(session: Session, config: ProbeConfig, entries: list[Entry], asked: Asked, store: Artifact) -> None:
    """What would end encoders one by one, after hours of others' features: weights, checkpoints, names of readouts."""
    for entry in entries:
        entry.identity()
    for checkpoint in {entry.checkpoint.ref: entry.checkpoint for entry in entries if entry.checkpoint}.values():
        verify(checkpoint)
    there: set[str] = set()
    for entry in entries if config.readout else ():
        for wanted, inputs in _features(session, config, entry, asked, store).values():
            try:
                there |= readouts(wanted, inputs, session.store)
            except (AvrlError, RuntimeError):  # it says why when it is run
                return
    if there and (unknown := sorted(set(config.readout) - there)):
        raise ConfigError(f"no encoder here has a readout {unknown[0]!r}", f"there are: {', '.join(sorted(there))}")


def _matrix(
    session: Session,
    config: ProbeConfig,
    scored: tuple[list[Entry], list[Entry]],
    asked: Sequence[Asked],
    store: Artifact,
    labels: Artifact | None,
) -> None:
    """Score floors and encoders; what one encoder fails at is told, and the others go on."""
    floors, entries = scored
    plans = _plans(session, config, [*floors, *entries], asked, store)
    needed, what = sum(one.bytes for one in plans.values()), f"what is to be encoded of {store.ref}"
    if not session.dry_run:
        session.store.require_space(needed, what)
    for one in asked:
        labels = _flow(session, config, one[1:], store) if KINDS[one[0]].flow else labels
        for entry in floors:  # what ends a floor would end every encoder
            _score(session, config, entry, one, store, labels, plans)
        for entry in entries:
            with session.attempt(f"{entry.name} ({entry.init})"):
                _score(session, config, entry, one, store, labels, plans)
    hits = {one["path"] for one in session.artifacts if one["hit"] and "path" in one}
    if told := outdated([load(Path(one)) for one in sorted(hits)]):
        session.say(told)
    if session.dry_run and plans:
        session.document["plan"] = [{"features": key, **asdict(one)} for key, one in plans.items()]
        session.store.require_space(needed, what)
        session.say(f"{size(needed)} of features at most, {size(session.store.free())} free: it fits")


def _linked(session: Session, source: str, origin: str) -> Artifact | None:
    """A local copy as a raw artifact that has a frame store; None if a dry run finds it has none yet."""
    asked = fetch.settled(fetch.FetchConfig(source=source, origin=origin))
    for line in fetch.licence(asked):
        session.say(line)
    raw = session.run(fetch.STAGE, asked, {})
    stores = [one for one in session.store.artifacts("frames") if whole(one) and raw]
    if raw and not any(one.manifest.input("raw").digest == raw.digest for one in stores):
        return raw if session.run(prep.STAGE, prep.PrepConfig(), {"raw": raw}) else None
    return raw


def _labels(session: Session, store: Artifact) -> Artifact | None:
    raw_digest, source = store.manifest.input("raw").digest, store.manifest.facts["source"]
    same = [one.ref for one in session.store.artifacts("raw") if one.digest == raw_digest]
    raw = session.store.resolve(
        "raw",
        *same[:1],  # several of one digest are the same data
        where=lambda one: one.digest == raw_digest,
        what=f"raw data of {store.ref}",
        make=advice.fetch(advice.SAMPLE if advice.is_sample(store) else source),
    )
    return session.run(LABELS, LabelsConfig(), {"raw": raw, "frames": store})


def _flow(session: Session, config: ProbeConfig, asked: tuple[int, int], store: Artifact) -> Artifact | None:
    from avrl.encoders import pins

    file = flow.weights_of(config.teacher, config.teacher_weights)
    wanted = flow.FlowConfig(
        gap=asked[0],
        pairs=config.pairs,
        seed=asked[1],
        teacher=config.teacher,
        weights=pins.digest(file) if file else "",
        weights_path=str(file or ""),
        device=config.device,
    )
    return session.run(flow.STAGE, wanted, {"frames": store})


def _features(
    session: Session, config: ProbeConfig, entry: Entry, asked: Asked, store: Artifact
) -> dict[str, tuple[FeaturesConfig, dict[str, Artifact]]]:
    """The features that an encoder needs, and of what, by their role in its scores; none for one that needs none.

    Those of all readouts are taken where they are there, and those of the readouts asked for are not.
    """
    inputs = {"frames": store} | ({"checkpoint": entry.checkpoint} if entry.checkpoint else {})
    wanted = {
        "features": entry.features(config, *asked, store.manifest.facts["frames"]),
        "stills": entry.stills(config, *asked),
    }

    def there(one: FeaturesConfig) -> bool:
        return session.store.find(FEATURES.name, FEATURES.key(one, inputs)) is not None

    return {
        role: (next(filter(there, (one, one.whole())), one), inputs) for role, one in wanted.items() if one is not None
    }


def _plans(
    session: Session, config: ProbeConfig, entries: list[Entry], asked: Sequence[Asked], store: Artifact
) -> dict[str, Plan]:
    """What features are still to be made, by their keys. An encoder that cannot be planned says why when it is run."""
    found: dict[str, Plan] = {}
    for entry, one in itertools.product(entries, asked):
        for wanted in _features(session, config, entry, one, store).values():
            key = FEATURES.key(*wanted)
            if key not in found and not session.store.find(FEATURES.name, key):
                with contextlib.suppress(AvrlError, RuntimeError):
                    found[key] = plan(*wanted, session.store)
    return found


def _score(
    session: Session,
    config: ProbeConfig,
    entry: Entry,
    asked: Asked,
    store: Artifact,
    labels: Artifact | None,
    plans: dict[str, Plan],
) -> None:
    kind, inputs = KINDS[asked[0]], {"frames": store}
    own = {"checkpoint": entry.checkpoint} if entry.checkpoint else {}
    request = entry.scores(config, *asked)
    wanted = _features(session, config, entry, asked, store)
    for role, one in wanted.items():
        planned = plans.get(FEATURES.key(*one))
        found = session.run(FEATURES, *one, planned.words() if planned else "")
        if found:
            inputs[role] = found
    if ((kind.labelled or kind.flow) and labels is None) or wanted.keys() - inputs.keys():
        session.missing("scores", f"{entry.name} ({entry.init}): its features or labels are to be made first")
        return
    inputs |= {"labels": labels} if labels else {}
    raw_digest = store.manifest.input("raw").digest
    raw = [one for one in session.store.artifacts("raw") if kind.told and one.digest == raw_digest]
    inputs |= {"raw": raw[0]} if raw else {}
    session.run(SCORES, request, {**inputs, **(own if looks(request) else {})})

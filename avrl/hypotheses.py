"""The plan's hypotheses, each with a verdict, its effect and interval, and what would decide it.

Pass and fail are said only where the whole interval lies on one side; `UNDECIDED` where it does not, `NOT_MEASURED`
where nobody ran it, `NOT_COMPARABLE` where it was run under another protocol or budget.

Which readout speaks for an encoder is settled before any score (`avrl.answers.headline`); of a reference the best row
on these same scores is taken, which favours the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from avrl.answers import headline
from avrl.comparison import EVERY, ROW, WHOLE
from avrl.convergence import converged
from avrl.effects import NOT_COMPARABLE, VERDICTS, Effect, judged, plain
from avrl.encoders.pins import network
from avrl.flow_verdict import PERCENT, percent_below
from avrl.tables import NOT_MEASURED, Table
from avrl.verdicts import Row, heads, moving
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from avrl.artifact import Artifact
    from avrl.comparison import Protocol
    from avrl.verdicts import Paired

MODELS = ("two-stream", "single-stream", "videomae")
REFERENCES = {"dinov2": "DINOv2", "clip": "CLIP", "r3m": "R3M"}
ABLATIONS = ("m-only", "p-only", "no-exchange", "early-fusion")
ORDER_WANTED = 0.9

NUMBERS: dict[str, Any] = {**dict.fromkeys(["hypothesis", "who", "verdict", "effect"], pl.String)}
NUMBERS |= dict.fromkeys(["value", "low", "high"], pl.Float64) | {"episodes": pl.Int64}
NUMBERS |= dict.fromkeys(["sample", "decides"], pl.String)


def judge(compares: Sequence[Paired], checkpoints: Sequence[Artifact]) -> Table:
    """All hypotheses, one row for each model they speak of."""
    found = [
        *_rows(say("The three models converge"), converged(checkpoints, MODELS)),
        *(
            row
            for reference in REFERENCES
            for row in _rows(say("Actions are told better than by outside encoders"), _better(compares, reference))
        ),
        *_rows(say("Flow: error at least 20% below DINOv2's"), _flow(compares)),
        *_rows(say("Order: right for at least 90% of pairs"), _ordered(compares)),
        *_rows(say("Clusters: neighbours tell the task, better than untrained"), _clustered(compares)),
        *(
            row
            for part in ABLATIONS
            for row in _rows(say("Two-Stream is better than without a part"), _ablated(compares, checkpoints, part))
        ),
    ]
    frame = pl.DataFrame(found, schema=NUMBERS)
    view = frame.select(
        pl.col("hypothesis").alias(say("hypothesis")),
        pl.col("who").alias(say("model")),
        pl.Series(say("verdict"), [say(one) for one in frame["verdict"]], pl.String),
        pl.col("effect").alias(say("effect")),
        pl.col("sample").alias(say("measured on")),
        pl.col("decides").alias(say("what would decide it")),
    )
    caption = say(
        "Pass or fail: the whole 95% interval lies on one side; else undecided. Converged: better than its baseline on "
        "episodes that training never draws, not collapsed (effective rank of 2 or more), and the last tenth of "
        "training adds less than .01 of skill. None of these hypotheses has a published precedent."
    )
    return Table("hypotheses", say("The plan's hypotheses"), caption, frame, view, prose=True)


def tally(table: Table) -> list[str]:
    """One line a hypothesis: its verdicts, and whose they are."""
    lines = []
    for part in table.numbers.partition_by("hypothesis", maintain_order=True):
        said = []
        for verdict in VERDICTS:
            names = part.filter(verdict=verdict)["who"].to_list()
            said += [say(verdict) + (f" ({', '.join(names)})" if any(names) else "")] * bool(names)
        lines.append(f"{part['hypothesis'][0]}: {'; '.join(said)}")
    return lines


def _rows(hypothesis: str, found: Iterator[tuple[str, Effect]]) -> list[Row]:
    return [{"hypothesis": hypothesis, "who": who, **effect.as_row()} for who, effect in found]


def _better(compares: Sequence[Paired], reference: str) -> Iterator[tuple[str, Effect]]:
    """Headline R2 of each of our models minus the best row of a reference, paired."""
    actions, title = [one for one in compares if one.protocol.probe == "bridge"], REFERENCES[reference]
    compare = next((one for one in actions if _of(one.protocol, reference)), None)
    if compare is None:
        yield title, Effect(NOT_MEASURED, decides=f"avrl probe bridge --encoder {reference}")
        return
    here = compare.protocol
    ours = {name for one in actions for name in one.protocol.scores.filter(init="trained")["encoder"]}
    best = max(_of(here, reference), key=lambda one: (one["value"], one["label"]))
    for model in MODELS:
        mine = [one for one in _speaking(here) if one["encoder"] == model and one["init"] == "trained"]
        if not mine:
            verdict = NOT_COMPARABLE if model in ours else NOT_MEASURED
            yield f"{model} - {title}", Effect(verdict, decides=f"avrl probe bridge --encoder {model},{reference}")
        for row in mine:
            measure = say("R² against {label}", label=best["label"])
            yield f"{row['name']} - {title}", _difference(compare, row, best, measure)


def _of(protocol: Protocol, reference: str) -> list[Row]:
    """The rows of a reference with published weights that have a headline number, whatever its size or readout."""
    rows = heads(protocol).filter(pl.col("value").is_not_null(), init="pretrained").to_dicts()
    rows = [one for one in rows if one["encoder"] == network(one["encoder"])]
    return [one for one in rows if one["encoder"] == reference or one["encoder"].startswith(f"{reference}-")]


def _speaking(protocol: Protocol) -> list[Row]:
    """The rows that speak for their encoders."""
    return heads(protocol).join(headline(protocol), on="label", how="semi", maintain_order="left").to_dicts()


def _difference(compare: Paired, row: Row, other: Row, measure: str) -> Effect:
    """Headline R2 of a row minus that of another, on all test tasks."""
    group = compare.protocol.group
    return _paired(compare, row, other, measure, (WHOLE, moving(compare.protocol, group, WHOLE), "r2"))


def _paired(
    compare: Paired, row: Row, other: Row | None, measure: str, asked: tuple[str, tuple[str, ...], str]
) -> Effect:
    found = compare(row, other, *asked)
    if found.interval is None:
        return Effect(NOT_MEASURED, say(found.note))
    return judged(measure, plain(found.interval), found.episodes)


def _flow(compares: Sequence[Paired]) -> Iterator[tuple[str, Effect]]:
    here = [one for one in compares if one.protocol.probe == "flow"]
    tables = [(one.protocol, percent_below(one.protocol, one.resamples)) for one in here]
    rows = [row for one, table in tables if table for row in _of_models(one, table)]
    if not rows:
        yield "", Effect(NOT_MEASURED, decides="avrl probe flow --encoder two-stream,dinov2")
    for row in rows:
        if row["several"]:
            yield row["label"], Effect(NOT_COMPARABLE, row["several"])
        elif row["percent_below"] is None:
            yield row["label"], Effect(NOT_MEASURED, decides="avrl probe flow --encoder dinov2")
        else:
            ends = (row["percent_below"], row["low"], row["high"])
            yield row["label"], judged(say("below DINOv2's error"), ends, row["episodes"], PERCENT, "{:+.1f}%")


def _of_models(protocol: Protocol, table: Table) -> list[Row]:
    labels = dict(protocol.scores.select("scores", "name").unique().iter_rows())
    rows = table.numbers.filter(pl.col("encoder").is_in(MODELS), init="trained").to_dicts()
    return [{**one, "label": labels[one["scores"]]} for one in rows]


def _ordered(compares: Sequence[Paired]) -> Iterator[tuple[str, Effect]]:
    here = [one.protocol for one in compares if one.protocol.probe == "order"]
    for one in here:
        gap = f", gap {one.scores['gap'][0]}" if len(here) > 1 else ""
        rows = one.scores.join(headline(one), on="label", how="semi", maintain_order="left")
        rows = rows.filter(
            pl.col("encoder").is_in(MODELS), init="trained", group="order", metric="accuracy", split=WHOLE
        )
        for row in rows.filter(dimension="order").iter_rows(named=True):
            if row["value"] is None:
                yield row["name"] + gap, Effect(NOT_MEASURED, row["note"])
            else:
                ends = (row["value"], row["low"], row["high"])
                yield (
                    row["name"] + gap,
                    judged(say("of pairs right"), ends, row["episodes_test"], ORDER_WANTED, "{:.3f}"),
                )
    if not here:
        yield "", Effect(NOT_MEASURED, decides="avrl probe order --encoder two-stream,single-stream,videomae")


def _clustered(compares: Sequence[Paired]) -> Iterator[tuple[str, Effect]]:
    """Share of vectors whose neighbours tell their task, minus that of the untrained twin."""
    here = [one for one in compares if one.protocol.probe == "clusters"]
    for one in here[:1]:
        rows = one.protocol.scores.filter(group="task", metric="knn-accuracy")
        rows = rows.unique(ROW, keep="first", maintain_order=True)
        mine = rows.join(headline(one.protocol), on="label", how="semi", maintain_order="left")
        for row in mine.filter(pl.col("encoder").is_in(MODELS), init="trained").iter_rows(named=True):
            twin = rows.filter(init="random", checkpoint=row["checkpoint"], readout=row["readout"]).to_dicts()
            measure = say("of vectors against the untrained twin ({value} of all)", value=f"{row['value']:.3f}")
            asked = (EVERY, ("task",), "knn-accuracy")
            yield row["name"], _paired(one, row, twin[0] if twin else None, measure, asked)
    if not here:
        yield "", Effect(NOT_MEASURED, decides="avrl probe clusters --encoder two-stream,single-stream,videomae")


def _ablated(compares: Sequence[Paired], checkpoints: Sequence[Artifact], part: str) -> Iterator[tuple[str, Effect]]:
    """Headline R2 of Two-Stream minus that of Two-Stream without a part, pretrained with all else alike."""
    name = f"two-stream-{part}"
    actions = [one for one in compares if one.protocol.probe == "bridge"]
    compare = next((one for one in actions if name in one.protocol.scores["encoder"].to_list()), None)
    if compare is None:
        decides = f"avrl pretrain two-stream --ablate {part}; avrl probe bridge --encoder two-stream,{name}"
        yield part, Effect(NOT_MEASURED, decides=decides)
        return
    configs = {one.ref: _budget(one) for one in checkpoints}
    rows = _speaking(compare.protocol)
    for row in rows:
        if row["encoder"] == name and row["init"] == "trained":
            whole = [one for one in rows if one["encoder"] == "two-stream" and one["init"] == "trained"]
            alike = [one for one in whole if configs.get(one["checkpoint"]) == configs.get(row["checkpoint"], "gone")]
            apart = Effect(NOT_COMPARABLE, say("pretrained with another budget"), decides="avrl pretrain --like")
            yield part, _difference(compare, alike[0], row, say("R² lost without it")) if alike else apart


def _budget(checkpoint: Artifact) -> tuple[str, ...]:
    """What two checkpoints must share so that only the part makes the difference."""
    config = {name: value for name, value in checkpoint.manifest.config.items() if name not in ("ablate", "exchanges")}
    return (*(f"{name}={config[name]}" for name in sorted(config)), *(one.digest for one in checkpoint.manifest.inputs))

"""What each encoder cost: parameters, what it saw in training, GPU hours and dollars, licence.

Two encoders that had unlike budgets are not compared fairly by any probe; `unlike` says so in words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from avrl.encoders.pins import network
from avrl.tables import Table
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from avrl.artifact import Artifact, Input
    from avrl.comparison import Protocol

UNKNOWN = "not known"
MARGIN = 1.05  # budgets closer than that are called alike
BUDGET = {"samples": "samples seen", "encoder_parameters": "parameters of the encoder"}
NUMBERS: dict[str, Any] = {**dict.fromkeys(["encoder", "checkpoint", "kind", "data", "licence", "device"], pl.String)}
NUMBERS |= dict.fromkeys(["encoder_parameters", "samples", "frames", "data_frames"], pl.Int64)
NUMBERS |= dict.fromkeys(["gpu_hours", "dollars"], pl.Float64)


def encoders(
    protocols: Sequence[Protocol], checkpoints: Iterable[Artifact], ancestors: Iterable[Artifact], price: float
) -> Table:
    """One row an encoder with weights, trained here or outside.

    Args:
        protocols: Whose rows are looked through.
        checkpoints: Those trained here.
        ancestors: What scores and checkpoints were made from, as far as it is still there.
        price: Dollars a GPU hour; 0 if nobody said.
    """
    found = pl.concat([one.scores for one in protocols]).filter(pl.col("init").is_in(["trained", "pretrained"]))
    found = found.select("encoder", "checkpoint", "kind", "licence", "name").unique(
        ["encoder", "checkpoint"], keep="first", maintain_order=True
    )
    known = {one.ref: one for one in checkpoints}
    others = {one.digest: one for one in ancestors}
    outside = {
        one.manifest.config["encoder"]: one.manifest.facts.get("parameters")
        for one in others.values()
        if one.manifest.stage == "features" and not one.manifest.config.get("checkpoint")
    }
    rows = []
    for row in found.iter_rows(named=True):
        ours = known.get(row["checkpoint"])
        cost = _cost(ours, others, price) if ours else {"encoder_parameters": outside.get(network(row["encoder"]))}
        rows.append({**{name: row[name] for name in ("encoder", "checkpoint", "kind", "licence")}, **cost})
    frame = pl.DataFrame(rows, schema=NUMBERS)
    return Table(
        "encoders", say("Encoders"), _caption(price), frame, _view(frame, found["name"].to_list(), price), prose=True
    )


def unlike(table: Table) -> list[str]:
    """Warnings: encoders trained here whose budgets differ, so that a difference of scores may be the budget's."""
    ours, said = table.numbers.filter(kind="trained"), []
    for column, what in BUDGET.items():
        values = ours.filter(pl.col(column).is_not_null())
        if values.height > 1 and values[column].max() > MARGIN * values[column].min():  # type: ignore[operator]
            ends = [values.sort(column, maintain_order=True).row(place, named=True) for place in (0, -1)]
            least, most = (f"{one['encoder']} {one[column]:,}" for one in ends)
            text = "Budgets differ in {what}: from {least} to {most}. A difference of scores may be the budget's."
            said.append(say(text, what=say(what), least=least, most=most))
    if ours["data"].drop_nulls().n_unique() > 1:
        said.append(say("Encoders trained here saw different data; a difference of scores may be the data's."))
    return said


def shown(protocol: Protocol, scores: Iterable[Artifact], checkpoints: Iterable[Artifact]) -> list[str]:
    """Which encoders were pretrained on the very videos that a protocol tests on: no label was seen, but its frames."""
    frames = {one.ref: _frames(one) for one in scores}
    data = {one.ref: _frames(one) for one in checkpoints}
    rows = protocol.scores.filter(init="trained").select("name", "checkpoint", "scores").unique(maintain_order=True)
    pairs = ((name, data.get(of), frames.get(ref)) for name, of, ref in rows.iter_rows())
    names = [name for name, seen, tested in pairs if seen and tested and seen.digest == tested.digest]
    text = say(
        "pretraining drew from the frames that are tested on here, without labels: {names}", names=", ".join(names)
    )
    return [text] * bool(names)


def _frames(artifact: Artifact) -> Input | None:
    """The frames that an artifact was made from, if it was."""
    return next((one for one in artifact.manifest.inputs if one.role == "frames"), None)


def _cost(checkpoint: Artifact, others: dict[str, Artifact], price: float) -> dict[str, Any]:
    """What a checkpoint of ours cost."""
    facts = checkpoint.manifest.facts
    samples, rate = facts.get("samples"), facts.get("samples_per_second")
    device, frames = facts.get("device"), _frames(checkpoint)
    hours = samples / rate * facts.get("processes", 1) / 3600 if samples and rate and device != "cpu" else None
    store = others.get(frames.digest) if frames else None
    return {
        "encoder_parameters": facts.get("encoder_parameters"),
        "samples": samples,
        "frames": samples * facts.get("num_frames", 2) if samples else None,
        "data": frames.ref if frames else None,
        "data_frames": store.manifest.facts.get("frames") if store else None,
        "device": device,
        "gpu_hours": hours,
        "dollars": hours * price if hours is not None and price else None,
    }


def _caption(price: float) -> str:
    said = say(
        "What stands behind each encoder. Frames seen count a frame as often as it was drawn. GPU hours follow from "
        "samples and their rate, times GPUs."
    )
    if price:
        return said + " " + say("Dollars at {price} a GPU hour.", price=f"${price:g}")
    return said + " " + say("Dollars are shown with --price.")


def _view(frame: pl.DataFrame, names: list[str], price: float) -> pl.DataFrame:
    def form(column: str, text: str, unknown: str) -> pl.Series:
        return pl.Series([say(unknown) if one is None else text.format(one) for one in frame[column]], dtype=pl.String)

    cpu = frame["device"] == "cpu"
    hours = form("gpu_hours", "{:,.1f}", UNKNOWN)
    columns = {
        say("encoder"): pl.Series(names, dtype=pl.String),
        "kind": frame["kind"],
        say("parameters"): form("encoder_parameters", "{:,}", UNKNOWN),
        say("samples seen"): form("samples", "{:,}", UNKNOWN),
        say("frames seen"): form("frames", "{:,}", UNKNOWN),
        say("frames there are"): form("data_frames", "{:,}", UNKNOWN),
        say("trained on"): form("data", "{}", UNKNOWN),
        say("GPU hours"): pl.select(pl.when(cpu).then(pl.lit(say("none: on a CPU"))).otherwise(hours)).to_series(),
    }
    if price:
        columns["$"] = form("dollars", "{:,.2f}", UNKNOWN)
    columns[say("licence")] = pl.Series([one or say("none stated") for one in frame["licence"]], dtype=pl.String)
    return pl.DataFrame(columns)

"""The plan's hypothesis of flow: an end-point error at least 20% below DINOv2's. Pass, fail, or undecided.

A percentage is paired: both errors on the same draws of the same test episodes. It is told of the motion, which is what
the plan speaks of, and of the residual without the camera's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from avrl.comparison import ROW, Protocol
from avrl.effects import FAIL, NOT_COMPARABLE, PASS, UNDECIDED
from avrl.intervals import interval, weights
from avrl.outcome import numbers
from avrl.tables import LABEL, NOT_MEASURED, Table
from avrl.words import say

REFERENCE, PERCENT = "dinov2", 20.0
METRIC = "epe"
KINDS = {"all": "", "residual": "residual_"}  # of errors -> how the names of their columns begin
TOLD = {"verdict": pl.String, **dict.fromkeys(["percent_below", "low", "high"], pl.Float64)}
NUMBERS: dict[str, Any] = {**dict.fromkeys([*ROW, "kind", "label"], pl.String)}
NUMBERS |= {begin + name: kind for begin in KINDS.values() for name, kind in TOLD.items()} | {"episodes": pl.Int64}
NUMBERS |= {"several": pl.String}


def percent_below(protocol: Protocol, resamples: int) -> Table | None:
    """How far below DINOv2's the error of each learned row is; None if these are no scores of flow."""
    found = protocol.scores.filter(metric=METRIC)
    if found.is_empty():
        return None
    learned = found.filter(pl.col("init").is_in(["trained", "pretrained"]))
    # With published weights: with others it has another name (`avrl.encoders.pins.named`).
    published = found.filter(encoder=REFERENCE, init="pretrained")
    references = published.unique(ROW, keep="first", maintain_order=True).to_dicts()
    several = _several(protocol, references)
    rows = []
    for row in learned.unique(ROW, keep="first", maintain_order=True).iter_rows(named=True):
        if row["encoder"] == REFERENCE:
            continue
        rows.append({name: row[name] for name in (*ROW, "kind", "label")})
        for kind, begin in KINDS.items():
            one, *other = (_sums(protocol, which, kind) for which in (row, *references[:1]))
            told = _compared(one, other[0] if other and not several else None, resamples)
            told |= {"verdict": NOT_COMPARABLE} if several else {}
            rows[-1] |= {"episodes": len(one[0])} | {begin + name: value for name, value in told.items()}
        rows[-1]["several"] = several
    frame = pl.DataFrame(rows, schema=NUMBERS)
    titles = {"": say("EPE below DINOv2's"), "residual_": say("residual EPE below DINOv2's")}
    view = frame.select(pl.col("label").alias(LABEL), "kind").with_columns(
        pl.Series(title, [_said(one, begin) for one in frame.iter_rows(named=True)], pl.String)
        for begin, title in titles.items()
    )
    caption = say(
        "Hypothesis: the end-point error is at least {percent}% below that of {reference}. Pass: so is the whole 95% "
        "interval (paired, over episodes); fail: none of it is. Nobody has published such a gain. Residual: what is "
        "left of the motion without the camera's own.",
        percent=f"{PERCENT:.0f}",
        reference=REFERENCE,
    )
    caption += f" {several}." * bool(several)
    return Table(f"flow-verdict-{protocol.slug}", say("Flow beside DINOv2"), caption, frame.drop("label"), view)


def _several(protocol: Protocol, references: list[dict[str, Any]]) -> str:
    """That DINOv2s of unlike errors are there, and where; empty if there is one, or if they are alike."""
    errors = [np.concatenate([_sums(protocol, one, kind)[2] for kind in KINDS]) for one in references]
    if all(one.shape == errors[0].shape and np.allclose(one, errors[0]) for one in errors):
        return ""
    refs = ", ".join(f"scores/{one['scores']}" for one in references)
    text = "{count} {reference} of unlike errors on these pairs, remove all but one: {refs}"
    return say(text, count=len(references), reference=REFERENCE, refs=refs)


def _sums(protocol: Protocol, row: dict[str, Any], kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Test episodes, their places, and the sum of their errors."""
    part = protocol.episodes.filter(*(pl.col(name) == row[name] for name in ROW), dimension=kind)
    part = part.sort("episode_index")
    return part["episode_index"].to_numpy(), part["n"].to_numpy(), part["sum_y"].to_numpy()


def _compared(
    one: tuple[np.ndarray, np.ndarray, np.ndarray],
    other: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
    resamples: int,
) -> dict[str, Any]:
    if other is None or not len(one[0]) or not np.array_equal(one[0], other[0]) or not np.array_equal(one[1], other[1]):
        return dict.fromkeys(TOLD) | {"verdict": NOT_MEASURED}
    drawn = weights(len(one[0]), resamples)
    value = 100 * (1 - one[2].sum() / other[2].sum())  # the same places: their number cancels
    given = interval(np.array(value), 100 * (1 - (drawn @ one[2]) / (drawn @ other[2])), len(one[0]))
    verdict = PASS if given.low >= PERCENT else FAIL if given.high < PERCENT else UNDECIDED
    ends = numbers(given)  # without an interval, None: undecided
    return {"verdict": verdict, "percent_below": ends.pop("value"), **ends}


def _said(row: dict[str, Any], begin: str) -> str:
    value, low, high = (row[begin + name] for name in ("percent_below", "low", "high"))
    if row["several"]:
        return say("not comparable: several {reference}", reference=REFERENCE)
    if value is None:
        return say("not measured: no {reference} as published on these pairs", reference=REFERENCE)
    shown = f"{value:+.1f}%" + ("" if low is None else f" [{low:+.1f}, {high:+.1f}]")
    return f"{shown} {say(row[begin + 'verdict'])}"

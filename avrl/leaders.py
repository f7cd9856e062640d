"""Who leads a column of the scores table, and who cannot be told from the leader.

Of an R2 the difference to the leader is paired, on the same draws of the same episodes: tied where its interval holds
zero. Of another number no sums of single episodes are kept: tied where the row's own interval reaches the leader's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import polars as pl

from avrl.answers import headline
from avrl.comparison import CEILING, FLOOR, ROW
from avrl.tables import NOT_MEASURED, Table, cell, columns, wide
from avrl.verdicts import UNDECIDED, Paired
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from avrl.comparison import Protocol
    from avrl.tables import Column
    from avrl.verdicts import Row

BEST, TIED = "best", "tied"
BETTER, WORSE = "better", "worse"
LOWER = ("epe",)  # is better
UNJUDGED = ("effective-rank",)  # more is not better


def marked(table: Table, protocol: Protocol, resamples: int) -> Table:
    """The scores table with its leaders: ``best`` or ``tied`` behind a cell, and a column of it for each in the CSV.

    Floors and untrained twins may lead, and then they do; the ceiling, which sees the answer, may not.
    """
    numbers, view = table.numbers, table.view
    for column in columns(protocol.scores):
        marks = _marks(numbers, column, protocol, resamples)
        cells = [f"{text} {say(mark)}" if mark else text for text, mark in zip(view[column.title], marks, strict=True)]
        view = view.with_columns(pl.Series(column.title, cells, pl.String))
        numbers = numbers.with_columns(pl.Series(f"{column.name}_mark", marks, pl.String))
    caption = say(
        "Best: the highest of a column (of an error, the lowest) but for the ceiling; tied: not told from it (of R² by "
        "the paired interval of the difference, else because the row's own interval reaches it)."
    )
    return replace(table, numbers=numbers, view=view, caption=f"{table.caption} {caption}")


def _marks(numbers: pl.DataFrame, column: Column, protocol: Protocol, resamples: int) -> list[str]:
    rows = numbers.select(*ROW, value=column.name, low=f"{column.name}_low", high=f"{column.name}_high").to_dicts()
    racing = [one for one in rows if one["value"] is not None and one["encoder"] != CEILING]
    if len(racing) < 2 or column.metric in UNJUDGED:
        return [""] * len(rows)
    sign = -1 if column.metric in LOWER else 1
    best = max(racing, key=lambda one: sign * one["value"])
    compare = (
        Paired(protocol, resamples, column.group) if column.metric == "r2" and column.dimension == "mean" else None
    )
    return [
        BEST if one is best else TIED if one in racing and _level(one, best, sign, compare, column.split) else ""
        for one in rows
    ]


def _beside(row: Row, floor: Row, sign: int, compare: Paired | None, split: str) -> str:
    """Whether a row is better than the floor: paired where that is known, else by its own interval."""
    low, high = (None if row[end] is None else row[end] - floor["value"] for end in ("low", "high"))
    if compare is not None:
        found = compare(row, floor, split).interval
        low, high = (None, None) if found is None else (float(found.low), float(found.high))
    if low is None or high is None:
        return NOT_MEASURED
    return BETTER if min(sign * low, sign * high) > 0 else WORSE if max(sign * low, sign * high) < 0 else UNDECIDED


def _level(row: Row, best: Row, sign: int, compare: Paired | None, split: str) -> bool:
    if compare is not None:
        found = compare(row, best, split).interval
        return found is not None and bool(found.low <= 0 <= found.high)
    end = row["high"] if sign > 0 else row["low"]
    return end is not None and sign * end >= sign * best["value"]


def winners(protocols: Sequence[Protocol], resamples: int) -> Table:
    """Which encoder wins on what: one line a question, headline rows of encoders with weights, beside the floor."""
    found = [_winner(one, column, resamples) for one in protocols for column in columns(one.scores)]
    rows = [one for one in found if one]
    names = ("question", "best", "value", "low", "high", "tied", "floor", "beside_floor", "metric", "fingerprint")
    kinds = dict.fromkeys(names, pl.String) | dict.fromkeys(("value", "low", "high", "floor"), pl.Float64)
    frame = pl.DataFrame(rows, schema=kinds)
    view = pl.DataFrame(
        {
            say("question"): frame["question"],
            say("best encoder"): frame["best"],
            say("score"): [cell(one["value"], one["low"], one["high"], True) for one in rows],
            say("than the pixel floor"): [
                say(one["beside_floor"]) + ("" if one["floor"] is None else f" ({one['floor']:.3f})") for one in rows
            ],
            say("not told from it"): [one["tied"] or say("none") for one in rows],
        },
        schema=[say(one) for one in ("question", "best encoder", "score", "than the pixel floor", "not told from it")],
    )
    caption = say(
        "Of the encoders with weights, trained here or outside, each with the readout that speaks for it. One that is "
        "not better than the floor tells no more than where pixels changed. Not told from it: within chance."
    )
    return Table("winners", say("Who wins on what"), caption, frame, view)


def _winner(protocol: Protocol, column: Column, resamples: int) -> Row | None:
    if column.metric in UNJUDGED:
        return None
    given = wide(protocol.scores, [column]).rename(
        {column.name: "value", f"{column.name}_low": "low", f"{column.name}_high": "high"}
    )
    rows = given.filter(pl.col("value").is_not_null())
    weighted = rows.filter(pl.col("init").is_in(["trained", "pretrained"]))
    racing = weighted.join(headline(protocol), on="label", how="semi", maintain_order="left").to_dicts()
    if not racing:
        return None
    floor = next(iter(rows.filter(encoder=FLOOR, init="none").to_dicts()), None)
    sign = -1 if column.metric in LOWER else 1
    best = max(racing, key=lambda one: sign * one["value"])
    compare = (
        Paired(protocol, resamples, column.group) if column.metric == "r2" and column.dimension == "mean" else None
    )
    tied = [one["name"] for one in racing if one is not best and _level(one, best, sign, compare, column.split)]
    return {
        "question": f"{protocol.brief}: {column.title}",
        "best": best["name"],
        **{name: best[name] for name in ("value", "low", "high")},
        "tied": ", ".join(tied),
        "floor": floor["value"] if floor else None,
        "beside_floor": _beside(best, floor, sign, compare, column.split) if floor else NOT_MEASURED,
        "metric": column.metric,
        "fingerprint": protocol.fingerprint,
    }

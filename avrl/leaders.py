"""Who leads a column of the scores table, and who cannot be told from the leader.

The difference to the leader is paired, on the same draws of the same episodes: tied where its interval holds zero. Of
a number whose sums of single episodes are not kept (AUC): tied where the row's own interval reaches the leader's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import polars as pl

from avrl.answers import headline
from avrl.comparison import CEILING, FLOOR, ROW
from avrl.tables import NOT_MEASURED, Table, cell, columns
from avrl.verdicts import STATISTICS, UNDECIDED, moving, standing
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from avrl.tables import Column
    from avrl.verdicts import Paired, Row

BEST, TIED = "best", "tied"
BETTER, WORSE = "better", "worse"
LOWER = ("epe",)  # is better
UNJUDGED = ("effective-rank",)  # more is not better
CONTROLS = ("chance", "control")  # groups that tell what knowing nothing comes to


def marked(table: Table, compare: Paired) -> Table:
    """The scores table with its leaders: ``best`` or ``tied`` behind a cell, and a column of it for each in the CSV.

    Floors and untrained twins may lead, and then they do; the ceiling, which sees the answer, may not.
    """
    numbers, view = table.numbers, table.view
    for column in columns(compare.protocol.scores):
        marks = _marks(numbers, column, _Race(column, compare))
        cells = [f"{text} {say(mark)}" if mark else text for text, mark in zip(view[column.title], marks, strict=True)]
        view = view.with_columns(pl.Series(column.title, cells, pl.String))
        numbers = numbers.with_columns(pl.Series(f"{column.name}_mark", marks, pl.String))
    caption = say(
        "Best: the highest of a column (of an error, the lowest) but for the ceiling; tied: not told from it, by "
        "the paired interval of the difference, or where no sums of episodes are kept because its own interval reaches "
        "it."
    )
    return replace(table, numbers=numbers, view=view, caption=f"{table.caption} {caption}")


def _marks(numbers: pl.DataFrame, column: Column, race: _Race) -> list[str]:
    rows = numbers.select(*ROW, value=column.name, low=f"{column.name}_low", high=f"{column.name}_high").to_dicts()
    racing = [one for one in rows if one["value"] is not None and one["encoder"] != CEILING]
    if len(racing) < 2 or column.metric in UNJUDGED or column.group in CONTROLS:
        return [""] * len(rows)
    best = max(racing, key=race.rank)
    if best["low"] is None:  # as of a few test episodes: nobody can be told from anybody
        return [""] * len(rows)
    runs = {id(one) for one in racing}
    return [BEST if one is best else TIED if id(one) in runs and race.level(one, best) else "" for one in rows]


def winners(compares: Sequence[Paired]) -> Table:
    """Which encoder wins on what: one line a question, headline rows of encoders with weights, beside the floor."""
    found = [_winner(column, one) for one in compares for column in columns(one.protocol.scores)]
    rows = [one for one in found if one]
    names = (
        "question",
        "best",
        "value",
        "low",
        "high",
        "tied",
        "floor",
        "beside_floor",
        "metric",
        "scores",
        "fingerprint",
    )
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
    return Table("winners", say("Who wins on what"), caption, frame, view, [one["scores"] for one in rows])


def _winner(column: Column, compare: Paired) -> Row | None:
    if column.metric in UNJUDGED or column.group in CONTROLS:
        return None
    protocol, race = compare.protocol, _Race(column, compare)
    rows = standing(protocol, column).filter(pl.col("value").is_not_null())
    weighted = rows.filter(pl.col("init").is_in(["trained", "pretrained"]))
    racing = weighted.join(headline(protocol), on="label", how="semi", maintain_order="left").to_dicts()
    if not racing:
        return None
    floor = next(iter(rows.filter(encoder=FLOOR, init="none").to_dicts()), None)
    best = max(racing, key=race.rank)
    tied = [one["name"] for one in racing if one is not best and race.level(one, best)]
    tied = tied if best["low"] is not None else [say("not known: no interval")]
    return {
        "question": f"{protocol.brief}: {column.title}",
        "best": best["name"],
        **{name: best[name] for name in ("value", "low", "high")},
        "tied": ", ".join(tied),
        "floor": floor["value"] if floor else None,
        "beside_floor": race.beside(best, floor) if floor else NOT_MEASURED,
        "metric": column.metric,
        "scores": best["scores"],
        "fingerprint": protocol.fingerprint,
    }


class _Race:
    """Rows of one column of one protocol against each other: paired where sums of single episodes say it."""

    def __init__(self, column: Column, compare: Paired) -> None:
        self._sign = -1 if column.metric in LOWER else 1
        self._compare = compare
        self._asked: tuple[str, tuple[str, ...], str] | None = None
        if column.metric == "r2" and column.dimension == "mean":
            self._asked = (column.split, moving(compare.protocol, column.group, column.split), "r2")
        elif column.metric in STATISTICS:
            self._asked = (column.split, (column.dimension,), column.metric)

    def rank(self, row: Row) -> float:
        """Higher is better."""
        return float(self._sign * row["value"])

    def level(self, row: Row, best: Row) -> bool:
        """Whether a row cannot be told from the best: the interval of the difference holds zero."""
        low, high = self._ends(row, best)
        return low is not None and high is not None and low <= 0 <= high

    def beside(self, row: Row, floor: Row) -> str:
        """Whether a row is better than the floor."""
        low, high = self._ends(row, floor)
        if low is None or high is None:
            return UNDECIDED
        return BETTER if low > 0 else WORSE if high < 0 else UNDECIDED

    def _ends(self, row: Row, other: Row) -> tuple[float | None, float | None]:
        """Interval of how much better a row is; unpaired, that of the row's own number beside the other's."""
        found = self._compare(row, other, *self._asked).interval if self._asked else None
        if found is not None:
            ends = sorted((self._sign * float(found.low), self._sign * float(found.high)))
        elif row["low"] is None or row["high"] is None:
            return None, None
        else:
            ends = sorted(self._sign * (row[end] - other["value"]) for end in ("low", "high"))
        return ends[0], ends[1]

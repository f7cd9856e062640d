"""Verdicts: which encoder stands above what, by how much, and what is not known.

A difference is paired: both encoders on the same draws of the same test episodes. "Above" and "below" mean
that the interval excludes zero; anything else is "undecided", and what nobody ran is "not measured".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from avrl.comparison import EVERY, FLOOR, ROW, UNSEEN, WHOLE
from avrl.encoders.pins import network
from avrl.intervals import FEWEST, N_RESAMPLES, Interval, Sums, interval, mean, r2, weights
from avrl.tables import LABEL, NOT_MEASURED, UNDEFINED, Column, Table, cell, wide
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from avrl.comparison import Protocol

ABOVE, BELOW, UNDECIDED = "above", "below", "undecided"
SPLITS = {WHOLE: pl.lit(True), EVERY: pl.lit(True), "val-seen": pl.col("seen"), UNSEEN: ~pl.col("seen")}
TWIN, PIXELS, OUTSIDE = "untrained twin", f"floor {FLOOR}", "best outside"
NUMBERS = {
    **dict.fromkeys([*ROW, "name", "label", "kind", "split", "against", "other", "verdict", "note"], pl.String),
    **dict.fromkeys(["difference", "low", "high"], pl.Float64),
    "episodes": pl.Int64,
}

Row = dict[str, Any]


class Drawn(NamedTuple):
    """A score of one row: on its E test episodes, and on each of R draws of them."""

    episodes: Any  # (E,) their numbers
    n: Any  # (E,) samples in each
    value: Any  # ()
    drawn: Any  # (R,)


class Measured(NamedTuple):
    """A paired difference, or the reason why there is none."""

    interval: Interval | None
    episodes: int
    note: str


def differences(compare: Paired) -> Table:
    """Headline R2 of each pretrained row minus its untrained twin, the pixel floor, the best outside row."""
    protocol = compare.protocol
    rows = heads(protocol).to_dicts()
    splits = [WHOLE] + [UNSEEN] * (not protocol.scores.filter(split=UNSEEN).is_empty())
    dims = {split: moving(protocol, protocol.group, split) for split in splits}
    found = [
        _entry(row, split, against, other, note or compare(row, other, split, dims[split]))
        for split in splits
        for row in rows
        for against, other, note in _opponents(row, rows)
    ]
    frame = pl.DataFrame(found, schema=NUMBERS)
    best = best_outside(rows)
    caption = say(
        "{group} R² of a row minus that of its untrained twin, the pixel-difference floor, and the best outside row "
        "({best}): paired, on the same draws of test episodes, [95% interval]. Above / below: the interval excludes "
        "zero. The best outside row was chosen on these same scores, which favours it.",
        group=say(protocol.group).capitalize(),
        best=best["label"] if best else say("none"),
    )
    return Table(f"differences-{protocol.slug}", say("Differences"), caption, frame, *_view(frame))


def moving(protocol: Protocol, group: str, split: str) -> tuple[str, ...]:
    """The dimensions of a group whose target moves in a split, as some row has a number for them."""
    known = protocol.scores.filter(pl.col("value").is_not_null(), group=group, metric="r2", split=split)
    return tuple(sorted(set(known["dimension"]) - {"mean"}))


def heads(protocol: Protocol) -> pl.DataFrame:
    """One row an encoder and readout, with its headline R2 as `value`, `low` and `high`."""
    return standing(protocol, Column(protocol.group, "r2", WHOLE, "mean"))


def standing(protocol: Protocol, column: Column) -> pl.DataFrame:
    """One row an encoder and readout, with its number of one column as `value`, `low` and `high`."""
    names = {column.name: "value", f"{column.name}_low": "low", f"{column.name}_high": "high"}
    return wide(protocol.scores, [column]).rename(names)


def _view(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """One line a row and test set, one column an opponent, the verdict behind the number; and whose they are."""
    shown = [
        f"{cell(one['difference'], one['low'], one['high'], False, sign=True)} {say(one['verdict'])}"
        if one["difference"] is not None
        else f"{say(NOT_MEASURED)}: {say(one['note'])}"
        for one in frame.iter_rows(named=True)
    ]
    long = frame.with_columns(pl.Series("shown", shown, pl.String))
    view = long.select(*ROW, "split", "kind", pl.col("label").alias(LABEL)).unique(maintain_order=True)
    for against in (TWIN, PIXELS, OUTSIDE):
        part = long.filter(against=against).select(*ROW, "split", pl.col("shown").alias(f"minus {against}"))
        view = view.join(part, on=[*ROW, "split"], how="left", maintain_order="left")
    lines = view.select(
        LABEL,
        "kind",
        pl.col("split").replace({WHOLE: "all", UNSEEN: "unseen"}).alias("test tasks"),
        pl.col(f"minus {TWIN}", f"minus {PIXELS}", f"minus {OUTSIDE}").fill_null(say("does not apply")),
    )
    return lines, view["scores"].to_list()


def _opponents(row: Row, rows: list[Row]) -> Iterator[tuple[str, Row | None, str]]:
    """What a row is measured against: (kind of opponent, its row, why there is none)."""
    if row["init"] not in ("trained", "pretrained"):
        return
    same = {"encoder": network(row["encoder"]), **{name: row[name] for name in ("readout", "pairing", "dims")}}
    twins = [one for one in rows if one["init"] == "random" and same.items() <= one.items()]
    own = [one for one in twins if one["checkpoint"] == row["checkpoint"]] or twins
    if row["init"] == "trained" or own:
        yield (
            TWIN,
            own[0] if len(own) == 1 else None,
            {0: "no untrained twin", 1: ""}.get(len(own), "several twins"),
        )
    floors = [one for one in rows if one["encoder"] == FLOOR and one["init"] == "none"]
    yield PIXELS, floors[0] if floors else None, "" if floors else f"no {FLOOR} floor"
    if row["init"] == "trained":
        best = best_outside(rows)
        yield OUTSIDE, best, "" if best else "no outside encoder"


def best_outside(rows: list[Row]) -> Row | None:
    """The outside row of highest headline R2 over all test tasks, with published weights."""
    outside = [one for one in rows if one["init"] == "pretrained" and one["encoder"] == network(one["encoder"])]
    known = [one for one in outside if one["value"] is not None]
    return max(known, key=lambda one: (one["value"], one["label"]), default=None)


def _entry(row: Row, split: str, against: str, other: Row | None, measured: Measured | str) -> Row:
    if isinstance(measured, str):
        measured = Measured(None, 0, measured)
    given = measured.interval
    value, low, high = (float(one) for one in given) if given else (None, None, None)
    verdict = NOT_MEASURED
    if low is not None and high is not None:
        verdict = ABOVE if low > 0 else BELOW if high < 0 else UNDECIDED
    return {
        **{name: row[name] for name in [*ROW, "name", "label", "kind"]},
        "split": split,
        "against": against,
        "other": other["label"] if other else "",
        "difference": value,
        "low": low,
        "high": high,
        "episodes": measured.episodes,
        "verdict": verdict,
        "note": measured.note,
    }


class Comparison:
    """Paired differences of rows. The draws of a row are made once, however often it is compared.

    Args:
        episodes: Sums of single episodes, of all rows.
        resamples: Of the bootstrap.
    """

    def __init__(self, episodes: pl.DataFrame, resamples: int) -> None:
        self.resamples = resamples
        self._weights: dict[int, Any] = {}
        self._drawn: dict[Any, Drawn | None] = {}
        self._parts = episodes.sort("dimension", "episode_index").partition_by(ROW, as_dict=True)

    def __call__(
        self, row: Row, other: Row | None, split: str, dimensions: tuple[str, ...], metric: str = "r2"
    ) -> Measured:
        """A score of `row` minus that of `other`, unweighted mean over some dimensions, on the same draws."""
        if not dimensions:
            return Measured(None, 0, UNDEFINED)
        asked = (split, dimensions, metric)
        one, two = self._draw(row, *asked), self._draw(other, *asked) if other else None
        if one is None or two is None:
            return Measured(None, 0, "no sums of single episodes")
        if not np.array_equal(one.episodes, two.episodes) or not np.array_equal(one.n, two.n):
            return Measured(None, 0, "scored on other episodes")
        count = len(one.n)
        found = interval(one.value - two.value, one.drawn - two.drawn, count)
        if count < FEWEST:
            return Measured(None, count, "too few test episodes")
        if not np.isfinite(found).all():
            return Measured(None, count, UNDEFINED)
        return Measured(found, count, "")

    def _draw(self, row: Row, split: str, dimensions: tuple[str, ...], metric: str) -> Drawn | None:
        """The score of a row on all its test episodes and on each draw of them; None if their sums are not there."""
        key = (tuple(row[name] for name in ROW), split, dimensions, metric)
        if key not in self._drawn:
            found, drawn = _sums(self._parts.get(key[0]), split, dimensions), None
            if found:
                episodes, sums = found
                count, score = len(episodes), STATISTICS[metric]
                if count not in self._weights:
                    self._weights[count] = weights(count, self.resamples)
                drawn = Drawn(episodes, sums.n, *(score(sums, one).mean(-1) for one in (None, self._weights[count])))
            self._drawn[key] = drawn
        return self._drawn[key]


class Paired(Comparison):
    """Paired differences of the rows of one protocol."""

    def __init__(self, protocol: Protocol, resamples: int = N_RESAMPLES) -> None:
        super().__init__(protocol.episodes, resamples)
        self.protocol = protocol


def _sums(part: pl.DataFrame | None, split: str, dimensions: tuple[str, ...]) -> tuple[Any, Sums] | None:
    """Episode numbers and sums of a row, (E, K), by episode and dimension; None if they are not all there."""
    if part is None:
        return None
    part = part.filter(pl.col("dimension").is_in(dimensions), SPLITS[split])
    if part.is_empty() or part.height % len(dimensions):
        return None
    shape = (len(dimensions), -1)
    index, n = (part[name].to_numpy().reshape(shape) for name in ("episode_index", "n"))
    if not (index == index[0]).all():
        return None
    sse, sum_y, sum_yy = (part[name].to_numpy().reshape(shape).T for name in ("sse", "sum_y", "sum_yy"))
    return index[0], Sums(n[0], sse, sum_y, sum_yy)


# What sums of single episodes can say of a metric: (sums, draws or None) -> (K,) or (R, K).
STATISTICS: dict[str, Callable[[Sums, Any], Any]] = {
    "r2": lambda sums, drawn: r2(*sums, drawn),
    "epe": lambda sums, drawn: mean(sums.sum_y, sums.n, drawn),
    "knn-accuracy": lambda sums, drawn: 1 - mean(sums.sse, sums.n, drawn),
}

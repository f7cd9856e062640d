"""The answer in words, made from the differences table and nothing else; what is not known is said too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from avrl.comparison import FLOOR, READOUTS, UNSEEN, WHOLE, Protocol, ranks
from avrl.tables import NOT_MEASURED
from avrl.verdicts import ABOVE, BELOW, OUTSIDE, PIXELS, TWIN, UNDECIDED, Row, best_outside, heads
from avrl.words import say

if TYPE_CHECKING:
    from avrl.tables import Table


def sentences(protocol: Protocol, differences: Table) -> list[str]:
    """Whether pretraining helps, whether anything beats the pixels, and how the outside encoders compare."""
    rows = heads(protocol).to_dicts()
    found = differences.numbers
    if not any(row["init"] == "trained" for row in rows):
        return [say("No encoder pretrained here has been scored."), *_floor(found, rows)]
    return [*_twins(found, protocol), *_floor(found, rows), *_outside(found, rows)]


def told(protocol: Protocol) -> list[str]:
    """What a probe says that predicts no motion: its verdicts, and where tasks lie furthest apart."""
    rows = protocol.scores.join(headline(protocol), on="label", how="semi", maintain_order="left")
    judged = rows.filter(split=WHOLE, metric="accuracy")
    said = []
    for verdict in ("pass", "undecided", "fail"):
        here = judged.filter(verdict=verdict).to_dicts()
        listed = ", ".join(f"{row['label']} ({_short(row, 'value')})" for row in here)
        text = "Order told right in at least 90% of pairs, {verdict}: {listed}."
        said += [say(text, verdict=say(verdict), listed=listed)] * bool(here)
    near = (
        rows.filter(group="task", metric="knn-accuracy").sort("value", descending=True, maintain_order=True).to_dicts()
    )
    best = [{"label": row["label"], "value": _short(row, "value")} for row in near[:1]]
    return said + [say("Neighbours tell the task best for {label}: {value}.", **one) for one in best]


def headline(protocol: Protocol) -> pl.DataFrame:
    """One row of scores an encoder: cls where it has one; as it is for encoders of pairs, the difference for others."""
    preferred = pl.col("readout").replace_strict(ranks(READOUTS), default=99, return_dtype=pl.Int64)
    rows = protocol.scores.select("name", "init", "label", "readout", "pairing").unique(maintain_order=True)
    first = rows.with_columns(_readout=preferred, _pairing=~pl.col("pairing").is_in(["diff", "pair"]))
    return (
        first.sort("_readout", "_pairing", "readout", "pairing", maintain_order=True)
        .unique(["name", "init"], keep="first", maintain_order=True)
        .select("label")
    )


def _twins(found: pl.DataFrame, protocol: Protocol) -> list[str]:
    against = found.filter(against=TWIN, kind="trained")
    heads = against.join(_labels(protocol), on=["name", "readout", "pairing"], how="semi", maintain_order="left")
    said = []
    for split, where in ((WHOLE, say("all test tasks")), (UNSEEN, say("unseen tasks"))):
        here = heads.filter(split=split)
        parts = {verdict: here.filter(verdict=verdict) for verdict in (ABOVE, UNDECIDED, BELOW, NOT_MEASURED)}
        measured, above = here.height - parts[NOT_MEASURED].height, parts[ABOVE].height
        if measured:
            text = "{above} of {measured} trained encoders above the untrained twin in {group} R², {where}"
            said.append(say(text, above=above, measured=measured, group=say(protocol.group), where=where))
            said[-1] += f": {_list(parts[ABOVE])}." if above else "."
        said += [say("Undecided, {where}: {list}.", where=where, list=_list(parts[UNDECIDED]))] * len(
            parts[UNDECIDED][:1]
        )
        said += [say("Below the untrained twin, {where}: {list}.", where=where, list=_list(parts[BELOW]))] * len(
            parts[BELOW][:1]
        )
        missing = parts[NOT_MEASURED]
        said += [say("Not measured against a twin, {where}: {list}.", where=where, list=_list(missing))] * len(
            missing[:1]
        )
    whole = against.filter(split=WHOLE)
    if whole.height > heads.filter(split=WHOLE).height:
        counts = {verdict: whole.filter(verdict=verdict).height for verdict in (ABOVE, BELOW, UNDECIDED)}
        tally = ", ".join(f"{count} {say(verdict)}" for verdict, count in counts.items())
        said.append(say("Over all {n} readouts of the trained encoders: {tally}.", n=whole.height, tally=tally))
    return said


def _labels(protocol: Protocol) -> pl.DataFrame:
    """The headline row of each trained encoder."""
    trained = protocol.scores.filter(init="trained")
    return trained.join(headline(protocol), on="label", how="semi").select("name", "readout", "pairing").unique()


def _floor(found: pl.DataFrame, rows: list[Row]) -> list[str]:
    here = found.filter(pl.col("difference").is_not_null(), against=PIXELS, split=WHOLE)
    if here.is_empty():
        return [say("Not measured against the pixel-difference floor ({floor}).", floor=FLOOR)]
    floor = next(row for row in rows if row["encoder"] == FLOOR and row["init"] == "none")
    named = f"{FLOOR}, R² {_score(floor)}"
    above = here.filter(verdict=ABOVE).sort("difference", descending=True, maintain_order=True)
    if above.is_empty():
        best = here.sort("difference", descending=True, maintain_order=True).head(1)
        text = "No encoder stands above the pixel-difference floor ({floor}); nearest is {best}."
        return [say(text, floor=named, best=_list(best))]
    rest = say(" and {n} more rows", n=above.height - 3) if above.height > 3 else ""
    text = "Above the pixel-difference floor ({floor}): {list}."
    return [say(text, floor=named, list=_list(above.head(3)) + rest)]


def _outside(found: pl.DataFrame, rows: list[Row]) -> list[str]:
    best = best_outside(rows)
    here = found.filter(pl.col("difference").is_not_null(), against=OUTSIDE, split=WHOLE)
    if best is None or here.is_empty():
        return [say("Not measured against any outside encoder.")]
    top = here.sort("difference", descending=True, maintain_order=True).head(1)
    words = {
        ABOVE: say("stands above it"),
        BELOW: say("stands below it"),
        UNDECIDED: say("is level with it within the interval"),
    }
    verdict = words[top["verdict"].item()]
    text = "Best outside row: {label} (R² {score}); our best, {top}, {verdict}."
    return [say(text, label=best["label"], score=_score(best), top=_list(top), verdict=verdict)]


def _list(rows: pl.DataFrame) -> str:
    """Rows with their differences, as a list in a sentence."""
    return ", ".join(
        row["label"] + ("" if row["difference"] is None else f" ({_short(row, 'difference', '+.2f')})")
        for row in rows.iter_rows(named=True)
    )


def _score(row: dict[str, Any]) -> str:
    return _short(row, "value")


def _short(row: dict[str, Any], name: str, form: str = ".2f") -> str:
    """A number and its interval to two decimals: a sentence is no place for more."""
    interval = "" if row["low"] is None or row["high"] is None else f" [{row['low']:{form}}, {row['high']:{form}}]"
    return f"{row[name]:{form}}{interval}"

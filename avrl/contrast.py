"""Two caches or two runs side by side: the same question under the same protocol, B minus A, paired.

A question is what a number answers (probe, target, gap, split, metric, group, dimension, training set) of whom
(encoder, weights, readout, pairing). Of two runs, encoder and checkpoint are what is compared, and so no part of it.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from avrl.cache import Cache, means
from avrl.comparison import EVERY, KINDS, READOUTS, WHOLE, ranks, read
from avrl.errors import ConfigError, NotFoundError
from avrl.tables import UNDEFINED, Column, Table, cell, columns
from avrl.typeset import plain
from avrl.verdicts import ABOVE, BELOW, STATISTICS, UNDECIDED, Comparison, Measured
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from avrl.artifact import Artifact

ASKED = ["probe", "target", "gap", "train", *Column._fields]
WHOM = ["encoder", "init", "readout", "pairing"]
# Asked of the same thing, but perhaps at another gap, or for another target.
LOOSE = ["probe", "train", *Column._fields]
APART = ["target", "gap", "n_train", "episodes_train", "n_test", "episodes_test"]
OF_B = ["value", "low", "high", "scores", "encoder", "checkpoint"]
EQUAL = "equal"  # the very same artifact on both sides
ALONE = "without interval"  # the metric, or the training set, keeps no sums of single episodes
TOLERANCE = 1e-6
MOST_NAMES = 10
ROWS, COLUMNS, WIDEST = 20, 100, 200  # of a terminal: of prose, of a table


class Side(NamedTuple):
    """What is compared: its name, whether it is one run (or a cache), and its scores artifacts."""

    name: str
    run: bool
    scores: list[Artifact]


class Contrast(NamedTuple):
    """Numbers of both sides with their paired difference, headline first, and what is to be said of the rest."""

    table: Table
    said: list[str]


def side(cache: Cache, name: str) -> Side:
    """The cache in a folder, or else the scores of the one run that a reference names in this cache.

    Raises:
        NotFoundError: it is neither, or several runs.
    """
    other = Cache(Path(name))
    if name and (other.root / "scores").is_dir():
        return Side(name, run=False, scores=other.artifacts("scores"))
    scores, ref = cache.artifacts("scores"), Path(name).name
    known = sorted({str(one.manifest.config.get("checkpoint", "")) for one in scores} - {""})
    called = {str(one.manifest.config.get("checkpoint", "")) for one in scores if one.manifest.config["encoder"] == ref}
    fits = [ref] if ref in known else sorted(called - {""}) or [one for one in known if means(ref, one)]
    if len(fits) != 1:
        what = f"{len(fits)} runs fit" if fits else f"no folder with scores, nor a run that {cache.root} has scores of"
        raise NotFoundError(f"{name!r}: {what}", f"known: {', '.join(fits or known) or 'no run'}")
    return Side(fits[0], run=True, scores=[one for one in scores if one.manifest.config["checkpoint"] == fits[0]])


def contrast(a: Side, b: Side, resamples: int, *, every: bool) -> Contrast:
    """B minus A wherever both have answered the same question under the same protocol.

    Args:
        a: One side.
        b: The other, of the same sort.
        resamples: Of the bootstrap over episodes.
        every: All numbers, not only the headline: the mean of each group on the whole test split.

    Raises:
        ConfigError: a cache beside a run.
        IntegrityError: an artifact's table cannot be read.
        NotFoundError: a side has no scores.
    """
    if a.run != b.run:
        raise ConfigError(f"{a.name} and {b.name}: one is a cache, the other a run", "name two caches or two runs")
    for one in (a, b):
        if not one.scores:
            raise NotFoundError(f"{one.name} has no scores of what was asked", "make some with: avrl probe")
    left, right = _read(a, "A"), _read(b, "B")
    whom = [name for name in WHOM if name != "encoder" or not a.run]
    pairs = _headed(_paired(left.scores, right.scores, whom))
    heads = pairs.filter(pl.col("headline"))
    numbers = _measured(pairs if every else heads, (left, right), resamples)
    table = Table(
        "contrast",
        say("B beside A"),
        say(
            "A: {a}. B: {b}. B minus A on the same draws of the same test episodes, [95% interval]; what is decided "
            "comes first. Above / below: the interval excludes zero.",
            a=a.name,
            b=b.name,
        ),
        numbers.drop("headline", "row_a", "row_b"),
        _view(numbers.filter(pl.col("headline")), whom),
    )
    same = len(set(left.digests.values()) & set(right.digests.values()))
    said = [say("{count} scores artifacts are the same in A and B (same digest).", count=same)] * bool(same)
    rest = _unpaired(
        left.scores.with_columns(paired=pl.col("row_a").is_in(pairs["row_a"].implode())),
        right.scores.with_columns(paired=pl.col("row_b").is_in(pairs["row_b"].implode())),
        whom,
    )
    return Contrast(table, [_tally(numbers, pairs.height), *said, *rest])


def screen(found: Contrast) -> str:
    """One screen: the tally, the first rows, and what is to be said of the rest."""
    tally, *rest = (textwrap.fill(one, COLUMNS, subsequent_indent="  ") for one in found.said)
    view, more = found.table.view, found.table.view.height - ROWS
    rows = plain(view.head(ROWS), ROWS, WIDEST) + ("\n" + say("... and {more} more: --format csv", more=more)) * (
        more > 0
    )
    return "\n\n".join([textwrap.fill(found.table.caption, COLUMNS), tally, rows, *rest])


class _Read(NamedTuple):
    """What a side has: all scores, all sums, and the digests of its artifacts by name."""

    scores: pl.DataFrame
    episodes: pl.DataFrame
    digests: dict[str, str]


def _read(one: Side, mark: str) -> _Read:
    """Two caches may have artifacts of one name, so the name says the side; a number without protocol is no answer."""
    name = pl.concat_str(pl.lit(f"{mark}/"), "scores")
    scores, episodes = (frame.with_columns(scores=name) for frame in read(one.scores))
    order = ["probe", "target", "gap", "_floor", "encoder", "_init", "_readout"]
    scores = scores.filter(pl.col("fingerprint") != "").with_columns(
        _floor=pl.col("init") == "none",
        _init=pl.col("init").replace_strict(ranks(tuple(KINDS)), default=99, return_dtype=pl.Int64),
        _readout=pl.col("readout").replace_strict(ranks(READOUTS), default=99, return_dtype=pl.Int64),
    )
    scores = scores.sort(order, maintain_order=True).drop("_floor", "_init", "_readout")
    return _Read(
        scores.with_row_index(f"row_{mark.lower()}"),
        episodes,
        {f"{mark}/{each.ref}": each.digest for each in one.scores},
    )


def _paired(left: pl.DataFrame, right: pl.DataFrame, whom: list[str]) -> pl.DataFrame:
    """Rows of A beside those of B. Where a side has several checkpoints of one encoder, each beside itself only."""
    key = [*ASKED, *whom, "fingerprint"]
    counts = pl.concat([one.group_by(key).agg(pl.col("checkpoint").n_unique()) for one in (left, right)])
    several = counts.filter(pl.col("checkpoint") > 1).select(key, several=True).unique()
    which = pl.when("several").then("checkpoint").otherwise(pl.lit(""))
    on = [*key, "which", "again"]  # what a side has answered twice is paired in the order of its artifacts
    one, two = (
        each.join(several, on=key, how="left", maintain_order="left")
        .with_columns(which=which)
        .with_columns(again=pl.int_range(pl.len()).over(*key, "which"))
        for each in (left, right)
    )
    two = two.select(*on, "row_b", *(pl.col(name).alias(f"{name}_b") for name in OF_B))
    return one.join(two, on=on, maintain_order="left").drop("several", "which", "again")


def _headed(pairs: pl.DataFrame) -> pl.DataFrame:
    """Pairs with a mark at those of the headline, which come first."""
    parts = pairs.filter(train="all").partition_by("fingerprint", as_dict=True)
    heads = [
        {"fingerprint": key[0], **one._asdict(), "train": "all", "headline": True}
        for key, part in parts.items()
        for one in columns(part)
        if one.split in (WHOLE, EVERY)
    ]
    kinds = {**dict.fromkeys(["fingerprint", *Column._fields, "train"], pl.String), "headline": pl.Boolean}
    marked = pairs.join(
        pl.DataFrame(heads, schema=kinds), on=list(kinds)[:-1], how="left", maintain_order="left"
    ).with_columns(pl.col("headline").fill_null(False))
    return marked.sort("headline", descending=True, maintain_order=True)


def _measured(pairs: pl.DataFrame, sides: tuple[_Read, _Read], resamples: int) -> pl.DataFrame:
    """Pairs with difference, interval and verdict."""
    digest = sides[0].digests | sides[1].digests
    compare = Comparison(pl.concat([one.episodes for one in sides]), resamples)
    moving = sides[0].scores.filter(
        pl.col("value").is_not_null(), pl.col("dimension") != "mean", metric="r2", train="all"
    )
    groups = moving.group_by("fingerprint", "group", "split").agg(pl.col("dimension").unique().sort())
    dims = {tuple(row[:3]): tuple(row[3]) for row in groups.iter_rows()}
    found = []
    for row in pairs.iter_rows(named=True):
        other = {**row, **{name: row[f"{name}_b"] for name in OF_B}}
        many = row["dimension"] == "mean"
        of = dims.get((row["fingerprint"], row["group"], row["split"]), ()) if many else (row["dimension"],)
        point = None if row["value"] is None or other["value"] is None else other["value"] - row["value"]
        if digest[row["scores"]] == digest[other["scores"]]:
            found.append({"difference": point, "verdict": EQUAL if point is not None else UNDEFINED})
        elif point is None:
            found.append({"verdict": UNDEFINED})
        elif row["metric"] not in STATISTICS or row["train"] != "all":
            found.append({"difference": point, "verdict": ALONE, "note": say("no sums of single episodes")})
        else:
            found.append(_verdict(point, compare(other, row, row["split"], of, row["metric"])))
    kinds = {**dict.fromkeys(["difference", "difference_low", "difference_high"], pl.Float64), "verdict": pl.String}
    kinds |= {"note": pl.String}
    return pl.concat([pairs.drop("note", "verdict"), pl.DataFrame(found, schema=kinds)], how="horizontal")


def _verdict(point: float, measured: Measured) -> dict[str, Any]:
    given = measured.interval
    # Sums of something else than the number that stands in the table would give an interval of something else.
    if given is None or abs(float(given.value) - point) > TOLERANCE:
        return {"difference": point, "verdict": ALONE, "note": measured.note or say("no sums of single episodes")}
    low, high = float(given.low), float(given.high)
    verdict = ABOVE if low > 0 else BELOW if high < 0 else UNDECIDED
    return {"difference": point, "difference_low": low, "difference_high": high, "verdict": verdict, "note": ""}


def _view(numbers: pl.DataFrame, whom: list[str]) -> pl.DataFrame:
    rows = [
        (
            _label(row, whom),
            f"{row['probe']} {row['target']} gap {row['gap']}".replace("  ", " "),
            Column(*(row[name] for name in Column._fields)).title,
            *(cell(row[name], None, None, True) for name in ("value", "value_b")),
            f"{cell(row['difference'], row['difference_low'], row['difference_high'], True, sign=True)} "
            + say(row["verdict"]),
        )
        for row in numbers.sort(~pl.col("verdict").is_in([ABOVE, BELOW]), maintain_order=True).iter_rows(named=True)
    ]
    names = [say("encoder · readout") if "encoder" in whom else "readout", "probe", say("number")]
    return pl.DataFrame(rows, schema=dict.fromkeys([*names, "A", "B", say("B minus A")], pl.String), orient="row")


def _label(row: dict[str, Any], whom: list[str]) -> str:
    """As tables name a row; a floor is its own readout."""
    name = row["encoder"] if "encoder" in whom else ""
    if row["init"] == "none":
        return str(row["encoder"])
    pairing = f", {row['pairing']}" if row["pairing"] not in ("pair", "none") else ""
    twin = say(" (untrained)") if row["init"] == "random" else ""
    return f"{name} · {row['readout']}{pairing}{twin}".removeprefix(" · ")


def _tally(numbers: pl.DataFrame, paired: int) -> str:
    counts = {name: numbers.filter(verdict=name).height for name in (ABOVE, BELOW, UNDECIDED, EQUAL, ALONE)}
    listed = ", ".join(f"{count} {say(name)}" for name, count in counts.items() if count)
    return say(
        "{paired} numbers of B may be set beside A's; of the {shown} here B is: {listed}.",
        paired=paired,
        shown=numbers.height,
        listed=listed or say("none"),
    )


def _unpaired(left: pl.DataFrame, right: pl.DataFrame, whom: list[str]) -> Iterator[str]:
    """Why numbers of both are not beside one another, and what only one side has."""
    near = {"A": _nearest(left, right, whom), "B": _nearest(right, left, whom)}
    reasons = {mark: Counter(_why(row, mark) for row in one.iter_rows(named=True)) for mark, one in near.items()}
    for why, _ in (reasons["A"] + reasons["B"]).most_common(MOST_NAMES):
        a, b = (reasons[mark][why] for mark in near)
        yield say("Not comparable ({a} numbers of A, {b} of B): {why}.", a=a, b=b, why=why)
    for mark, one, row in (("A", left, "row_a"), ("B", right, "row_b")):
        alone = one.filter(~pl.col("paired")).join(near[mark], on=row, how="anti", maintain_order="left")
        names = list(dict.fromkeys(f"{each['probe']}: {_label(each, whom)}" for each in alone.iter_rows(named=True)))
        if names:
            more = len(names) - MOST_NAMES
            listed = "; ".join(names[:MOST_NAMES]) + (say("; and {more} more", more=more) if more > 0 else "")
            yield say("In {mark} only ({count} numbers): {listed}.", count=alone.height, mark=mark, listed=listed)


def _nearest(one: pl.DataFrame, other: pl.DataFrame, whom: list[str]) -> pl.DataFrame:
    """Unpaired rows of a side, each with the other's most like it: of the same gap and target, or unpaired too."""
    row = "row_a" if "row_a" in one.columns else "row_b"
    rows = one.filter(~pl.col("paired")).join(other, on=[*LOOSE, *whom], suffix="_other", maintain_order="left")
    alike = {name: pl.col(name).eq_missing(pl.col(f"{name}_other")) for name in ("fingerprint", *APART)}
    rows = rows.filter((alike["gap"] & alike["target"]) | ~pl.col("paired_other"))
    rows = rows.sort(pl.sum_horizontal(*alike.values()), descending=True, maintain_order=True)
    return rows.unique(row, keep="first", maintain_order=True)


def _why(row: dict[str, Any], mark: str) -> str:
    if row["fingerprint"] == row["fingerprint_other"]:
        return say("the other side has fewer answers to it")
    ends = ("", "_other") if mark == "A" else ("_other", "")
    apart = [(name, *(row[name + end] for end in ends)) for name in APART]
    listed = "; ".join(say("{name} {a} in A, {b} in B", name=name, a=a, b=b) for name, a, b in apart if a != b)
    return listed or say("other data, samples or solver")

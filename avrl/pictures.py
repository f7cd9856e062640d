"""Pictures of scores and of training, in the style of `avrl.drawing`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from avrl.answers import headline
from avrl.comparison import FLOOR, KINDS, ROW, WHOLE
from avrl.drawing import (
    BLUE,
    DASHES,
    GREEN,
    GREY,
    INK,
    LINES,
    NARROWEST,
    ORANGE,
    ROWS,
    SHAPES,
    Spec,
    columns,
    cycle,
    finish,
    scale,
)
from avrl.verdicts import heads
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from avrl.comparison import Protocol

KIND_COLOURS = dict(zip(KINDS.values(), (BLUE, GREEN, ORANGE, GREY), strict=True))
KIND_SHAPES = dict(zip(KINDS.values(), ("circle", "diamond", "triangle-up", "cross"), strict=True))
METERS = {
    **{"rank_cls": "rank of CLS (directions)", "rank_patches": "rank of patches (directions)"},
    **{"cosine_cls": "mean cosine of CLS", "cosine_patches": "mean cosine of patches"},
}
ON_SHADE = "#101010"  # on a cell of the heat map: not `INK`, which turns light in the dark
SHARES = ("1%", "10%")
MOST_LINES = 12  # in one figure
MOST_ROWS = 40  # a forest; more cannot be read
MOST_POINTS = 400  # a curve; more cannot be seen and would swell the page
ALL_POINTS = 4000  # of a quantity: dozens of curves took seconds to draw


def forest(protocol: Protocol, width: int = 640) -> Spec:
    """Headline R2 with its interval, in the order of the main table: of every row, or of some where they are many."""
    every = (
        heads(protocol)
        .filter(pl.col("value").is_not_null(), pl.col("kind").is_in(list(KINDS.values())))
        .select("label", "kind", "value", "low", "high")
    )
    rows = every
    if rows.height > MOST_ROWS:
        rows = rows.join(headline(protocol), on="label", how="semi", maintain_order="left")
    if rows.height > MOST_ROWS:
        rows = rows.filter(pl.col("value").rank("ordinal", descending=True) <= MOST_ROWS)
    # A row at -12 would press everything else to one side, so the axis ends at -0.5.
    lowest = max(-0.5, min([0.0, *rows["low"].drop_nulls().to_list(), *rows["value"].to_list()]))
    rows = rows.with_columns(pl.Series("kind", [say(kind) for kind in rows["kind"]], pl.String))
    kinds = {say(kind): kind for kind in KINDS.values() if say(kind) in set(rows["kind"])}
    base = alt.Chart(ROWS).encode(
        y=alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=300)),
        color=scale(alt.Color, "kind:N", list(kinds), [KIND_COLOURS[kind] for kind in kinds.values()]),
    )
    x = alt.X(
        "value:Q",
        title=f"{say(protocol.group)} R²",
        axis=alt.Axis(tickCount=6),
        scale=alt.Scale(domain=[lowest, 1], clamp=True),
    )
    rule = base.mark_rule(strokeWidth=1.6).encode(x=x.copy(), x2="high:Q").transform_calculate(value="datum.low")
    point = base.mark_point(filled=True, size=60, opacity=1).encode(
        x=x, shape=scale(alt.Shape, "kind:N", list(kinds), [KIND_SHAPES[kind] for kind in kinds.values()])
    )
    chart = alt.layer(rule, point).properties(width=width, height=alt.Step(19))
    if rows.height < every.height:
        text = say(
            "{shown} of {all} rows, one readout an encoder; the tables have all", shown=rows.height, all=every.height
        )
        chart = chart.properties(title=alt.Title(text, anchor="start", fontSize=11, fontWeight="normal", color=INK))
    return finish(chart, rows.to_dicts())


def heat(protocol: Protocol, width: int = 640) -> Spec:
    """Headline rows by target dimension: R2 on all test tasks as shade and as number."""
    rows = protocol.scores.join(headline(protocol), on="label", how="semi", maintain_order="left")
    rows = rows.filter(pl.col("dimension") != "mean", pl.col("value").is_not_null(), metric="r2", split=WHOLE)
    rows = rows.select("label", "dimension", "value").unique(["label", "dimension"], keep="first", maintain_order=True)
    chart = alt.Chart(ROWS).encode(
        x=alt.X("dimension:N", sort=None, title=None, axis=alt.Axis(orient="top", labelAngle=-45, labelLimit=120)),
        y=alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=300)),
    )
    shade = alt.Color(
        "value:Q",
        title=say("R², shade from 0 to 1"),
        scale=alt.Scale(scheme="blues", domain=[0, 1], clamp=True),
        legend=None if width < NARROWEST else alt.Legend(direction="horizontal", gradientLength=160),
    )
    dark = alt.condition(alt.datum.value > 0.6, alt.value("#ffffff"), alt.value(ON_SHADE))
    number = chart.mark_text(fontSize=10).encode(text=alt.Text("value:Q", format=".2f"), color=dark)
    layers = [chart.mark_rect().encode(color=shade), number]
    step = max(26, min(60, width // max(1, rows["dimension"].n_unique())))
    drawn = alt.layer(*layers).properties(width=alt.Step(step), height=alt.Step(20))
    return finish(drawn, rows.with_columns(pl.col("value").round(3)).to_dicts())


def gaps(protocols: Sequence[Protocol], width: int = 640) -> Spec:
    """Headline R2 against the gap of a pair; every gap is a protocol of its own."""
    parts = [_spoken(one, one.scores).with_columns(x=pl.col("gap_s")) for one in protocols]
    return _ends(pl.concat(parts), say("gap, s"), f"{say(protocols[0].group)} R²", width, log=False)


def few(protocol: Protocol, width: int = 640) -> Spec:
    """Headline R2 against how many training episodes there were."""
    less = protocol.others.filter(pl.col("train").is_in(SHARES))
    labels = protocol.scores.select(*ROW, "label", "name", "kind").unique(maintain_order=True)
    every = pl.concat([protocol.scores, less.join(labels, on=ROW, how="inner", maintain_order="left")], how="diagonal")
    rows = _spoken(protocol, every).with_columns(x=pl.col("episodes_train").cast(pl.Float64))
    return _ends(rows, say("training episodes"), f"{say(protocol.group)} R²", width, log=True)


def speaks(protocol: Protocol) -> bool:
    """Whether a protocol has a row for `few` and `gaps` yet: a matrix that was stopped early may have floors alone."""
    return not _spoken(protocol, protocol.scores).is_empty()


def _spoken(protocol: Protocol, scores: pl.DataFrame) -> pl.DataFrame:
    """Mean R2 of the headline group on all test tasks: headline rows of trained and outside encoders, and the floor."""
    rows = scores.join(headline(protocol), on="label", how="semi", maintain_order="left")
    rows = rows.filter(pl.col("value").is_not_null(), group=protocol.group, dimension="mean", metric="r2", split=WHOLE)
    chosen = pl.col("init").is_in(["trained", "pretrained"]) | (pl.col("encoder") == FLOOR)
    return rows.filter(chosen).select("label", "value", "low", "high", "gap_s", "episodes_train")


def _ends(rows: pl.DataFrame, across: str, up: str, width: int, *, log: bool) -> Spec:
    """A line an encoder, with the interval of each point."""
    names = rows["label"].unique(maintain_order=True).to_list()[:MOST_LINES]
    rows = rows.filter(pl.col("label").is_in(names)).with_columns(pl.col("value", "low", "high").clip(lower_bound=-0.5))
    across_scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    x = alt.X("x:Q", title=across, scale=across_scale, axis=alt.Axis(values=sorted(set(rows["x"])), format=".4~g"))
    chart = alt.Chart(ROWS).encode(
        x=x, y=alt.Y("value:Q", title=up), color=scale(alt.Color, "label:N", names, cycle(LINES, names))
    )
    dashes = scale(alt.StrokeDash, "label:N", names, cycle(DASHES, names))
    shapes = scale(alt.Shape, "label:N", names, cycle(SHAPES, names))
    layers = [
        chart.mark_rule(strokeWidth=1).encode(y=alt.Y("low:Q", title=up), y2="high:Q"),
        chart.mark_line(strokeWidth=1.8).encode(strokeDash=dashes),
        chart.mark_point(size=44, opacity=1, filled=True).encode(shape=shapes),
    ]
    drawn = alt.layer(*layers).properties(width=width, height=240)
    return finish(drawn, rows.select("label", "x", "value", "low", "high").to_dicts(), columns=columns(width))


def curves(logs: Mapping[str, pl.DataFrame], width: int = 640) -> Spec:
    """Loss and skill of all checkpoints against the samples they have seen; skill on held-out episodes as points."""
    names = list(logs)
    rows, title = _rows(logs, ("loss", "skill", "held_out_skill")), say("skill (points: held out)")
    seen = _line(ROWS, names, "skill", title) + _points(ROWS, names, "held_out_skill", title)
    panels = [_line(ROWS, names, "loss", say("loss (own units of each objective)")), seen]
    chart = alt.vconcat(*(one.properties(width=width, height=190) for one in panels))
    return finish(chart, rows, columns=columns(width))


def meters(logs: Mapping[str, pl.DataFrame], width: int = 640) -> Spec:
    """Collapse meters of both codes on held-out episodes, look by look, against the samples seen."""
    names = list(logs)
    panels = [
        (_line(ROWS, names, name, say(title)) + _points(ROWS, names, name, say(title))).properties(
            width=width, height=150
        )
        for name, title in METERS.items()
    ]
    return finish(alt.vconcat(*panels), _rows(logs, METERS), columns=columns(width))


def _rows(logs: Mapping[str, pl.DataFrame], quantities: Iterable[str]) -> list[dict[str, Any]]:
    """Logs in long form, without what was not measured, thinned evenly to what can be seen; the last row stays."""
    found, most = [], min(MOST_POINTS, ALL_POINTS // max(1, len(logs)))
    for name, log in logs.items():
        for quantity in quantities:
            if quantity in log.columns:
                value = pl.col(quantity).cast(pl.Float64).fill_nan(None)
                rows = log.select("samples", value=value).drop_nulls().reverse()
                kept = rows.gather_every(max(1, rows.height // most)).reverse()
                found.append(kept.with_columns(quantity=pl.lit(quantity), checkpoint=pl.lit(name)))
    return pl.concat(found).to_dicts() if found else []


def _axes(data: Any, quantity: str, title: str) -> Any:
    """A quantity against samples, to be drawn as lines or points."""
    return (
        alt.Chart(data)
        .transform_filter(alt.datum.quantity == quantity)
        .encode(
            x=alt.X("samples:Q", title=say("samples seen (frame pairs or clips)"), axis=alt.Axis(format="~s")),
            y=alt.Y(
                "value:Q", title=title, scale=alt.Scale(zero=quantity in METERS)
            ),  # or a wobble looks like collapse
        )
    )


def _line(data: Any, names: list[str], quantity: str, title: str) -> Any:
    return (
        _axes(data, quantity, title)
        .mark_line(strokeWidth=1.8)
        .encode(
            color=scale(alt.Color, "checkpoint:N", names, cycle(LINES, names)),
            strokeDash=scale(alt.StrokeDash, "checkpoint:N", names, cycle(DASHES, names)),
        )
    )


def _points(data: Any, names: list[str], quantity: str, title: str) -> Any:
    return (
        _axes(data, quantity, title)
        .mark_point(size=36, opacity=1)
        .encode(
            color=scale(alt.Color, "checkpoint:N", names, cycle(LINES, names)),
            shape=scale(alt.Shape, "checkpoint:N", names, cycle(SHAPES, names)),
        )
    )

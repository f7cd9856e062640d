"""Pictures of scores and of training, drawn offline; the same numbers give the same bytes.

What a mark means is told by shape (or dash) as well as by colour, so that a grey print and a colour-blind
reader lose nothing. Colours follow Okabe & Ito 2008, "Color universal design"; in the dark the page swaps
them, by their hexadecimal value, for lighter ones (`NIGHT`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl
import vl_convert

from avrl.answers import headline
from avrl.comparison import KINDS
from avrl.verdicts import heads
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from avrl.comparison import Protocol

INK, GRID = "#222222", "#dddddd"
BLUE, ORANGE, GREEN, GREY, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#6b6b6b", "#aa4499", "#3399cc"
NIGHT = {INK: "#d8d8d8", GRID: "#3a3a3a", BLUE: "#56b4e9", ORANGE: "#ff9a55", GREEN: "#2fd0a0"}
NIGHT |= {GREY: "#a8a8a8", PURPLE: "#e08ad0", SKY: "#9bd4ff"}
KIND_COLOURS = dict(zip(KINDS.values(), (BLUE, GREEN, ORANGE, GREY), strict=True))
KIND_SHAPES = dict(zip(KINDS.values(), ("circle", "diamond", "triangle-up", "cross"), strict=True))
LINES = (BLUE, ORANGE, GREEN, PURPLE, GREY, SKY)
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 1], [10, 4])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
# Shapes that are told apart in black and white, one a task.
MARKS = (*SHAPES, "triangle-left", "triangle-right", "arrow", "wedge", "M-1,-1L1,1M1,-1L-1,1", "M0,-1V1")
REST = "other tasks"
SKILL = "skill (points: held out)"
RANKS = {"rank_cls": "rank of CLS (directions)", "rank_patches": "rank of patches (directions)"}
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
MOST_ROWS = 40  # a forest; more cannot be read
MOST_POINTS = 400  # a curve; more cannot be seen and would swell the page
ALL_POINTS = 4000  # of a quantity: dozens of curves took seconds to draw
MOST_DOTS = 200  # a map
VEGA_LITE = "6.1"
ROWS = alt.NamedData("rows")  # put in at the end: altair copies and validates what it holds, for seconds

Spec = dict[str, Any]


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
    kinds = [kind for kind in KINDS.values() if kind in set(rows["kind"])]
    base = alt.Chart(ROWS).encode(
        y=alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=300)),
        color=_scale(alt.Color, "kind:N", kinds, [KIND_COLOURS[kind] for kind in kinds]),
    )
    x = alt.X(
        "value:Q",
        title=f"{protocol.group} R²",
        axis=alt.Axis(tickCount=6),
        scale=alt.Scale(domain=[lowest, 1], clamp=True),
    )
    rule = base.mark_rule(strokeWidth=1.6).encode(x=x.copy(), x2="high:Q").transform_calculate(value="datum.low")
    point = base.mark_point(filled=True, size=60, opacity=1).encode(
        x=x, shape=_scale(alt.Shape, "kind:N", kinds, [KIND_SHAPES[kind] for kind in kinds])
    )
    chart = alt.layer(rule, point).properties(width=width, height=alt.Step(19))
    if rows.height < every.height:
        text = say(
            "{shown} of {all} rows, one readout an encoder; the tables have all", shown=rows.height, all=every.height
        )
        chart = chart.properties(title=alt.Title(text, anchor="start", fontSize=11, fontWeight="normal", color=INK))
    return _finish(chart, rows.to_dicts())


def curves(logs: Mapping[str, pl.DataFrame], width: int = 640) -> Spec:
    """Loss and skill of all checkpoints against the samples they have seen; skill on held-out episodes as points."""
    names = list(logs)
    rows = _rows(logs, ("loss", "skill", "held_out_skill"))
    seen = _line(ROWS, names, "skill", SKILL) + _points(ROWS, names, "held_out_skill", SKILL)
    panels = [_line(ROWS, names, "loss", "loss (own units of each objective)"), seen]
    chart = alt.vconcat(*(one.properties(width=width, height=190) for one in panels))
    return _finish(chart, rows, columns=_columns(width))


def ranks(logs: Mapping[str, pl.DataFrame], width: int = 640) -> Spec:
    """Effective rank of both codes on held-out episodes, look by look, against the samples seen."""
    names = list(logs)
    panels = [
        (_line(ROWS, names, name, title) + _points(ROWS, names, name, title)).properties(width=width, height=150)
        for name, title in RANKS.items()
    ]
    return _finish(alt.vconcat(*panels), _rows(logs, RANKS), columns=_columns(width))


def maps(points: Mapping[str, pl.DataFrame], width: int = 640) -> Spec:
    """Maps of vectors, one an encoder, a point a vector, colour and shape by task; rarer tasks share a grey dot."""
    shown = pl.concat([one.with_columns(label=pl.lit(label)) for label, one in points.items()])
    counts = shown["task"].value_counts().sort("count", "task", descending=[True, False])
    names = sorted(counts["task"][: len(MARKS)])
    some = [one.gather_every(max(1, one.height // MOST_DOTS)) for one in shown.partition_by("label")]
    rows = pl.concat(some).with_columns(task=pl.when(pl.col("task").is_in(names)).then("task").otherwise(pl.lit(REST)))
    rest = [REST] * (REST in set(rows["task"]))
    across = max(1, width // 200)
    chart = (
        alt.Chart(ROWS)
        .mark_point(size=16, opacity=0.8, strokeWidth=1.1)
        .encode(
            x=alt.X("x:Q", axis=None, scale=alt.Scale(zero=False)),
            y=alt.Y("y:Q", axis=None, scale=alt.Scale(zero=False)),
            color=_scale(alt.Color, "task:N", names + rest, _cycle(LINES, names) + [GREY] * len(rest)),
            shape=_scale(alt.Shape, "task:N", names + rest, list(MARKS[: len(names)]) + ["stroke"] * len(rest)),
        )
        .properties(width=(width - 20 * across) // across, height=150)
        .facet(facet=alt.Facet("label:N", title=None, sort=list(points)), columns=across)
        .resolve_scale(x="independent", y="independent")
    )
    return _finish(chart, rows.select("label", "task", pl.col("x", "y").round(2)).to_dicts(), columns=_columns(width))


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
            x=alt.X("samples:Q", title="samples seen (frame pairs or clips)", axis=alt.Axis(format="~s")),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=quantity in RANKS)),  # or a wobble looks like collapse
        )
    )


def _line(data: Any, names: list[str], quantity: str, title: str) -> Any:
    return (
        _axes(data, quantity, title)
        .mark_line(strokeWidth=1.8)
        .encode(
            color=_scale(alt.Color, "checkpoint:N", names, _cycle(LINES, names)),
            strokeDash=_scale(alt.StrokeDash, "checkpoint:N", names, _cycle(DASHES, names)),
        )
    )


def _points(data: Any, names: list[str], quantity: str, title: str) -> Any:
    return (
        _axes(data, quantity, title)
        .mark_point(size=36, opacity=1)
        .encode(
            color=_scale(alt.Color, "checkpoint:N", names, _cycle(LINES, names)),
            shape=_scale(alt.Shape, "checkpoint:N", names, _cycle(SHAPES, names)),
        )
    )


def _columns(width: int) -> int:
    """Of a legend."""
    return 2 if width > 300 else 1


def _cycle(values: tuple[Any, ...], names: list[str]) -> list[Any]:
    return [values[i % len(values)] for i in range(len(names))]


def _scale(channel: Any, field: str, domain: list[str], values: list[Any]) -> Any:
    """One channel of a merged legend. The title is empty and the same, or Vega-Lite draws two legends."""
    return channel(field, title=None, scale=alt.Scale(domain=domain, range=values), sort=None)


def _finish(chart: Any, rows: list[dict[str, Any]], columns: int = 2) -> Spec:
    """House style: one font, one ink, legend below, no background, so that a dark page shows through."""
    text: Any = {"labelColor": INK, "titleColor": INK, "labelFontSize": 11, "titleFontSize": 11}
    text |= {"titleFontWeight": "normal", "titlePadding": 9, "labelFont": FONT, "titleFont": FONT}
    # A browser without that font draws a wider one: room on the left, so that no label is cut.
    padding = {"left": 64, "right": 12, "top": 5, "bottom": 5}
    styled = chart.configure(background="transparent", font=FONT, padding=padding)
    styled = styled.configure_axis(**text, gridColor=GRID, domainColor=INK, tickColor=INK)
    styled = styled.configure_legend(
        **text, orient="bottom", columns=columns, columnPadding=40, labelLimit=300, symbolStrokeWidth=2
    )
    return {**styled.configure_view(stroke=None).to_dict(), "datasets": {ROWS.name: rows}}


def svg(spec: Spec) -> str:
    """Draw as SVG."""
    return str(vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE))


def png(svg: str) -> bytes:
    """The same drawing on white, at twice the size, for slides and papers."""
    paper = re.sub(r"<svg[^>]*>", r'\g<0><rect width="100%" height="100%" fill="white"/>', svg, count=1)
    return bytes(vl_convert.svg_to_png(paper, scale=2))

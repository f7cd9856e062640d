"""House style of drawings: colours, marks, one ink; drawn offline, the same numbers give the same bytes.

What a mark means is told by shape (or dash) as well as by colour, so that a grey print and a colour-blind reader lose
nothing. Colours follow Okabe & Ito 2008, "Color universal design"; in the dark the page swaps them, by their
hexadecimal value, for lighter ones (`NIGHT`).
"""

from __future__ import annotations

import re
from typing import Any

import altair as alt
import vl_convert

INK, GRID = "#222222", "#dddddd"
BLUE, ORANGE, GREEN, GREY, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#6b6b6b", "#aa4499", "#3399cc"
NIGHT = {INK: "#d8d8d8", GRID: "#3a3a3a", BLUE: "#56b4e9", ORANGE: "#ff9a55", GREEN: "#2fd0a0"}
NIGHT |= {GREY: "#a8a8a8", PURPLE: "#e08ad0", SKY: "#9bd4ff"}
LINES = (BLUE, ORANGE, GREEN, PURPLE, GREY, SKY)
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 1], [10, 4])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
NARROWEST = 300  # px; below, there is no room for a scale
VEGA_LITE = "6.1"
ROWS = alt.NamedData("rows")  # put in at the end: altair copies and validates what it holds, for seconds

Spec = dict[str, Any]


def columns(width: int) -> int:
    """Of a legend."""
    return 2 if width > 300 else 1


def cycle(values: tuple[Any, ...], names: list[str]) -> list[Any]:
    """One value a name; after a round all but the colours go on shifted, so that no two lines are wholly alike."""
    shift = values is not LINES
    return [values[(i + shift * (i // len(values))) % len(values)] for i in range(len(names))]


def scale(channel: Any, field: str, domain: list[str], values: list[Any]) -> Any:
    """One channel of a merged legend. The title is empty and the same, or Vega-Lite draws two legends."""
    return channel(field, title=None, scale=alt.Scale(domain=domain, range=values), sort=None)


def finish(chart: Any, rows: list[dict[str, Any]], columns: int = 2) -> Spec:
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
    styled = styled.configure_header(labelColor=INK, labelFont=FONT)
    # Vega reads it a moment later and complains too: to validate here took a tenth of a large report.
    return {**styled.configure_view(stroke=None).to_dict(validate=False), "datasets": {ROWS.name: rows}}


def svg(spec: Spec) -> str:
    """Draw as SVG. Vega counts gradients over all drawings of a process; here each drawing begins anew.

    A link to a place on the page stays one: vl-convert takes it for a file of Vega's examples.
    """
    text = str(vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE))
    text = text.replace('xlink:href="https://vega.github.io/vega-datasets/#', 'xlink:href="#')
    found = list(dict.fromkeys(re.findall(r"gradient_\d+", text)))
    return re.sub(r"gradient_\d+", lambda one: f"gradient-{found.index(one[0])}", text)


def png(svg: str) -> bytes:
    """The same drawing on white, at twice the size, for slides and papers."""
    paper = re.sub(r"<svg[^>]*>", r'\g<0><rect width="100%" height="100%" fill="white"/>', svg, count=1)
    return bytes(vl_convert.svg_to_png(paper, scale=2))

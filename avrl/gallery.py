"""Pictures with frames in them: a map whose dots show theirs, flow of truth and probe, predictions of the last look.

The page runs no script, so a dot is a link to its frame, and CSS shows that frame while the dot is pointed at or has
the focus. All pictures are data in the page: none is fetched.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
import polars as pl
from markupsafe import Markup

from avrl.answers import headline
from avrl.artifact import LOOKS
from avrl.drawing import GREY, INK, LINES, NARROWEST, ROWS, SHAPES, Spec, columns, cycle, finish, scale
from avrl.errors import IntegrityError
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from avrl.artifact import Artifact
    from avrl.comparison import Protocol

# Shapes that are told apart in black and white, one a task.
MARKS = (*SHAPES, "triangle-left", "triangle-right", "arrow", "wedge", "M-1,-1L1,1M1,-1L-1,1", "M0,-1V1")
REST = "other tasks"
FRAME = "frame t"
MOST_DOTS = 200  # a map
TRUTH = "truth"
COLUMNS = 6  # of flow figures: truth and encoders
PLACES = 7  # arrows a side: those of two by two places of the grid are one
LOOKS_SHOWN = 8
QUALITY = 70


@dataclass(frozen=True)
class Frame:
    """One frame on the page: the id that a dot leads to, what it shows, and the picture as a data address."""

    id: str
    task: str
    source: str


def frames(points: Mapping[str, pl.DataFrame], slug: str) -> list[Frame]:
    """The frames of a map's dots, each once however many encoders there are; none where no pictures were kept."""
    known = [one for one in points.values() if "picture" in one.columns]
    if not known:
        return []
    kept = pl.concat([one.select("episode_index", "frame_index", "task", "picture") for one in known])
    kept = kept.filter(pl.col("picture").is_not_null())
    kept = kept.unique(["episode_index", "frame_index"], keep="first", maintain_order=True)
    return [
        Frame(place(slug, row["episode_index"], row["frame_index"]), row["task"], _data(row["picture"], "jpeg"))
        for row in kept.iter_rows(named=True)
    ]


def place(slug: str, episode_index: int, frame_index: int) -> str:
    """The id of a frame on the page."""
    return f"at-{slug}-{episode_index}-{frame_index}"


def pointing(shown: Sequence[Frame]) -> Markup:
    """CSS that shows a frame while its dot is pointed at or has the focus."""
    rule = 'figure:has([*|href="#{0}"]:hover) #{0}, figure:has([*|href="#{0}"]:focus) #{0} {{ display: flex; }}'
    return Markup("\n").join(Markup(rule).format(one.id) for one in shown)


def flows(protocol: Protocol, scores: Iterable[Artifact]) -> list[dict[str, Any]]:
    """Arrows of some test pairs, a row an arrow: truth first, then the rows that speak for their encoders.

    Keys: ``example``, ``label``, ``x`` and ``y`` (of 0..1, to the right and down), ``length`` (px) and ``angle``
    (degrees, clockwise from up); one row an example has its ``picture`` instead. Empty if no artifact kept examples.

    Raises:
        IntegrityError: a file of examples cannot be read.
    """
    heads = protocol.scores.join(headline(protocol), on="label", how="semi", maintain_order="left")
    heads = heads.filter(pl.col("init").is_in(["trained", "pretrained", "random"])).unique(
        "scores", maintain_order=True
    )
    rank = {"trained": 0, "pretrained": 1, "random": 2}
    chosen = sorted(heads.select("scores", "name", "init").iter_rows(), key=lambda row: rank[row[2]])
    roots = {one.ref: one.root for one in scores}
    found: list[dict[str, Any]] = []
    for ref, label, init in chosen[: COLUMNS - 1]:
        path = roots[ref] / "examples.parquet"
        if not path.exists():
            continue
        try:
            rows = pl.read_parquet(path).to_dicts()
        except (OSError, pl.exceptions.PolarsError) as error:
            raise IntegrityError(f"{path}: {error}", f"rm -r {roots[ref]} and probe again") from error
        if not found:
            found += [{"example": n, "picture": _data(row["picture"], "jpeg")} for n, row in enumerate(rows)]
            found += [arrow for n, row in enumerate(rows) for arrow in _arrows(n, TRUTH, row["truth"])]
        named = label + say(" (untrained)") * (init == "random")
        found += [arrow for n, row in enumerate(rows) for arrow in _arrows(n, named, row["predicted"])]
    return found


def _arrows(example: int, label: str, flow: list[float]) -> list[dict[str, Any]]:
    """`PLACES` x `PLACES` arrows of a (G, G, 2) flow to the right and down, given flat."""
    side = math.isqrt(len(flow) // 2)
    flow_GG2 = np.asarray(flow, np.float64).reshape(side, side, 2)
    step = side // PLACES
    mean = flow_GG2[: step * PLACES, : step * PLACES].reshape(PLACES, step, PLACES, step, 2).mean((1, 3))
    return [
        {
            **{"example": example, "label": label, "x": (i + 0.5) / PLACES, "y": (j + 0.5) / PLACES},
            "length": round(float(np.hypot(*mean[j, i])), 2),
            "angle": round(math.degrees(math.atan2(mean[j, i, 0], -mean[j, i, 1])) % 360),
        }
        for j in range(PLACES)
        for i in range(PLACES)
    ]


def looks(checkpoints: Iterable[Artifact]) -> list[tuple[str, int, str]]:
    """The last look of some checkpoints: name, step, and its sheet as a data address."""
    from PIL import Image

    found: list[tuple[str, int, str]] = []
    for one in checkpoints:
        sheets = sorted((one.root / LOOKS).glob("step-*.png"))
        if not sheets or len(found) == LOOKS_SHOWN:
            continue
        content = io.BytesIO()
        try:
            Image.open(sheets[-1]).convert("RGB").save(content, "WEBP", quality=QUALITY)
        except OSError as error:
            raise IntegrityError(f"{sheets[-1]}: {error}", f"rm {sheets[-1]}") from error
        found.append((one.ref, int(Path(sheets[-1]).stem.removeprefix("step-")), _data(content.getvalue(), "webp")))
    return found


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def draw_maps(points: Mapping[str, pl.DataFrame], slug: str, width: int = 640) -> Spec:
    """Maps of vectors, one an encoder, a point a vector, colour and shape by task; rarer tasks share a grey dot.

    A dot whose frame was kept is a link to it (`avrl.gallery.place`); where frames were kept there are no other dots.
    """
    shown = pl.concat([one.with_columns(label=pl.lit(label)) for label, one in points.items()], how="diagonal")
    counts = shown["task"].value_counts().sort("count", "task", descending=[True, False])
    names = sorted(counts["task"][: len(MARKS)])
    linked = "picture" in shown.columns
    if linked:
        # Scores of before pictures were kept show the same vectors, with the frames that others kept of them.
        kept = shown.filter(pl.col("picture").is_not_null()).select("episode_index", "frame_index").unique()
        some = [shown.join(kept, on=["episode_index", "frame_index"], how="semi", maintain_order="left")]
    else:
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
            color=scale(alt.Color, "task:N", names + rest, cycle(LINES, names) + [GREY] * len(rest)),
            shape=scale(alt.Shape, "task:N", names + rest, list(MARKS[: len(names)]) + ["stroke"] * len(rest)),
            **({"href": "href:N", "description": "task:N"} if linked else {}),
        )
        .properties(width=(width - 20 * across) // across, height=150)
        .facet(facet=alt.Facet("label:N", title=None, sort=list(points)), columns=across)
        .resolve_scale(x="independent", y="independent")
    )
    data = rows.select("label", "task", pl.col("x", "y").round(2)).to_dicts()
    if linked:
        keys = rows.select("episode_index", "frame_index").iter_rows()
        data = [{**one, "href": f"#{place(slug, *key)}"} for one, key in zip(data, keys, strict=True)]
    return finish(chart, data, columns=columns(width))


def draw_flows(rows: Sequence[Mapping[str, Any]], width: int = 640) -> Spec:
    """Flow of some test pairs: frame, truth, probes; wedges point where a place moves to, as long as it moves far.

    Args:
        rows: From `avrl.gallery.flows`.
        width: Of the whole; a narrow one shows fewer encoders.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows if "label" in row))[: 2 if width < NARROWEST else None]
    side = min(130, width // (len(labels) + 1))
    # One place that moves far would leave nothing of the others: a row's scale is what nine in ten places keep to.
    lengths = pl.DataFrame([row for row in rows if row.get("label") == TRUTH])
    scales = dict(lengths.group_by("example").agg(pl.col("length").quantile(0.9)).iter_rows())
    data = [{**row, "label": FRAME, "x": 0.5, "y": 0.5} if "picture" in row else dict(row) for row in rows]
    for row in data:
        # A symbol's size is its area: that of a wedge as long as a place is wide, for what moves furthest.
        row["size"] = (min(1.0, row.get("length", 0.0) / (scales[row["example"]] or 1.0)) * side / PLACES) ** 2
    data = [row for row in data if row["label"] in (FRAME, *labels)]
    axes = {
        "x": alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, 1])),
        "y": alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[1, 0])),
    }
    frame = alt.Chart().transform_filter("isValid(datum.picture)").mark_image(width=side, height=side)
    wedges = (
        alt.Chart().transform_filter("datum.length > 0.1").mark_point(shape="wedge", filled=True, opacity=1, color=INK)
    )
    layers = alt.layer(
        frame.encode(**axes, url="picture:N"),
        wedges.encode(
            **axes,
            angle=alt.Angle("angle:Q", scale=alt.Scale(domain=[0, 360], range=[0, 360])),
            size=alt.Size("size:Q", scale=None, legend=None),
        ),
        data=ROWS,
    ).properties(width=side, height=side)
    chart = layers.facet(
        row=alt.Row("example:O", title=None, header=alt.Header(labels=False)),
        column=alt.Column(
            "label:N", title=None, sort=[FRAME, *labels], header=alt.Header(labelFontSize=10, labelLimit=side)
        ),
        spacing=4,
    )
    return finish(chart, data)

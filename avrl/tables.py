"""Tables of scores and of training: numbers at full precision (CSV) beside the strings that people read.

A cell that has no number says why: "not measured" (nobody ran it) or "undefined" (the target does not move).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from avrl.artifact import LOOKS
from avrl.comparison import EVERY, ROW, UNSEEN, WHOLE, ranks
from avrl.errors import IntegrityError
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from avrl.artifact import Artifact
    from avrl.comparison import Protocol

TRAINED = {"10%": "10% of train", "1%": "1% of train", **{name: name for name in ("seen tasks", "unseen tasks")}}
TRAINED["seen tasks minus unseen tasks"] = "cost of a new task"
ASIDE = ("nmse", "bin-accuracy")  # of every group and dimension, in the table by dimension and in scores.csv
NOT_MEASURED, UNDEFINED = "not measured", "undefined"
LABEL = "encoder · readout"


@dataclass(frozen=True)
class Table:
    """One table: its file name, what it shows, its numbers and the same as strings in reading order.

    Attributes:
        refs: Of each row of the view, the artifact that its numbers are from.
        prose: Its cells are sentences, which may be broken over lines.
    """

    name: str
    title: str
    caption: str
    numbers: pl.DataFrame
    view: pl.DataFrame
    refs: Sequence[str] = ()
    prose: bool = False


class Column(NamedTuple):
    """A column of scores: which numbers it holds."""

    group: str
    metric: str
    split: str
    dimension: str

    @property
    def title(self) -> str:
        """As the header says it."""
        what = say(self.group if self.dimension in ("mean", "all", self.group) else self.dimension)
        where = {WHOLE: "", EVERY: "", UNSEEN: ", " + say("unseen tasks")}.get(self.split, f", {self.split}")
        return f"{what} {self.metric_title}{where}"

    @property
    def metric_title(self) -> str:
        """As people write it."""
        return {"r2": "R²", "auc": "AUC", "epe": "EPE, px"}.get(self.metric, say(self.metric.replace("-", " ")))

    @property
    def name(self) -> str:
        """As the CSV says it."""
        return "_".join([self.group, self.dimension, self.metric, self.split]).replace("-", "_")


def columns(scores: pl.DataFrame) -> list[Column]:
    """The headline columns these scores can fill: the mean of each group; the first group on unseen tasks too."""
    found = scores.filter(pl.col("split").is_in([WHOLE, EVERY, UNSEEN]))
    found = found.select(Column._fields).unique(maintain_order=True)
    every = [Column(**row) for row in found.iter_rows(named=True) if row["metric"] not in ASIDE]
    pooled = tuple(dict.fromkeys(one.group for one in every if one.dimension == "mean"))
    heads = [one for one in every if one.dimension == "mean" or one.group not in pooled]
    heads = [one for one in heads if one.split != UNSEEN or one.group in (*pooled[:1], "order")]
    # R2 of a binary gripper says little where there is AUC or accuracy; it stays in the table by dimension.
    binary = {one.group for one in heads if one.metric in ("auc", "accuracy")}
    heads = [one for one in heads if one.metric != "r2" or one.group not in binary]
    rank = ranks((*pooled, "gripper"))
    return sorted(heads, key=lambda one: (rank.get(one.group, len(rank)), one.metric != "auc", one))


def wide(scores: pl.DataFrame, chosen: list[Column]) -> pl.DataFrame:
    """One row an encoder and readout; of each column the value, low, high and whether it was measured."""
    base = scores.select(*ROW, "name", "kind", "label", "dims").unique(ROW, keep="first", maintain_order=True)
    kinds = dict.fromkeys(Column._fields, pl.String)
    places = pl.DataFrame(chosen, schema=kinds, orient="row").with_row_index("place")
    found = scores.with_columns(measured=True).join(places, on=Column._fields, maintain_order="left")
    # One pivot: a join a column took most of the time of a report of thousands of scores.
    ends = ("value", "low", "high", "measured")
    found = found.pivot("place", index=ROW, values=ends, aggregate_function="first", maintain_order=True)
    cells = [
        (pl.col(f"{end}_{i}") if f"{end}_{i}" in found.columns else pl.lit(None, pl.Float64)).alias(
            one.name if end == "value" else f"{one.name}_{end}"
        )
        for i, one in enumerate(chosen)
        for end in ends
    ]
    return base.join(found.select(*ROW, *cells), on=ROW, how="left", maintain_order="left")


def main(protocol: Protocol) -> Table:
    """Encoders x readouts against target groups: ours beside their untrained twins, outside ones, floors."""
    chosen = columns(protocol.scores)
    frame = wide(protocol.scores, chosen)
    what = say("R² on held-out episodes") if "r2" in protocol.scores["metric"] else say("What was measured")
    return Table(
        f"main-{protocol.slug}",
        say("Scores"),
        say(
            "{what}, [95% interval over episodes]; a group is the unweighted mean of its dimensions. An untrained twin "
            "is the same network, random weights; floors use no learned encoder.",
            what=what,
        ),
        _without_marks(frame),
        _view(frame, {one: one.title for one in chosen}),
        frame["scores"].to_list(),
    )


def dimensions(protocol: Protocol) -> Table:
    """Every target dimension by itself: a pooled number hides which of them an encoder knows."""
    found = protocol.scores.filter(~pl.col("dimension").is_in(["mean", "all"]), split=WHOLE)
    keys = found.select(Column._fields).unique(maintain_order=True).iter_rows(named=True)
    rank = ranks(tuple(found["dimension"].unique(maintain_order=True)))  # the order of the target
    chosen = sorted((Column(**key) for key in keys), key=lambda one: (rank[one.dimension], one))
    frame = wide(protocol.scores, chosen)
    return Table(
        f"dimensions-{protocol.slug}",
        say("By target dimension"),
        say("The same rows, a column for each dimension of the target."),
        _without_marks(frame),
        _view(frame, {one: f"{one.dimension} {one.metric_title}" for one in chosen}),
        frame["scores"].to_list(),
    )


def training_sets(protocol: Protocol) -> Table | None:
    """Headline R2 after less training, and on tasks that training knows or does not; None if none was scored so."""
    found = protocol.others.filter(group=protocol.group, dimension="mean", metric="r2", split=WHOLE)
    frame = protocol.scores.select(*ROW, "kind", "label", "dims").unique(ROW, keep="first", maintain_order=True)
    chosen = [name for name in TRAINED if name in found["train"]]
    if not chosen:
        return None
    view = frame.select(pl.col("label").alias(LABEL), "kind")
    for name in chosen:
        part = found.filter(train=name).unique(ROW, keep="first", maintain_order=True)
        part = part.select(*ROW, *(pl.col(end).alias(f"{name} {end}") for end in ("value", "low", "high")))
        frame = frame.join(part, on=ROW, how="left", maintain_order="left")
        ends = (frame[f"{name} {end}"] for end in ("value", "low", "high"))
        texts = [cell(value, low, high, False, sign="minus" in name) for value, low, high in zip(*ends, strict=True)]
        view = view.with_columns(pl.Series(TRAINED[name], texts, pl.String))
    return Table(
        f"training-sets-{protocol.slug}",
        say("New tasks and few examples"),
        say(
            "{group} R². With a share of the training episodes only; and for tasks that training lacks, beside the "
            "same test episodes after as many training pairs of all tasks: their difference is what a new task "
            "costs. Not measured where training pairs were fewer than twice the features.",
            group=say(protocol.group).capitalize(),
        ),
        frame.drop("label"),
        view,
        frame["scores"].to_list(),
    )


def training(checkpoints: Iterable[Artifact]) -> Table:
    """What pretraining cost and where it ended, a row a checkpoint.

    Raises:
        IntegrityError: a log cannot be read.
    """
    rows = []
    for one in checkpoints:
        facts, last = one.manifest.facts, log(one).tail(1).to_dicts()
        end = last[0] if last else {}
        rows.append(
            {
                "checkpoint": one.ref,
                "objective": facts.get("objective") or one.manifest.config.get("objective"),
                "size": facts.get("size"),
                "parameters": facts.get("parameters"),
                "steps": facts.get("steps", end.get("step")),
                "samples": facts.get("samples", end.get("samples")),
                "final loss": end.get("loss"),
                "final skill": end.get("skill"),
                "baseline": facts.get("baseline") or _config(one).get("baseline"),
                "seconds": one.manifest.seconds,
                "device": facts.get("device") or one.manifest.runtime.get("device"),
            }
        )
    kinds: dict[str, Any] = dict.fromkeys(["checkpoint", "objective", "size", "baseline", "device"], pl.String)
    kinds |= dict.fromkeys(["parameters", "steps", "samples"], pl.Int64)
    kinds |= dict.fromkeys(["final loss", "final skill", "seconds"], pl.Float64)
    order = list(rows[0]) if rows else list(kinds)
    frame = pl.DataFrame(rows, schema={name: kinds[name] for name in order}, strict=False)
    forms = {"final loss": "{:.4f}", "final skill": "{:.3f}", "seconds": "{:,.0f}"}
    forms |= dict.fromkeys(["parameters", "steps", "samples"], "{:,}")
    view = frame.with_columns(
        pl.Series(name, [say(NOT_MEASURED) if v is None else forms.get(name, "{}").format(v) for v in frame[name]])
        for name in order
    )
    caption = say(
        "Skill = 1 - error / error of the named baseline: 0 is no better than the baseline, 1 is perfect. "
        "Losses of different objectives are in different units; skills are comparable for the same baseline "
        "only."
    )
    return Table("training", say("Training"), caption, frame, view, frame["checkpoint"].to_list())


def log(checkpoint: Artifact) -> pl.DataFrame:
    """The training log of a checkpoint; if it was looked at, with what looks found, null between them.

    Raises:
        IntegrityError: it cannot be read.
    """
    path, found = checkpoint.root / "log.parquet", checkpoint.root / LOOKS / "held-out.parquet"
    try:
        rows = pl.read_parquet(path)
        return (
            rows.join(pl.read_parquet(found), on="step", how="left", maintain_order="left") if found.exists() else rows
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        raise IntegrityError(f"{path}: {error}", f"rm -r {checkpoint.root} and pretrain again") from error


def _config(checkpoint: Artifact) -> dict[str, Any]:
    path = checkpoint.root / "config.json"
    found = json.loads(path.read_bytes()) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _view(frame: pl.DataFrame, titles: dict[Column, str]) -> pl.DataFrame:
    """What people read: which row it is, its numbers, and last how many features it took."""
    cells = (pl.Series(title, _cells(frame, one), pl.String) for one, title in titles.items())
    dims = pl.col("dims").cast(pl.String).fill_null("")
    return frame.select(pl.col("label").alias(LABEL), "kind", *cells, dims)


def _without_marks(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.drop(name for name in frame.columns if name.endswith("_measured")).drop("label", "name")


def _cells(frame: pl.DataFrame, one: Column) -> list[str]:
    parts = [frame[f"{one.name}{end}"] for end in ("", "_low", "_high", "_measured")]
    return [cell(*row) for row in zip(*parts, strict=True)]


def cell(
    value: float | None, low: float | None, high: float | None, measured: bool | None, *, sign: bool = False
) -> str:
    """A number with its interval, or the reason why there is none."""
    if value is None:
        return say(UNDEFINED) if measured else say(NOT_MEASURED)
    form = "{:.1f}" if abs(value) >= 10 else "{:+.3f}" if sign else "{:.3f}"  # a rank, not a score
    if low is None or high is None:
        return form.format(value)
    return f"{form} [{form}, {form}]".format(value, low, high)

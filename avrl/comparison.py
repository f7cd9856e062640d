"""Scores side by side: which numbers may be compared at all, in which order, under which names.

Scores of different protocol fingerprints (data, split, samples, gap, target, solver) never share a table.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from avrl.encoders.pins import network
from avrl.errors import IntegrityError
from avrl.labels import TARGETS
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from avrl.artifact import Artifact

ID = ["encoder", "checkpoint", "init", "readout", "pairing"]
ROW = [*ID, "scores"]  # `scores` is the artifact's ref: every number knows the run that made it
KINDS = {"trained": "trained", "pretrained": "outside", "random": "untrained twin", "none": "floor"}
READOUTS = ("cls", "patch-mean", "grid", "m", "p", "pool")
FLOORS = ("mean", "state", "pixels-8", "pixels-16")
FLOOR = "pixels-16"
CEILING = "oracle"  # sees the state before and after
WHOLE, UNSEEN = "val", "val-unseen"
EVERY = "all"  # episodes, where nothing is fitted

ATTENTIVE = "attentive"  # a solver; the other one, the ridge, goes without saying
_TEXT = ["probe", *ID, "target", "group", "dimension", "split", "metric", "fingerprint", "note"]
_WHOLE_NUMBERS = ["dims", "gap", "n_train", "n_test", "episodes_train", "episodes_test"]
_SINCE_3 = {
    "train": "all",
    "solver": "ridge",
    "licence": "",
    "weights": "",
    "verdict": "",
}  # columns that scores of before lack, and what they mean
_NUMBERS = ["gap_s", "value", "low", "high", "alpha"]
SCORES: dict[str, Any] = {**dict.fromkeys(_TEXT, pl.String), **dict.fromkeys(_WHOLE_NUMBERS, pl.Int64)}
SCORES |= dict.fromkeys(_NUMBERS, pl.Float64) | dict.fromkeys(_SINCE_3, pl.String)
EPISODES: dict[str, Any] = dict.fromkeys([*ID, "target", "dimension", "fingerprint"], pl.String)
EPISODES |= {"gap": pl.Int64, "episode_index": pl.Int64, "seen": pl.Boolean}
EPISODES |= dict.fromkeys(["n", "sse", "sum_y", "sum_yy"], pl.Float64)


@dataclass(frozen=True)
class Protocol:
    """Scores that may stand side by side.

    Attributes:
        fingerprint: 12 hex digits, shared by all rows.
        slug: For file names, unique in the report.
        title: In words.
        apart: How it differs from the report's first protocol; empty for the first.
        scores: Tidy scores, ordered for reading, with a `label` for each row of a table; trained on all of train.
        others: The same of other training sets: a few episodes, or without some tasks.
        episodes: Sums of each test episode.
    """

    fingerprint: str
    slug: str
    title: str
    apart: str
    scores: pl.DataFrame
    others: pl.DataFrame
    episodes: pl.DataFrame

    @property
    def brief(self) -> str:
        """A few words, unique in the report."""
        return self.slug.replace("-", " ").replace("gap", "gap ")

    @property
    def probe(self) -> str:
        """What is predicted: ``bridge``, ``flow``, ..."""
        return str(self.scores["probe"][0])

    @property
    def target(self) -> str:
        """Which motion: ``reached``, ``commanded``, a teacher of flow, or nothing."""
        return str(self.scores["target"][0])

    @property
    def group(self) -> str:
        """The group of the target that the headline is about: the first that has a mean R2."""
        means = self.scores.filter(metric="r2", dimension="mean", split=WHOLE)["group"]
        return str(means[0]) if len(means) else "position"


def read(artifacts: Iterable[Artifact]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """All scores and all per-episode sums of some scores artifacts, each row with its artifact's ref.

    Raises:
        IntegrityError: a file cannot be read or lacks a column.
    """
    parts = [
        (
            _read(one.root / "scores.parquet", SCORES, one.ref),
            _read(one.root / "episodes.parquet", EPISODES, one.ref),
        )
        for one in sorted(artifacts, key=lambda one: one.ref)
    ]
    return pl.concat([scores for scores, _ in parts]), pl.concat([episodes for _, episodes in parts])


def _read(path: Path, schema: Mapping[str, Any], ref: str) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(path)
        absent = {name: pl.lit(value) for name, value in _SINCE_3.items() if name not in frame.columns}
        frame = frame.with_columns(**absent).select(pl.col(name).cast(kind) for name, kind in schema.items())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise IntegrityError(f"{path}: {error}", f"rm -r {path.parent} and probe again") from error
    texts = [name for name, kind in schema.items() if kind == pl.String]
    numbers = [name for name, kind in schema.items() if kind == pl.Float64]
    return frame.with_columns(pl.col(texts).fill_null(""), pl.col(numbers).fill_nan(None), scores=pl.lit(ref))


def comparable(scores: pl.DataFrame, episodes: pl.DataFrame) -> list[Protocol]:
    """Scores by protocol, the one with most encoders first; each says how it differs from the first."""
    scores = _once(scores)
    others, scores = scores.filter(pl.col("train") != "all"), _ordered(scores.filter(train="all"))
    parts = {str(key[0]): part for key, part in scores.partition_by("fingerprint", as_dict=True).items()}
    heads = {name: _head(part) for name, part in parts.items()}
    ranked = sorted(
        parts,
        key=lambda name: (
            heads[name]["target"] not in TARGETS,  # actions are what the report is about
            -parts[name].select(ROW).n_unique(),
            heads[name]["target"] != "reached",
            heads[name]["gap"],
            name,
        ),
    )
    attentive = {name for name, part in parts.items() if ATTENTIVE in part["solver"]}  # its floors are the ridge's
    ends = {name: f"-{ATTENTIVE}" * (name in attentive) for name in ranked}
    slugs = {name: _slug("{probe}-{target}-gap{gap}".format(**heads[name]) + ends[name]) for name in ranked}
    shared = Counter(slugs.values())
    return [
        Protocol(
            name,
            slugs[name] if shared[slugs[name]] == 1 else f"{slugs[name]}-{_slug(name)}",
            say("{title}, attentive probe", title=_title(heads[name])) if name in attentive else _title(heads[name]),
            "" if name == ranked[0] else _apart(heads[name], heads[ranked[0]]),
            _labelled(parts[name]),
            others.filter(fingerprint=name),
            episodes.filter(fingerprint=name),
        )
        for name in ranked
    ]


def _once(scores: pl.DataFrame) -> pl.DataFrame:
    """The same numbers of the same row under the same protocol, made twice, stand once: those of the first artifact."""
    same = scores.group_by("fingerprint", *ROW, maintain_order=True).agg(
        pl.concat_str("group", "dimension", "split", "metric", "train", "value", "low", "high", ignore_nulls=True)
        .sort()
        .str.join("\n")
        .alias("numbers")
    )
    first = same.unique(["fingerprint", *ID, "numbers"], keep="first", maintain_order=True)
    return scores.join(first, on=["fingerprint", *ROW], how="semi", maintain_order="left")


def mapped(protocol: Protocol, artifacts: Iterable[Artifact]) -> dict[str, pl.DataFrame]:
    """Label -> ``points.parquet`` (``task``, ``x``, ``y``), of those artifacts of a protocol that drew a map."""
    labels = protocol.scores.select("scores", "readout", "label").unique(maintain_order=True)
    files = {one.ref: one.root / "points.parquet" for one in artifacts}
    found = {}
    for ref, readout, label in labels.iter_rows():
        points = pl.read_parquet(files[ref]) if files[ref].exists() else None
        if points is not None and points["readout"][0] == readout:
            found[label] = points.filter(readout=readout)  # of the first readout alone: a page has room for one
    return found


def _title(head: dict[str, Any]) -> str:
    named = {"probe": head["probe"], "target": head["target"], "gap": head["gap"], "seconds": f"{head['gap_s']:.3g}"}
    if head["probe"] == "flow":
        return say("optical flow by {target} over {seconds} s (gap {gap})", **{**named, "probe": None})
    if head["target"]:
        return say("{probe}: {target} motion over {seconds} s (gap {gap})", **named)
    return say("{probe} over {seconds} s (gap {gap})", **named)


def _head(scores: pl.DataFrame) -> dict[str, Any]:
    """What all rows of a protocol have in common, with the counts of the whole test split."""
    whole = scores.filter(split=WHOLE)
    return (scores if whole.is_empty() else whole).row(0, named=True)


def _apart(head: dict[str, Any], first: dict[str, Any]) -> str:
    fields = ["probe", "target", "gap", "n_train", "episodes_train", "episodes_test"]
    apart = [name for name in fields if head[name] != first[name]]
    found = [say("{name} {here} (first: {first})", name=one, here=head[one] or "-", first=first[one]) for one in apart]
    return "; ".join(found) or say("other data, samples or solver, at the same gap and target")


def _ordered(scores: pl.DataFrame) -> pl.DataFrame:
    """Reading order: our encoders, each beside its untrained twin, then outside ones, then floors."""
    rank = ranks(tuple(KINDS))
    order = ["_family", "_floor", "_network", "_readout", "readout", "pairing", "_checkpoint", "_init", "encoder"]
    return (
        scores.with_columns(
            _init=pl.col("init").replace_strict(rank, default=len(rank), return_dtype=pl.Int64),
            _readout=pl.col("readout").replace_strict(ranks(READOUTS), default=99, return_dtype=pl.Int64),
            # A twin that names no checkpoint stands behind all that it may be the twin of.
            _checkpoint=pl.when(pl.col("checkpoint") == "").then(pl.lit("~")).otherwise("checkpoint"),
            # One twin stands for an encoder with the published weights and for it with others.
            _network=pl.col("encoder").map_elements(network, pl.String),
            _floor=pl.col("encoder").replace_strict(ranks(FLOORS), default=99, return_dtype=pl.Int64),
        )
        .with_columns(_family=pl.col("_init").min().over("_network"))
        .sort(*order, "scores", maintain_order=True)  # stable, or two reports differ in bytes
        .drop("_family", "_floor", "_network", "_readout", "_checkpoint", "_init")
    )


def ranks(names: tuple[str, ...]) -> dict[str, int]:
    """Position of each name, for sorting."""
    return {name: order for order, name in enumerate(names)}


def _labelled(scores: pl.DataFrame) -> pl.DataFrame:
    """Name each row so that no two share a label: by checkpoint or by scores artifact only where need be."""
    floor = pl.col("init") == "none"
    several = pl.col("checkpoint").n_unique().over("encoder", "init", "readout", "pairing") > 1
    again = pl.col("scores").n_unique().over(ID) > 1
    said = pl.col("pairing").is_in(["concat", "diff", "antisymmetric"])
    pairing = pl.when(said).then(", " + pl.col("pairing")).otherwise(pl.lit(""))
    name = pl.concat_str(
        pl.col("encoder"),
        pl.when(several & (pl.col("checkpoint") != ""))
        .then("@" + pl.col("checkpoint").str.tail(6))
        .otherwise(pl.lit("")),
        pl.when(again).then("#" + pl.col("scores").str.tail(6)).otherwise(pl.lit("")),
    )
    kind = pl.when(pl.col("encoder") == CEILING).then(pl.lit("ceiling")).otherwise(pl.col("init").replace(KINDS))
    return scores.with_columns(name=name, kind=kind).with_columns(
        label=pl.when(floor).then(pl.col("name")).otherwise(pl.format("{} · {}{}", "name", "readout", pairing))
        + pl.when(pl.col("init") == "random").then(pl.lit(" (untrained)")).otherwise(pl.lit(""))
    )


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()

"""Cells: the one number of all scores that some words pick, as a person reads them off a table.

Every word must occur in what names the number. Of those that fit, the headline numbers of the whole test split come
first, then those that say most of the words in row and column; of two under one protocol the one that says nothing
more: ``two-stream cls`` means the trained one.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import polars as pl

from avrl.comparison import EVERY, KINDS, ROW, SCORES, WHOLE, comparable, read
from avrl.errors import NotFoundError
from avrl.tables import TRAINED, Column, cell, columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from avrl.artifact import Artifact
    from avrl.comparison import Protocol

SHOWN = 12  # candidates, at most
ALL = "all"  # training episodes


@dataclass(frozen=True)
class Cell:
    """A number and where it stands.

    Attributes:
        protocol: Title of what was held fixed.
        headline: Whether it stands in the main table, for the whole test split.
        row: Its tidy row of scores, with the row's label and kind.
    """

    protocol: str
    headline: bool
    row: dict[str, Any]

    @property
    def column(self) -> str:
        """Title of its column, with the group of a dimension and the training set where it is not all."""
        title = Column(**{name: self.row[name] for name in Column._fields}).title
        group = "" if words(self.row["group"]) <= words(title) else f"{self.row['group']} "
        train = self.row["train"]
        return group + title + ("" if train == ALL else f", {TRAINED.get(train, train)}")

    @cached_property
    def title(self) -> str:
        """Row and column, as a table shows them."""
        return f"{self.row['label']}, {self.column}"

    @property
    def text(self) -> str:
        """The number with its interval."""
        return cell(self.row["value"], self.row["low"], self.row["high"], True)

    @cached_property
    def names(self) -> set[str]:
        """Every word by which it can be picked."""
        fields = [self.row[name] for name in ("split", "dimension", "metric", "init", "fingerprint", "train")]
        key = self.row["scores"].rsplit("-", 1)[-1]
        return words(" ".join([self.title, self.protocol, KINDS.get(self.row["init"], ""), key, *fields]))


def words(text: str) -> set[str]:
    """The words and numbers of a text, whatever their case: ``R²`` is ``r2``, ``two-stream`` is two."""
    return set(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def cells(scores: Sequence[Artifact]) -> list[Cell]:
    """Every number that may stand in a table, in the report's order.

    Raises:
        IntegrityError: an artifact's table cannot be read.
    """
    every, episodes = read(scores)
    protocols = comparable(every.filter(pl.col("fingerprint") != ""), episodes)
    return [one for protocol in protocols for one in _cells(protocol)]


def _cells(protocol: Protocol) -> list[Cell]:
    labels = protocol.scores.select(*ROW, "label", "kind").unique(ROW, keep="first", maintain_order=True)
    others = protocol.others.join(labels, on=ROW, how="left", maintain_order="left")
    frame = pl.concat([protocol.scores.select(others.columns), others])
    frame = frame.with_columns(pl.col("label").fill_null(pl.col("encoder")))
    frame = frame.unique([*ROW, *Column._fields, "train"], keep="first", maintain_order=True)
    heads = {one for one in columns(protocol.scores) if one.split in (WHOLE, EVERY)}
    return [
        Cell(
            protocol.title, row["train"] == ALL and Column(**{name: row[name] for name in Column._fields}) in heads, row
        )
        for row in frame.iter_rows(named=True)
    ]


def fitting(found: Sequence[Cell], text: str) -> list[Cell]:
    """The cells that some words mean: exactly one if they are enough.

    Raises:
        NotFoundError: none has all the words.
    """
    asked = words(text)
    fits = [one for one in found if asked <= one.names]
    if not fits or not asked:
        unknown = sorted(asked.difference(*(one.names for one in found)))
        cause = f"no number has the word {unknown[0]!r}" if unknown else f"no number has all the words of {text!r}"
        raise NotFoundError(cause, "take row and column from a table, as in: --why 'two-stream cls position R2'")
    best = [one for one in fits if one.headline] or fits
    said_by = [len(asked & words(one.title)) for one in best]  # "mean" is a floor, and a dimension of every row
    best = [one for one, count in zip(best, said_by, strict=True) if count == max(said_by)]
    said = [(one.row["fingerprint"], words(one.title)) for one in best]
    shorter = [any(other[0] == own[0] and other[1] < own[1] for other in said) for own in said]
    return [one for one, more in zip(best, shorter, strict=True) if not more]


def facts(one: Cell) -> dict[str, str]:
    """What stands behind a number, by name, in words."""
    row = one.row
    kind = {"none": "no encoder", "pretrained": "published weights", "random": "untrained"}.get(
        row["init"], row["init"]
    )
    where = ", ".join(f"{name} {row[name]}" for name in Column._fields)
    found = {
        "row": f"{row['label']} ({row['kind'] or kind}), {_count(row['dims'], 'feature')} from {row['readout']}",
        "column": f"{one.column} ({where})",
        "protocol": f"{one.protocol}, fingerprint {row['fingerprint']}",
        "trained on": f"{_counts(row, 'train')}" + ("" if row["train"] == ALL else f" ({row['train']})"),
        "tested on": _counts(row, "test"),
        "target": row["target"],
        "gap": f"{_count(row['gap'], 'frame')} = {row['gap_s']:.3g} s" if row["gap_s"] is not None else "",
        "solver": row["solver"] + (f", alpha {row['alpha']:.3g}" if row["alpha"] is not None else ""),
        "verdict": row["verdict"],
        "licence": row["licence"],
        "note": row["note"],
    }
    return {name: text for name, text in found.items() if text}


def _counts(row: dict[str, Any], which: str) -> str:
    return f"{_count(row[f'n_{which}'], 'sample')} of {_count(row[f'episodes_{which}'], 'episode')}"


def _count(number: int | None, what: str) -> str:
    return f"an unknown number of {what}s" if number is None else f"{number:,} {what}{'s' * (number != 1)}"


def document(one: Cell) -> dict[str, Any]:
    """A number for a program."""
    tidy = {name: one.row[name] for name in SCORES}
    return {"title": one.title, "protocol": one.protocol, "scores": one.row["scores"], **tidy}

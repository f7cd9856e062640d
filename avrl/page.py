"""The page: one HTML file that needs nothing else, the answer first.

It makes no request and runs no script (its own content policy forbids both), and every string from outside
goes through the template's autoescaping. Nothing depends on the clock: same scores, same bytes.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import polars as pl
from markupsafe import Markup, escape

from avrl import drawing
from avrl.comparison import UNSEEN, WHOLE
from avrl.effects import FAIL, NOT_COMPARABLE, PASS
from avrl.gallery import pointing
from avrl.leaders import BEST, BETTER, TIED, WORSE
from avrl.lineage import properties
from avrl.tables import NOT_MEASURED, UNDEFINED
from avrl.verdicts import ABOVE, BELOW, UNDECIDED
from avrl.words import say, spoken

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from avrl.artifact import Artifact
    from avrl.comparison import Protocol
    from avrl.gallery import Frame
    from avrl.tables import Table

TEMPLATE = Path(__file__).with_name("page.html.j2")
WIDE, NARROW = 640, 140  # px of the forest plot itself; its labels come on top
NARROW_CURVES = 260
SHAPES = {ABOVE: "▲", BELOW: "▼", UNDECIDED: "○", BETTER: "▲", WORSE: "▼", PASS: "▲", FAIL: "▼", BEST: "★", TIED: "≈"}


@functools.cache
def _marks(language: str) -> dict[str, Markup]:
    """Words that stand at an end of a cell, in the language spoken, and how they are shown: never by colour alone."""
    shown = Markup('<span class="{}">{} {}</span>')
    return {say(name): shown.format(name, shape, say(name)) for name, shape in SHAPES.items()}


def glossary() -> dict[str, str]:
    """What words on the page mean."""
    return {
        "R²": say(
            "Share of the target's variance that a linear readout explains on held-out episodes; 1 is perfect, 0 is "
            "the mean, below 0 is worse than the mean."
        ),
        "AUC": say("Chance that an opening gripper is ranked above a closing one; 0.5 is a coin."),
        "[low, high]": say("95% percentile interval, bootstrap over test episodes."),
        "position": say("Unweighted mean over x, y, z; rotation, wrist, fingertips likewise."),
        "gap": say("Frames between the two pictures of a pair; seconds = gap / frame rate."),
        "readout": say("Which vector of the encoder is used: cls, patch-mean, grid (3x3 pooled), m or p (a stream)."),
        "pairing": say(
            "pair: the encoder f sees both frames; antisymmetric: f(t, t+gap) - f(t+gap, t), which leaves out what did "
            "not move; concat, diff: one frame at a time, then joined or subtracted."
        ),
        say("untrained twin"): say(
            "The same network with random weights: what the architecture gives without learning."
        ),
        say("outside"): say("An encoder with published weights, not trained here."),
        say("floor"): say("A predictor without an encoder: mean, robot state, pixel difference at 8x8 or 16x16."),
        say("ceiling"): say("oracle: a probe that is given the state before and after, the motion itself."),
        say("unseen tasks"): say("Test episodes of tasks that no training episode of the probe shows."),
        "order": say("Which of two frames came first, each pair shown both ways round; controls should be at 0.5."),
        "knn accuracy": say(
            "Share of vectors whose nearest ones, by cosine, in other episodes are mostly of the same task."
        ),
        "nmi, ari": say(
            "Agreement of k-means with the tasks, 1 is the same; silhouette: -1..1, above 0 tasks lie apart."
        ),
        "identity, motion": say("Task told from one frame, or from the change alone, on held-out episodes."),
        "target": say(
            "reached: state after the gap minus state before; commanded: the action sent. A hand's motion is along the "
            "axes of the first frame's camera, in m: the camera's own motion is not in it."
        ),
        f"{say(ABOVE)}, {say(BELOW)}": say("The paired interval excludes zero; undecided: it does not."),
        say(NOT_MEASURED): say("Nobody ran it; undefined: it was run, but the target does not move."),
        say("effective rank"): say("Exponential of the entropy of the features' singular values; near 1: collapsed."),
        "skill": say("1 - error / error of a named baseline (copy: predict that nothing changes)."),
        "fingerprint": say("Digest of data, split, samples, gap, target and solver; equal for all rows of a table."),
    }


@dataclass(frozen=True)
class Picture:
    """One figure as SVG, for a wide and for a narrow window."""

    wide: Markup
    narrow: Markup


@dataclass(frozen=True)
class Section:
    """What the page says of one protocol."""

    protocol: Protocol
    answer: Sequence[str]
    forest: Picture | None
    tables: Sequence[Table]
    facts: Mapping[str, str]
    notes: Sequence[str]
    maps: Picture | None = None
    frames: Sequence[Frame] = ()
    figures: Mapping[str, Picture] = field(default_factory=dict)


@dataclass(frozen=True)
class Head:
    """What the page says before any protocol.

    Attributes:
        winners: Who wins on what.
        hypotheses: Of the plan, with verdicts.
        encoders: What each cost.
        seeds: How far numbers spread over seeds, where a run was done again.
        warnings: Of budgets that are not alike.
        left_out: What is not on the page, in words.
        looks: The last look of each checkpoint: its name, the step, the sheet.
    """

    winners: Table
    hypotheses: Table
    encoders: Table
    seeds: Table | None
    warnings: Sequence[str]
    left_out: str = ""
    looks: Sequence[tuple[str, int, str]] = ()


def render(
    head: Head,
    sections: Sequence[Section],
    training: Table,
    drawn: tuple[Picture | None, Picture | None],
    scores: Sequence[Artifact],
    checkpoints: Sequence[Artifact],
    ancestors: Sequence[Artifact] = (),
) -> str:
    """The page as HTML; verdicts and the first section's answer stand at the top.

    Args:
        head: Before the sections.
        sections: One a protocol.
        training: Table of the checkpoints.
        drawn: Of their logs: loss and skill; collapse meters.
        scores: Where the scores are from.
        checkpoints: All that are in the table.
        ancestors: What these were made from.
    """
    artifacts = list({one.ref: one for one in (*scores, *checkpoints, *ancestors)}.values())
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.globals |= {"say": say, "spoken": spoken, "properties": properties}
    environment.filters |= {"figure": _figure, "slug": lambda text: text.replace(" ", "-")}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        head=head,
        sections=sections,
        training=training,
        curves=drawn[0],
        meters=drawn[1],
        scores=list(scores),
        checkpoints=list(checkpoints),
        artifacts=artifacts,
        places={one.ref: f"made-{number}" for number, one in enumerate(artifacts)},
        pointing=Markup("\n").join(pointing(one.frames) for one in sections),
        known={one.digest: one.ref for one in artifacts},
        night=drawing.NIGHT,
        glossary=glossary(),
    )


def picture(wide: str, narrow: str, name: str) -> Picture:
    """Two drawings of one figure, made fit to stand in the same HTML document."""
    return Picture(_inline(wide, f"{name}-w"), _inline(narrow, f"{name}-n"))


def _inline(svg: str, name: str) -> Markup:
    """SVG for use inside HTML: ids made unique, and no namespace, which the HTML parser knows by itself.

    The drawing comes from Vega's own SVG writer, which escapes every label; that is why it counts as markup.
    """
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    return Markup(re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", svg))


def protocol_facts(protocol: Protocol) -> dict[str, str]:
    """What was held fixed for all rows of a protocol, in words."""
    head = protocol.scores.row(0, named=True)
    counts = protocol.scores.group_by("split").agg(pl.col("n_test", "episodes_test").max()).sort("split")
    words = {WHOLE: say("all test tasks"), UNSEEN: say("unseen tasks only"), "val-seen": say("seen tasks only")}
    alphas = protocol.scores["alpha"].drop_nulls().to_list()
    reached = say("reached: state after the gap minus state before")
    of, samples = say("{samples} samples of {episodes} episodes"), [head["n_train"], head["episodes_train"]]
    facts = {
        "fingerprint": protocol.fingerprint,
        "probe": head["probe"],
        "target": reached if head["target"] == "reached" else head["target"],
        "gap": say("{gap} frames = {seconds} s", gap=head["gap"], seconds=f"{head['gap_s']:.3g}"),
        say("training samples"): of.format(samples=f"{samples[0]:,}", episodes=f"{samples[1]:,}"),
    }
    for row in counts.iter_rows(named=True):
        name = say("split {name}", name=row["split"])
        facts[name] = of.format(samples=f"{row['n_test']:,}", episodes=f"{row['episodes_test']:,}")
        facts[name] += f" ({words[row['split']]})" if row["split"] in words else ""
    solver = say("ridge in closed form, strength chosen on held-out training episodes")
    if "attentive" in set(protocol.scores["pairing"]):
        solver = say(
            "one query over all patches, rate chosen on held-out training episodes; floors: {ridge}", ridge=solver
        )
    facts[say("solver")] = solver + (f" ({min(alphas):.3g} … {max(alphas):.3g})" if alphas else "")
    return facts


def notes(protocol: Protocol) -> list[str]:
    """What the scorer remarked, each remark once with the dimension and splits that it concerns."""
    found = protocol.scores.filter(pl.col("note") != "")
    grouped = found.group_by("dimension", "note", maintain_order=True).agg(pl.col("split").unique(maintain_order=True))
    return [f"{row['dimension']} ({', '.join(row['split'])}): {row['note']}" for row in grouped.iter_rows(named=True)]


def _figure(value: object, place: str) -> Markup:
    """A cell: its number, which leads to a `place` on the page, the interval set back, a verdict with its shape."""
    text, marks = say(str(value)), _marks(spoken())
    if text.startswith((say(NOT_MEASURED), say(UNDEFINED), say("does not apply"), say(NOT_COMPARABLE))):
        return Markup('<span class="none">{}</span>').format(text)
    head, _, tail = text.rpartition(" ")
    if tail in marks:
        return _number(head, place) + " " + marks[tail]
    head, _, tail = text.partition(" ")
    return marks[head] + " " + escape(tail) if head in marks else _number(text, place)


def _number(text: str, place: str) -> Markup:
    """A number, its interval set back; other text as it is."""
    found = re.match(r"([+-]?[\d.]+%?)(?: (\[[^\]]*\])|$)", text)
    if not found:
        return escape(text)
    shown = Markup('<a href="#{}">{}</a>').format(place, found[1]) if place else escape(found[1])
    shown += Markup(" <i>{}</i>").format(found[2]) if found[2] else ""
    return shown + text[found.end() :]

"""The report: every table, picture and the page of some scores, written into one folder.

Files: ``report.html``, ``summary.txt`` (one screen), ``scores.csv`` (every number, tidy); as .md .csv .tex ``winners``,
``hypotheses``, ``encoders``, ``seeds`` and ``training``, and for each protocol ``main-``, ``differences-``,
``dimensions-``, ``training-sets-`` and ``flow-verdict-<protocol>``; as .svg .png ``training`` and ``meters`` of
checkpoints, and for each protocol what there is to draw of ``forest-``, ``heat-``, ``few-``, ``gaps-``,
``maps-``, ``flows-``.
"""

from __future__ import annotations

import textwrap
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl

from avrl import budgets, drawing, gallery, hypotheses, page, pictures, tables, typeset
from avrl.answers import headline, sentences, told
from avrl.comparison import comparable, mapped, read
from avrl.errors import NotFoundError
from avrl.flow_verdict import percent_below
from avrl.leaders import marked, winners
from avrl.spread import spread
from avrl.verdicts import ABOVE, BELOW, UNDECIDED, Paired, differences, heads
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from avrl.artifact import Artifact
    from avrl.comparison import Protocol
    from avrl.tables import Table

PAGE, SUMMARY = "report.html", "summary.txt"
SCREEN = 12  # rows of each of the summary's tables, so that all fit one screen
COLUMNS = 120


def write(
    folder: Path,
    scores: Sequence[Artifact],
    checkpoints: Sequence[Artifact],
    resamples: int,
    ancestors: Sequence[Artifact] = (),
    price: float = 0.0,
    probes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the report of some scores artifacts; returns counts for the manifest.

    Args:
        folder: Where to.
        scores: What is reported.
        checkpoints: All that the page tells of.
        resamples: Of the bootstrap of each paired difference.
        ancestors: What these were made from, as far as it is still there.
        price: Dollars a GPU hour; 0 if nobody said.
        probes: Whose hypotheses alone are told of; empty for all.

    Raises:
        IntegrityError: an artifact's table cannot be read.
        NotFoundError: the artifacts hold no comparable score.
    """
    for old in folder.iterdir():  # what a killed build left may be half a file
        old.unlink()
    every, episodes = read(scores)
    unmarked = every.filter(fingerprint="")
    protocols = comparable(every.filter(pl.col("fingerprint") != ""), episodes)
    if not protocols:
        raise NotFoundError("no score names its protocol", "remove the scores and probe again")
    compares = [Paired(one, resamples) for one in protocols]
    sections = [_section(folder, one, protocols, scores) for one in compares]
    seen = zip(sections, (budgets.shown(one, scores, checkpoints) for one in protocols), strict=True)
    sections = [replace(one, notes=[*one.notes, *more]) for one, more in seen]
    won, judged = winners(compares), hypotheses.judge(compares, checkpoints, probes)
    told, cost = hypotheses.tally(judged), budgets.encoders(protocols, checkpoints, ancestors, price)
    trained, seeds = tables.training(checkpoints), spread(protocols, scores, checkpoints)
    singles = [one for one in (won, judged, cost, seeds) if one]
    for one in (*singles, *([trained] if checkpoints else [])):
        _write_table(folder, one)
    every.write_csv(folder / "scores.csv")
    head = page.Head(won, judged, cost, seeds, budgets.unlike(cost), _left_out(unmarked), gallery.looks(checkpoints))
    html = page.render(head, sections, trained, _logs(folder, checkpoints), scores, checkpoints, ancestors)
    (folder / PAGE).write_text(html, encoding="utf-8")
    (folder / SUMMARY).write_text(summary(sections, told, won), encoding="utf-8")
    order = [*singles, *(one for section in sections for one in section.tables), *([trained] if checkpoints else [])]
    return {
        "scores": len(scores),
        "numbers": every.height,
        "protocols": {one.slug: one.fingerprint for one in protocols},
        "verdicts": _tally(sections),
        "hypotheses": told,
        "answer": list(sections[0].answer),
        "tables": [one.name for one in order],
    }


def _left_out(unmarked: pl.DataFrame) -> str:
    return say("{n} numbers without a protocol fingerprint", n=unmarked.height) if unmarked.height else ""


def _tally(sections: Sequence[page.Section]) -> dict[str, int]:
    """How many differences came out how."""
    shown = [one.numbers for section in sections for one in section.tables if one.name.startswith("differences-")]
    verdicts = [verdict for numbers in shown for verdict in numbers["verdict"]]
    return {name: verdicts.count(name) for name in (ABOVE, BELOW, UNDECIDED, tables.NOT_MEASURED)}


def _logs(folder: Path, checkpoints: Sequence[Artifact]) -> tuple[page.Picture | None, page.Picture | None]:
    """Loss and skill of all checkpoints, and the collapse meters of those that were looked at."""
    logs = {one.ref: log for one in checkpoints if not (log := tables.log(one)).is_empty()}
    curves = _draw(folder, "training", partial(pictures.curves, logs), page.NARROW_CURVES) if logs else None
    looked = any(set(pictures.METERS) <= set(log.columns) for log in logs.values())
    return curves, _draw(folder, "meters", partial(pictures.meters, logs), page.NARROW_CURVES) if looked else None


def _section(folder: Path, compare: Paired, every: Sequence[Protocol], scores: Sequence[Artifact]) -> page.Section:
    protocol = compare.protocol
    if "r2" not in protocol.scores["metric"]:
        return _untargeted(folder, compare, scores)
    found = [marked(tables.main(protocol), compare), differences(compare), tables.dimensions(protocol)]
    found += [one for one in (tables.training_sets(protocol), percent_below(protocol, compare.resamples)) if one]
    for one in found:
        _write_table(folder, one)
    measured = heads(protocol)["value"].drop_nulls().len()
    forest = partial(pictures.forest, protocol)
    figures = _figures(folder, protocol, every) if measured else {}
    if arrows := gallery.flows(protocol, scores) if protocol.probe == "flow" else []:
        caption = say(
            "Optical flow of a few test pairs: frame t, the flow that was found in it, and what each probe predicts. A "
            "wedge points where its place moves to and is as long as it moves far; each row has its own scale."
        )
        figures[caption] = _draw(
            folder, f"flows-{protocol.slug}", partial(gallery.draw_flows, arrows), page.NARROW_CURVES
        )
    return page.Section(
        protocol=protocol,
        answer=sentences(protocol, found[1]),
        forest=_draw(folder, f"forest-{protocol.slug}", forest, page.NARROW) if measured else None,
        tables=found,
        facts=page.protocol_facts(protocol),
        notes=page.notes(protocol),
        figures=figures,
    )


def _figures(folder: Path, protocol: Protocol, every: Sequence[Protocol]) -> dict[str, page.Picture]:
    """What there is to draw of a protocol beside its forest: caption -> picture."""
    slug, found = protocol.slug, {}
    if not protocol.scores.filter(pl.col("dimension") != "mean", metric="r2").is_empty():
        caption = say("Headline rows by target dimension: R² on held-out episodes, as shade and as number.")
        found[caption] = _draw(folder, f"heat-{slug}", partial(pictures.heat, protocol), page.NARROW)
    if set(protocol.others["train"]) & set(pictures.SHARES) and pictures.speaks(protocol):
        caption = say(
            "Headline R² against the training episodes of the probe, with 95% intervals. What lies below -0.5 is drawn "
            "there."
        )
        found[caption] = _draw(folder, f"few-{slug}", partial(pictures.few, protocol), page.NARROW_CURVES)
    alike = [one for one in every if (one.probe, one.target) == (protocol.probe, protocol.target)]
    alike = [one for one in alike if pictures.speaks(one)]
    alike = list({one.scores["gap"][0]: one for one in reversed(alike)}.values())
    if len(alike) > 1 and protocol is every[min(every.index(one) for one in alike)]:
        caption = say(
            "Headline R² against the gap of a pair, with 95% intervals; each gap is a protocol of its own. What lies "
            "below -0.5 is drawn there."
        )
        alike.sort(key=lambda one: one.scores["gap"][0])
        found[caption] = _draw(folder, f"gaps-{slug}", partial(pictures.gaps, alike), page.NARROW_CURVES)
    return found


def _untargeted(folder: Path, compare: Paired, scores: Sequence[Artifact]) -> page.Section:
    """Of a probe that predicts no motion: one table, what it says in words, and a map if it drew one."""
    protocol = compare.protocol
    main = marked(tables.main(protocol), compare)
    _write_table(folder, main)
    points, slug = mapped(protocol, scores), protocol.slug
    return page.Section(
        protocol=protocol,
        answer=told(protocol),
        forest=None,
        tables=[main],
        facts=page.protocol_facts(protocol),
        notes=page.notes(protocol),
        maps=_draw(folder, f"maps-{slug}", partial(gallery.draw_maps, points, slug), page.NARROW) if points else None,
        frames=gallery.frames(points, slug),
    )


def _write_table(folder: Path, table: Table) -> None:
    table.numbers.write_csv(folder / f"{table.name}.csv")
    (folder / f"{table.name}.md").write_text(typeset.markdown(table), encoding="utf-8")
    (folder / f"{table.name}.tex").write_text(typeset.latex(table), encoding="utf-8")


def _draw(folder: Path, name: str, spec: Callable[[int], drawing.Spec], narrow: int) -> page.Picture:
    wide = drawing.svg(spec(page.WIDE))
    (folder / f"{name}.svg").write_text(wide, encoding="utf-8")
    (folder / f"{name}.png").write_bytes(drawing.png(wide))
    return page.picture(wide, drawing.svg(spec(narrow)), name)


def summary(sections: Sequence[page.Section], verdicts: Sequence[str], won: Table) -> str:
    """One screen: the plan's hypotheses, who wins on what, one row an encoder, and what else is on the page."""
    first = sections[0]
    view = first.tables[0].view
    chosen = view.join(
        headline(first.protocol), left_on=tables.LABEL, right_on="label", how="semi", maintain_order="left"
    )
    parts = [
        "\n".join(textwrap.fill(one, COLUMNS, subsequent_indent="  ") for one in verdicts),
        typeset.plain(won.view, SCREEN, COLUMNS),
        first.protocol.title + "\n" + typeset.plain(chosen.drop("kind", "dims"), SCREEN, COLUMNS),
    ]
    return "\n\n".join(parts) + "\n"

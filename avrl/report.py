"""The report: every table, picture and the page of some scores, written into one folder.

Files: ``report.html``, ``summary.txt`` (one screen), ``scores.csv`` (every number, tidy), for each protocol
``main-``, ``differences-``, ``dimensions-`` and ``training-sets-<protocol>`` as .md .csv .tex and
``forest-<protocol>`` as .svg .png; ``training`` as both; ``ranks``, of checkpoints that were looked at, as .svg .png.
"""

from __future__ import annotations

import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl

from avrl import page, pictures, tables, typeset
from avrl.answers import headline, sentences, told
from avrl.comparison import comparable, mapped, read
from avrl.errors import NotFoundError
from avrl.flow_verdict import percent_below
from avrl.verdicts import ABOVE, BELOW, UNDECIDED, differences, heads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from avrl.artifact import Artifact
    from avrl.comparison import Protocol
    from avrl.tables import Table

PAGE, SUMMARY = "report.html", "summary.txt"
SCREEN = 26  # rows of the summary's table, so that it fits one screen with the answer above
COLUMNS = 100


def write(folder: Path, scores: Sequence[Artifact], checkpoints: Sequence[Artifact], resamples: int) -> dict[str, Any]:
    """Write the report of some scores artifacts; returns counts for the manifest.

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
    left_out = f"{unmarked.height} numbers without a protocol fingerprint" if unmarked.height else ""
    sections = [
        _section(folder, one, resamples) if "r2" in one.scores["metric"] else _untargeted(folder, one, scores)
        for one in protocols
    ]
    trained = tables.training(checkpoints)
    logs = {one.ref: log for one in checkpoints if not (log := tables.log(one)).is_empty()}
    curves = _draw(folder, "training", partial(pictures.curves, logs), page.NARROW_CURVES) if logs else None
    looked = any(set(pictures.RANKS) <= set(log.columns) for log in logs.values())
    ranks = _draw(folder, "ranks", partial(pictures.ranks, logs), page.NARROW_CURVES) if looked else None
    if checkpoints:
        _write_table(folder, trained)
    every.write_csv(folder / "scores.csv")
    html = page.render(sections, trained, (curves, ranks), scores, checkpoints, left_out)
    (folder / PAGE).write_text(html, encoding="utf-8")
    (folder / SUMMARY).write_text(summary(sections), encoding="utf-8")
    shown = [one.numbers for section in sections for one in section.tables if one.title == "Differences"]
    verdicts = [verdict for numbers in shown for verdict in numbers["verdict"]]
    return {
        "scores": len(scores),
        "numbers": every.height,
        "protocols": {one.slug: one.fingerprint for one in protocols},
        "verdicts": {name: verdicts.count(name) for name in (ABOVE, BELOW, UNDECIDED, tables.NOT_MEASURED)},
        "answer": list(sections[0].answer),
        "tables": [one.name for section in sections for one in section.tables] + ["training"] * bool(checkpoints),
    }


def _section(folder: Path, protocol: Protocol, resamples: int) -> page.Section:
    found = [tables.main(protocol), differences(protocol, resamples), tables.dimensions(protocol)]
    found += [one for one in (tables.training_sets(protocol), percent_below(protocol, resamples)) if one]
    for one in found:
        _write_table(folder, one)
    measured = heads(protocol)["value"].drop_nulls().len()
    forest = partial(pictures.forest, protocol)
    return page.Section(
        protocol=protocol,
        answer=sentences(protocol, found[1]),
        forest=_draw(folder, f"forest-{protocol.slug}", forest, page.NARROW) if measured else None,
        tables=found,
        facts=page.protocol_facts(protocol),
        notes=page.notes(protocol),
    )


def _untargeted(folder: Path, protocol: Protocol, scores: Sequence[Artifact]) -> page.Section:
    """Of a probe that predicts no motion: one table, what it says in words, and a map if it drew one."""
    main = tables.main(protocol)
    _write_table(folder, main)
    points = mapped(protocol, scores)
    return page.Section(
        protocol=protocol,
        answer=told(protocol),
        forest=None,
        tables=[main],
        facts=page.protocol_facts(protocol),
        notes=page.notes(protocol),
        maps=_draw(folder, f"maps-{protocol.slug}", partial(pictures.maps, points), page.NARROW) if points else None,
    )


def _write_table(folder: Path, table: Table) -> None:
    table.numbers.write_csv(folder / f"{table.name}.csv")
    (folder / f"{table.name}.md").write_text(typeset.markdown(table), encoding="utf-8")
    (folder / f"{table.name}.tex").write_text(typeset.latex(table), encoding="utf-8")


def _draw(folder: Path, name: str, spec: Callable[[int], pictures.Spec], narrow: int) -> page.Picture:
    wide = pictures.svg(spec(page.WIDE))
    (folder / f"{name}.svg").write_text(wide, encoding="utf-8")
    (folder / f"{name}.png").write_bytes(pictures.png(wide))
    return page.picture(wide, pictures.svg(spec(narrow)), name)


def summary(sections: Sequence[page.Section]) -> str:
    """One screen: the answer, one row an encoder, and where the rest is."""
    first = sections[0]
    view = first.tables[0].view
    chosen = view.join(
        headline(first.protocol), left_on=tables.LABEL, right_on="label", how="semi", maintain_order="left"
    )
    answer = [textwrap.fill(one, COLUMNS, subsequent_indent="  ") for one in first.answer]
    more = "".join(f"\nAlso on the page: {one.protocol.title} ({one.protocol.apart})" for one in sections[1:])
    parts = [
        first.protocol.title,
        "\n".join(answer),
        typeset.plain(chosen.drop("kind", "dims"), SCREEN) + more,
    ]
    return "\n\n".join(parts) + "\n"

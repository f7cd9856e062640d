"""``avrl report --why CELL``: one number, and what it was made from, down to the raw files."""

from __future__ import annotations

import textwrap
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from avrl.cache import KEY_LENGTH, counted, hours, size
from avrl.errors import NotFoundError
from avrl_cli.output import printable

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence

    from avrl.artifact import Artifact
    from avrl.cells import Cell
    from avrl.lineage import Step
    from avrl_cli.output import Session

COLUMNS, SHOWN = 100, 20  # raw files, at most
NAMES = 13  # columns that the names of facts take


def explain(session: Session, scores: Sequence[Artifact], text: str) -> None:
    """Tell where one number is from.

    Raises:
        NotFoundError: the words fit no number, or several; those are listed on stderr.
    """
    from avrl import cells, lineage

    one = _only(session, cells.fitting(cells.cells(scores), text), text)
    found, damaged = lineage.held(session.store)
    for error in damaged.values():
        session.say(f"warning: {printable(str(error))}")
    artifact = next(each for each in scores if each.ref == one.row["scores"])
    steps = lineage.chain(artifact, lineage.Stock(found))
    raw = [
        step.artifact for step in steps if step.artifact and step.artifact.manifest.stage == "raw" and not step.above
    ]
    session.document["number"] = cells.document(one)
    session.document["lineage"] = [lineage.document(step) for step in steps]
    session.document["raw"] = [
        {"ref": each.ref, "from": lineage.upstream(each), "files": [asdict(file) for file in each.manifest.files]}
        for each in raw
    ]
    lines = [f"{one.title}: {one.text}", *_facts(cells.facts(one), 2), "", "made from"]
    lines += [line for step in steps for line in _step(step, artifact, damaged)]
    lines += [line for each in raw for line in ("", *_files(each))]
    session.tell("\n".join(map(printable, lines)))


def _only(session: Session, fits: Sequence[Cell], text: str) -> Cell:
    from avrl.cells import SHOWN

    if len(fits) == 1:
        return fits[0]
    for one in fits[:SHOWN]:
        session.say(printable(f"  {one.title}, {one.row['fingerprint']}: {one.text}  ({one.protocol})"))
    more = len(fits) - SHOWN
    session.say(f"  ... and {more} more") if more > 0 else None
    raise NotFoundError(
        f"{len(fits)} numbers fit {printable(text)!r}", "add words of the one you mean: its row, column or fingerprint"
    )


def _step(step: Step, top: Artifact, damaged: Container[str]) -> Iterator[str]:
    """An artifact on one line, and its facts below; packages only where they are not those of the first."""
    from avrl.lineage import GONE, properties

    indent, role = "  " * (step.depth + 1), f"{step.input.role}: " if step.input.role else ""
    one, ref, digest = step.artifact, step.input.ref, step.input.digest[:KEY_LENGTH]
    if one is None:
        fate = "damaged" if ref in damaged else GONE
        since = f"; made again since, with digest {step.again.digest[:KEY_LENGTH]}" if step.again else ""
        yield f"{indent}{role}{ref} (digest {digest}), {fate}{since}: what it was made from is not known"
        return
    name = f"{one.manifest.stage}/{one.ref}"
    if step.above:
        yield f"{indent}{role}{name} (above)"
        return
    yield f"{indent}{role}{name}"
    alias = {"named": f"then {step.input.ref}, with the same content"} if one.ref != step.input.ref else {}
    made = f"in {hours(one.manifest.seconds)}, {age(one)} ago, {size(one.bytes)} in {_files_of(one)}"
    told = alias | {"key": one.manifest.key, "digest": one.digest, "made": made} | properties(one)
    if one is not top and one.manifest.packages == top.manifest.packages:
        told["made with"] = "the same packages"
    yield from _facts(told, len(indent) + 2)


def age(artifact: Artifact) -> str:
    """How long ago an artifact was finished, by its manifest's time."""
    from avrl.artifact import MANIFEST

    return past(time.time() - (artifact.root / MANIFEST).stat().st_mtime)


def past(seconds: float) -> str:
    """A span of time as people say it of the past: also in days."""
    return hours(max(0, seconds)) if seconds < 2 * 86400 else f"{seconds / 86400:.0f} days"


def _facts(told: Mapping[str, str], indent: int) -> Iterator[str]:
    for name, text in told.items():
        first = f"{' ' * indent}{name:<{NAMES}}"
        filled = textwrap.fill(
            text, COLUMNS, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
        )
        yield from filled.splitlines()


def _files_of(one: Artifact) -> str:
    return counted(len(one.manifest.files), "file")


def _files(raw: Artifact) -> Iterator[str]:
    from avrl.lineage import upstream

    files = raw.manifest.files
    yield f"raw files of {raw.ref}, {upstream(raw) or 'of unknown origin'}"
    for file in files[:SHOWN]:
        yield f"  {size(file.bytes):>9}  {file.sha256[:KEY_LENGTH]}  {file.path}"
    if len(files) > SHOWN:
        yield f"  and {len(files) - SHOWN} more, {size(sum(file.bytes for file in files[SHOWN:]))}"

"""``avrl report cache``: what the cache holds, and what may be removed. It removes nothing itself."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from avrl.cache import counted, hours, size
from avrl.errors import NotFoundError
from avrl_cli.options import verb
from avrl_cli.output import Session, printable
from avrl_cli.why import past

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from avrl.artifact import Artifact
    from avrl.holdings import Holding, Removable
    from avrl.lineage import Stock

NAME = "cache"
KEY_SHOWN = 6  # digits of a parent's key: a reference takes the beginning of a key


@verb(None)
def command(session: Session) -> None:
    """List what the cache holds, how old it is, what hangs on it, and what may be removed. Removes nothing."""
    from avrl.holdings import document, removable, survey
    from avrl.lineage import Stock, held

    if not session.cache.is_dir():
        raise NotFoundError(f"no cache at {session.cache.absolute()}", "name one with --cache DIR")
    holdings, stock = survey(session.store), Stock(held(session.store)[0])
    may, free = removable(holdings, stock), session.store.free()
    session.document |= {
        "cache": str(session.cache),
        "free": free,
        "holdings": [document(one, stock) for one in holdings],
        "stages": {name: {"folders": count, "bytes": total} for name, count, total in _stages(holdings)},
        "removable": [asdict(one) for one in may],
    }
    lines = [
        f"{session.cache}: {counted(len(holdings), 'folder')}, {size(_bytes(holdings))}; {size(free)} free on its disk",
        "",
    ]
    lines += [f"{name:<12} {count:>5}  {size(total):>9}" for name, count, total in _stages(holdings)]
    lines += ["", f"{'size':>9}  {'age':>8}  {'made in':>8}  {'used by':>7}  what it is"]
    lines += [_line(one, stock) for one in holdings]
    session.tell("\n".join(map(printable, [*lines, *_may(may)])))


def _bytes(holdings: Sequence[Holding]) -> int:
    return sum(one.bytes for one in holdings)


def _stages(holdings: Sequence[Holding]) -> list[tuple[str, int, int]]:
    grouped = [(name, list(some)) for name, some in itertools.groupby(holdings, lambda one: one.stage)]
    return [(name, len(some), _bytes(some)) for name, some in grouped]


def _line(one: Holding, stock: Stock) -> str:
    took, used, said = "", "", f"  {one.state}" + (f": {one.fault}" if one.fault else "")
    if one.artifact:
        took, used = hours(one.artifact.manifest.seconds), str(len(stock.children(one.artifact)) or "-")
        said = _made_from(one.artifact, stock)
        if one.freed < one.bytes / 2:
            said += f"; links: removing it frees {size(one.freed)}"
    age = past(time.time() - one.changed)
    return f"{size(one.bytes):>9}  {age:>8}  {took:>8}  {used:>7}  {one.place}{said}"


def _made_from(artifact: Artifact, stock: Stock) -> str:
    """Roles and keys of its parents, or of many how many there are; whatever is not there any more is said."""
    from avrl.holdings import parents

    told = []
    found = [(re.sub(r"-\d+$", "", one.role), one.ref, state) for one, state in parents(artifact, stock)]
    for role, group in itertools.groupby(found, lambda one: one[0]):
        some = list(group)
        absent = Counter(state for _, _, state in some if state != "there")
        what = f"{role} {some[0][1].rsplit('-', 1)[-1][:KEY_SHOWN]}" if len(some) == 1 else f"{len(some)} x {role}"
        lost = [state if len(some) == 1 else f"{count} {state}" for state, count in absent.items()]
        told.append(what + (f" ({', '.join(lost)})" if lost else ""))
    return f"  from {', '.join(told)}" if told else ""


def _may(may: Sequence[Removable]) -> Iterator[str]:
    if not may:
        yield from ("", "nothing to remove")
        return
    yield from ("", "may be removed (avrl removes nothing by itself):")
    for why, group in itertools.groupby(may, lambda one: one.why):
        some = list(group)
        yield from ("", f"{why}: frees {size(sum(one.freed for one in some))}")
        yield from (f"  {one.command}  # {size(one.freed)}, {one.loss}" for one in some)

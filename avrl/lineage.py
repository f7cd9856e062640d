"""Lineage: what an artifact was made from, down to the raw files, and what was made from it.

A parent is known by the digest that its child's manifest holds, so what was made again and came out different is no
parent any more. One that is not there is said by name and digest, never left out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from avrl.artifact import MANIFEST, Input, load
from avrl.errors import ConfigError, IntegrityError
from avrl.sources import source

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from avrl.artifact import Artifact
    from avrl.cache import Cache

GONE = "no longer in the cache"
SAMPLE = "bundled with avrl"
UNTOLD = "auto: a GPU if there was one, not recorded"


class Stock:
    """Artifacts among which parents and children are looked for."""

    def __init__(self, artifacts: Iterable[Artifact]) -> None:
        self.artifacts = list(artifacts)
        self._by_digest: defaultdict[str, list[Artifact]] = defaultdict(list)
        self._by_ref: defaultdict[str, list[Artifact]] = defaultdict(list)
        for one in self.artifacts:
            self._by_digest[one.digest].append(one)
            self._by_ref[one.ref].append(one)
        self._children: defaultdict[str, list[Artifact]] = defaultdict(list)
        for one in self.artifacts:
            for parent in {str(found.root): found for each in one.manifest.inputs if (found := self.find(each))}:
                self._children[parent].append(one)

    def find(self, wanted: Input) -> Artifact | None:
        """The artifact with this content; of several that one which has the name too."""
        same = self._by_digest.get(wanted.digest, [])
        return next((one for one in same if one.ref == wanted.ref), same[0] if same else None)

    def again(self, wanted: Input) -> Artifact | None:
        """What has the name of an input that is gone, and other content: it was made again since."""
        named = self._by_ref.get(wanted.ref, [])
        return named[0] if named and not self.find(wanted) else None

    def children(self, artifact: Artifact) -> list[Artifact]:
        """What was made from an artifact."""
        return self._children[str(artifact.root)]


@dataclass(frozen=True)
class Step:
    """One line of a lineage.

    Attributes:
        depth: 0 for the artifact itself, 1 for its parents.
        input: Its role, name and digest as its child's manifest has them; the role of the first step is empty.
        artifact: None if it is gone.
        again: What has its name now, if that came out different.
        above: An earlier step shows the same artifact, with what it was made from.
    """

    depth: int
    input: Input
    artifact: Artifact | None
    again: Artifact | None = None
    above: bool = False


def held(cache: Cache) -> tuple[list[Artifact], dict[str, IntegrityError]]:
    """Every artifact of a cache, in any folder of it; and by name what is wrong with those that cannot be read."""
    found, damaged = [], {}
    own, remote = cache.root.glob(f"[!.]*/[!.]*/{MANIFEST}"), cache.root.glob(f"frames/.s3-*/*/{MANIFEST}")
    for path in (*sorted(own), *sorted(remote)):
        try:
            found.append(load(path.parent))
        except IntegrityError as error:
            damaged[path.parent.name] = error
    return found, damaged


def chain(artifact: Artifact, stock: Stock) -> list[Step]:
    """An artifact and all that it was made from, each parent below its child, depth first.

    What several were made from stands in full once; a forged manifest that names its own child ends there too.
    """
    steps: list[Step] = []
    shown = set()

    def walk(depth: int, wanted: Input, found: Artifact | None) -> None:
        above = found is not None and found.root in shown
        steps.append(Step(depth, wanted, found, stock.again(wanted), above))
        if found is not None and not above:
            shown.add(found.root)
            for one in found.manifest.inputs:
                walk(depth + 1, one, stock.find(one))

    walk(0, Input("", artifact.ref, artifact.digest), artifact)
    return steps


def ancestry(artifacts: Iterable[Artifact], stock: Stock) -> dict[str, list[Artifact]]:
    """Name -> what an artifact was made from, as far as it is there, each once and nearest first."""
    found = {}
    for one in artifacts:
        steps = sorted(chain(one, stock)[1:], key=lambda step: step.depth)
        found[one.ref] = [step.artifact for step in steps if step.artifact and not step.above]
    return found


def properties(artifact: Artifact) -> dict[str, str]:
    """What a person asks of an artifact, by name, without its key and digest; nothing here hangs on the clock.

    Of the facts those that the config does not say already.
    """
    manifest = artifact.manifest
    config, facts = manifest.config, manifest.facts
    told = {
        name: value for name, value in facts.items() if config.get(name) != value and name not in ("device", "licence")
    }
    found = {
        "config": flat(config),
        "found": flat(told),
        "device": str(facts.get("device") or manifest.runtime.get("device") or "").replace("auto", UNTOLD),
        "licence": "; ".join(map(str, manifest.licence)),
        "from": upstream(artifact) if manifest.stage == "raw" else "",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.packages.items()),
    }
    return {name: value for name, value in found.items() if value}


def flat(values: Mapping[str, Any]) -> str:
    """A mapping on one line, without what is empty."""
    return ", ".join(f"{name}={_short(value)}" for name, value in values.items() if value not in ("", [], {}, None))


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "+".join(map(_short, value))
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_short(inner)}" for name, inner in value.items()) + ")"
    return json.dumps(value)


def upstream(raw: Artifact) -> str:
    """Where raw files are from: an address, a folder, or this package; empty if that is not known."""
    origin = str(raw.manifest.config.get("origin", ""))
    if origin:
        return SAMPLE if origin == "sample" else origin
    try:
        return source(str(raw.manifest.config.get("source", ""))).BASE_URL
    except ConfigError:  # a source that this avrl does not know
        return ""


def document(step: Step) -> dict[str, Any]:
    """A step for a program: everything but the list of files."""
    one = step.artifact
    found: dict[str, Any] = {"depth": step.depth, **asdict(step.input), "in_cache": one is not None}
    if step.again:
        found["made_again"] = step.again.digest
    if one is None:
        return found
    manifest = one.manifest
    found |= {"stage": manifest.stage, "path": str(one.root), "key": manifest.key, "bytes": one.bytes}
    fields = ("version", "config", "runtime", "facts", "licence", "packages", "seconds")
    return found | {name: getattr(manifest, name) for name in fields}

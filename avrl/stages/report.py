"""Stage `tables`: scores -> tables, pictures and one page. Its inputs are *all* scores of a cache.

No file holds the date, so a second report of the same scores has the same digest, killed or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from avrl.config import Opt
from avrl.errors import ConfigError
from avrl.stage import Built, Inputs, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from avrl.artifact import Artifact

SCORES, CHECKPOINTS, ANCESTORS = "scores", "checkpoint", "ancestor"
PAGE, SUMMARY = "report.html", "summary.txt"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How scores become tables."""

    resamples: Annotated[int, Opt("Bootstrap resamples of each paired difference")] = 1000

    price: Annotated[float, Opt("Dollars a GPU hour, for the cost of each encoder", unit="$")] = 0.0

    lang: Annotated[Literal["en", "ko"], Opt("Language of the fixed words: English or Korean")] = "en"

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise ConfigError(f"resamples={self.resamples} is too few for a 95% interval", "use at least 100")
        if self.price < 0:
            raise ConfigError(f"price={self.price} is less than nothing")


def inputs(
    scores: Sequence[Artifact], checkpoints: Sequence[Artifact], ancestors: Sequence[Artifact] = ()
) -> dict[str, Artifact]:
    """The stage's inputs: roles numbered in the order of the references. `ancestors`: what the others are from."""
    told = {one.ref for one in (*scores, *checkpoints)}
    others = {one.ref: one for one in ancestors if one.ref not in told}
    found = {}
    for role, artifacts in ((SCORES, scores), (CHECKPOINTS, checkpoints), (ANCESTORS, others.values())):
        for number, one in enumerate(sorted(artifacts, key=lambda one: one.ref)):
            found[f"{role}-{number:02d}"] = one
    return found


def only(scores: Sequence[Artifact], words: Sequence[str]) -> list[Artifact]:
    """The scores of the probes and encoders that are named; floors and ceilings stay, twins go with their encoder.

    Raises:
        ConfigError: a word names neither.
    """
    asked = [(str(one.manifest.config["probe"]), str(one.manifest.config["encoder"])) for one in scores]
    fixed = [one.manifest.config["init"] == "none" for one in scores]
    probes = {probe for probe, _ in asked}
    encoders = {encoder for (_, encoder), alone in zip(asked, fixed, strict=True) if not alone}
    for word in words:
        if word not in probes | encoders:
            there = f"probes {', '.join(sorted(probes))}; encoders {', '.join(sorted(encoders))}"
            raise ConfigError(f"--only {word}: no scores of it", f"there are {there}")
    some, whose = probes.intersection(words) or probes, encoders.intersection(words) or encoders
    return [
        one
        for one, (probe, encoder), alone in zip(scores, asked, fixed, strict=True)
        if probe in some and (alone or encoder in whose)
    ]


def _slug(config: ReportConfig, given: Inputs) -> str:
    return f"report-{sum(role.startswith(SCORES) for role in given)}-scores"


def _build(config: ReportConfig, given: Inputs, folder: Path) -> Built:
    from avrl import report
    from avrl.words import speaking

    scores, checkpoints, ancestors = (
        [one for role, one in given.items() if role.startswith(kind)] for kind in (SCORES, CHECKPOINTS, ANCESTORS)
    )
    with speaking(config.lang):
        return Built(facts=report.write(folder, scores, checkpoints, config.resamples, ancestors, config.price))


STAGE = Stage(name="tables", version=7, config=ReportConfig, slug=_slug, build=_build)

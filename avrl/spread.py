"""Spread over seeds: what a headline number does when the same run is done again with another seed.

An interval over test episodes says how far other episodes would move a number, not how far another training would.
Runs are of one family where nothing but a seed tells them apart: that of pretraining (initial weights, order, gaps),
or that of the probe (validation episodes, few examples, pairs of flow, bootstrap).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import polars as pl

from avrl.answers import headline
from avrl.tables import LABEL, Table, columns
from avrl.verdicts import standing
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from avrl.artifact import Artifact, Manifest
    from avrl.comparison import Protocol
    from avrl.verdicts import Row

HEADS = ("r2", "accuracy", "knn-accuracy")  # metrics that a headline may be of
OWN = ("seed", "checkpoint", "weights")  # of a request for scores, and not the family's
TEXTS = ["encoder", "init", "readout", "pairing", "kind", "question", "runs"]
NUMBERS: dict[str, Any] = dict.fromkeys(TEXTS, pl.String)
NUMBERS |= dict.fromkeys(["pretraining_seeds", "probe_seeds"], pl.Int64)
NUMBERS |= dict.fromkeys(["mean", "sd", "least", "most"], pl.Float64)


def spread(protocols: Sequence[Protocol], scores: Sequence[Artifact], checkpoints: Sequence[Artifact]) -> Table | None:
    """Mean and standard deviation (of n - 1) of each headline row over its seeds; None if nothing was run again.

    Args:
        protocols: Whose rows are looked through; those of another seed of the probe are others.
        scores: Whose manifests tell how they were made.
        checkpoints: Likewise; a run whose checkpoint is gone is of a family of its own.
    """
    made = {one.ref: one.manifest for one in scores}
    trained = {one.ref: one.manifest for one in checkpoints}
    families: dict[tuple[str, ...], dict[tuple[Any, Any], Row]] = {}
    for protocol in protocols:
        head = next((one for one in columns(protocol.scores) if one.metric in HEADS), None)
        if head is None:
            continue
        rows = standing(protocol, head).filter(pl.col("value").is_not_null())
        rows = rows.join(headline(protocol), on="label", how="semi", maintain_order="left")
        for row in rows.iter_rows(named=True):
            family, seeds = _family(made[row["scores"]], trained.get(row["checkpoint"]), row["checkpoint"])
            question = f"{protocol.title}: {head.title}"
            runs = families.setdefault((*family, row["readout"], row["pairing"]), {})
            runs.setdefault(seeds, {**row, "question": question})
    again = [runs for runs in families.values() if len(runs) > 1]
    if not again:
        return None
    frame = pl.DataFrame([_numbers(runs) for runs in again], schema=NUMBERS)
    caption = say(
        "Headline rows of runs that only a seed tells apart: that of pretraining (initial weights, order, gaps), or "
        "that of the probe (validation episodes, few examples, pairs of flow). Mean ± standard deviation over runs. "
        "The intervals of other tables are over test episodes and do not hold this spread."
    )
    return Table("seeds", say("Spread over seeds"), caption, frame, _view(frame, again), prose=True)


def _family(manifest: Manifest, checkpoint: Manifest | None, ref: str) -> tuple[tuple[str, ...], tuple[Any, Any]]:
    """What is the same for all runs of a family, and the two seeds that tell this one from the others."""
    asked = {name: value for name, value in manifest.config.items() if name not in OWN}
    data = sorted(one.digest for one in manifest.inputs if one.role == "frames")
    recipe: Any = ref
    if checkpoint:
        recipe = {name: value for name, value in checkpoint.config.items() if name != "seed"}
        recipe["frames"] = [one.digest for one in checkpoint.inputs]
    family = tuple(json.dumps(one, sort_keys=True) for one in (asked, data, recipe))
    return family, (checkpoint.config.get("seed") if checkpoint else None, manifest.config.get("seed"))


def _numbers(runs: dict[tuple[Any, Any], Row]) -> dict[str, Any]:
    values, first = pl.Series([one["value"] for one in runs.values()]), next(iter(runs.values()))
    refs = dict.fromkeys(one["checkpoint"] or one["scores"] for one in runs.values())
    return {
        **{name: first[name] for name in ("encoder", "init", "readout", "pairing", "kind", "question")},
        "runs": " ".join(refs),
        "pretraining_seeds": len({of for of, _ in runs}),
        "probe_seeds": len({of for _, of in runs}),
        **{"mean": values.mean(), "sd": values.std(), "least": values.min(), "most": values.max()},
    }


def _view(frame: pl.DataFrame, again: Sequence[dict[tuple[Any, Any], Row]]) -> pl.DataFrame:
    # A name that tells checkpoints apart would tell runs of one family apart.
    labels = [
        one["label"].replace(one["name"], one["encoder"], 1) for one in (next(iter(runs.values())) for runs in again)
    ]
    rows = frame.to_dicts()
    return pl.DataFrame(
        {
            LABEL: labels,
            "kind": frame["kind"],
            say("question"): frame["question"],
            say("seeds of pretraining"): [str(one["pretraining_seeds"]) for one in rows],
            say("seeds of the probe"): [str(one["probe_seeds"]) for one in rows],
            say("mean ± standard deviation"): [f"{one['mean']:.3f} ± {one['sd']:.3f}" for one in rows],
            say("least, most"): [f"{one['least']:.3f}, {one['most']:.3f}" for one in rows],
            say("runs"): [", ".join(ref[-6:] for ref in one["runs"].split()) for one in rows],
        }
    )

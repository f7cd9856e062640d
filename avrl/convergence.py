"""Whether pretraining converged: came to rest, above its own baseline, on a code that has not collapsed."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING

import polars as pl

from avrl.effects import FAIL, PASS, UNDECIDED, Effect
from avrl.objectives import Network
from avrl.tables import NOT_MEASURED, log
from avrl.words import say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from avrl.artifact import Artifact

PLATEAU = 0.01  # skill that the last tenth of training may still add
COLLAPSED = 2.0  # directions: a code of a lower effective rank is one line


def converged(checkpoints: Sequence[Artifact], models: Sequence[str]) -> Iterator[tuple[str, Effect]]:
    """Whether pretraining came to rest above its own baseline, a row a checkpoint."""
    named = [(name_of(one), one) for one in checkpoints]
    for model in models:
        ours = [one for name, one in named if name == model]
        if not ours:
            yield model, Effect(NOT_MEASURED, decides=f"avrl pretrain {model}")
        for one in ours:
            yield f"{model}@{one.ref[-6:]}" if len(ours) > 1 else model, _rest(one)


def name_of(checkpoint: Artifact) -> str:
    """What a checkpoint's network is called."""
    config = {
        "size": "",
        "image_size": 0,
        "loss_decay": 1.0,
        "mask_ratio": 0.0,
        "seed": 0,
        **checkpoint.manifest.config,
    }
    return Network(**{one.name: config[one.name] for one in fields(Network) if one.name in config}).name


def _rest(checkpoint: Artifact) -> Effect:
    rows = log(checkpoint)
    share = rows["step"] / rows["step"][-1]  # rows of a long run are short at first
    last, before = (rows["skill"].filter((share > low) & (share <= low + 0.1)).to_numpy() for low in (0.9, 0.8))
    sample = say("{steps} steps, {samples} samples", steps=f"{rows['step'][-1]:,}", samples=f"{rows['samples'][-1]:,}")
    held = rows["held_out_skill"].drop_nulls() if "held_out_skill" in rows.columns else pl.Series(dtype=pl.Float64)
    if min(len(last), len(before)) < 2 or held.is_empty():
        return Effect(
            UNDECIDED,
            say("too short, or never looked at"),
            sample=sample,
            decides=say("pretrain longer: more --epochs"),
        )
    rank = rows["rank_cls"].drop_nulls().to_list()[-1:] if "rank_cls" in rows.columns else []
    error = 1.96 * math.sqrt(sum(one.var(ddof=1) / len(one) for one in (last, before)))
    rise = last.mean() - before.mean()
    skill = float(held[-1])
    collapsed = bool(rank) and rank[0] < COLLAPSED
    measure = say("held-out skill; last tenth {rise}", rise=f"{rise:+.3f} [{rise - error:+.3f}, {rise + error:+.3f}]")
    if collapsed:
        measure += "; " + say("collapsed: effective rank {rank}", rank=f"{rank[0]:.1f}")
    if skill <= 0 or collapsed or rise + error < -PLATEAU:
        return Effect(FAIL, measure, (skill, None, None), sample=sample)
    if abs(rise) + error < PLATEAU:
        return Effect(PASS, measure, (skill, None, None), sample=sample)
    return Effect(UNDECIDED, measure, (skill, None, None), sample=sample, decides=say("pretrain longer: more --epochs"))

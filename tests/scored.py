"""Synthetic scores and checkpoints in a cache, made through `avrl.stage.run` like real ones."""

import json
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import polars as pl

from avrl.cache import Cache
from avrl.config import Opt
from avrl.intervals import Sums, r2_interval, weights
from avrl.stage import Built, Stage, run

GROUPS = {"position": ("x", "y", "z"), "rotation": ("roll", "pitch", "yaw")}
N_EPISODES, N_FRAMES = 24, 12
SEEN = np.arange(N_EPISODES) % 4 != 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scores artifact: an encoder and the error of its prediction of position."""

    encoder: Annotated[str, Opt("Encoder")] = "two-stream"
    checkpoint: Annotated[str, Opt("Reference of its checkpoint")] = ""
    init: Annotated[str, Opt("Where the weights are from")] = "trained"
    readouts: Annotated[tuple[str, ...], Opt("Readouts")] = ("cls",)
    pairing: Annotated[str, Opt("How two frames become one vector")] = "pair"
    noise: Annotated[float, Opt("Error, in standard deviations of the target")] = 0.5
    fingerprint: Annotated[str, Opt("Protocol")] = "aaaaaaaaaaaa"
    gap: Annotated[int, Opt("Gap")] = 3
    target: Annotated[str, Opt("Target")] = "reached"
    constant: Annotated[str, Opt("A dimension that does not move")] = ""
    probe: Annotated[str, Opt("What was probed")] = "bridge"


def sums(config, readout, dimension, seed=0):
    """(E,) n and (E, 1) sums; the target and a common error are the same for every encoder of a protocol."""
    target = np.random.default_rng([seed, ord(dimension[0]), len(dimension), config.gap])
    y = target.normal(size=(N_EPISODES, N_FRAMES)) * (dimension != config.constant)
    common = target.normal(size=y.shape) + target.normal(size=(N_EPISODES, 1))
    own = np.random.default_rng([ord(c) for c in config.encoder + config.init + readout]).normal(size=y.shape)
    z = y + config.noise * (0.6 * common + 0.3 * own)
    column = [((y - z) ** 2).sum(1), y.sum(1), (y**2).sum(1)]
    return Sums(np.full(N_EPISODES, float(N_FRAMES)), *(one[:, None] for one in column))


def frames(config):
    ident = {"encoder": config.encoder, "checkpoint": config.checkpoint, "init": config.init}
    ident |= {"pairing": config.pairing, "gap": config.gap, "target": config.target}
    ident |= {"fingerprint": config.fingerprint}
    scores, episodes = [], []
    for readout in config.readouts:
        for group, dimensions in GROUPS.items():
            parts = {dimension: sums(config, readout, dimension) for dimension in dimensions}
            for dimension, part in parts.items():
                cells = zip(range(N_EPISODES), SEEN, *(one.ravel() for one in part), strict=True)
                episodes += [
                    {
                        **ident,
                        "readout": readout,
                        "dimension": dimension,
                        "episode_index": e,
                        "seen": bool(seen),
                    }
                    | {"n": int(n), "sse": sse, "sum_y": sum_y, "sum_yy": sum_yy}
                    for e, seen, n, sse, sum_y, sum_yy in cells
                ]
            moving = [part for dimension, part in parts.items() if dimension != config.constant]
            parts["mean"] = Sums(moving[0].n, *(np.hstack([p[i] for p in moving]) for i in (1, 2, 3)))
            splits = {"val": SEEN | True, "val-seen": SEEN, "val-unseen": ~SEEN}
            for split, keep in ((name, keep) for name, keep in splits.items() if keep.any()):
                for dimension, part in parts.items():
                    kept = Sums(*(one[keep] for one in part))
                    found = r2_interval(kept, weights(int(keep.sum()), 50), mean=dimension == "mean")
                    value, low, high = (None if np.isnan(one).any() else float(one.squeeze()) for one in found)
                    note = "the target is constant" if value is None else ""
                    scores.append(
                        {**ident, "readout": readout, "group": group, "dimension": dimension, "split": split}
                        | {"metric": "r2", "value": value, "low": low, "high": high, "note": note}
                        | {"n_test": int(keep.sum()) * N_FRAMES, "episodes_test": int(keep.sum())}
                    )
        scores.append(
            {
                **ident,
                "readout": readout,
                "group": "gripper",
                "dimension": "gripper",
                "split": "val",
                "note": "",
            }
            | {"metric": "auc", "value": 0.9 - config.noise / 5, "low": 0.6, "high": 0.95}
            | {"n_test": N_EPISODES * N_FRAMES, "episodes_test": N_EPISODES}
        )
    same = {"probe": config.probe, "dims": 192, "gap_s": config.gap / 5, "n_train": 640, "episodes_train": 60}
    table = pl.DataFrame([one | same | {"alpha": 10.0} for one in scores])
    return table, pl.DataFrame(episodes).cast({"n": pl.Int64, "seen": pl.Boolean})


def _build(config, inputs, folder):
    scores, episodes = frames(config)
    scores.write_parquet(folder / "scores.parquet")
    episodes.write_parquet(folder / "episodes.parquet")
    return Built(facts={"rows": scores.height}, licence=["CC BY 4.0 (synthetic)"])


SCORES = Stage("scores", 1, Row, lambda c, _: f"bridge-{c.init}-{c.gap}", _build)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One checkpoint."""

    objective: Annotated[str, Opt("Objective")] = "two-stream"
    steps: Annotated[int, Opt("Steps")] = 500
    skill: Annotated[float, Opt("Skill at the end")] = 0.3
    looks: Annotated[int, Opt("Steps between looks; 0: none")] = 100


def _train(config, inputs, folder):
    at = np.arange(1, config.steps + 1)
    skill = config.skill * (1 - np.exp(-at / 120)) + 0.01 * np.sin(at)
    log = pl.DataFrame({"step": at, "epoch": at / 50, "samples": at * 24, "loss": 0.8 - skill, "skill": skill})
    log.with_columns(lr=1e-4, grad_norm=1.0).write_parquet(folder / "log.parquet")
    if config.looks:
        (folder / "looks").mkdir(exist_ok=True)
        found = log.filter(pl.col("step") % config.looks == 0).select("step", held_out_skill="skill")
        found.with_columns(rank_cls=9.0, rank_patches=40.0, cosine_cls=0.4, cosine_patches=0.2).write_parquet(
            folder / "looks/held-out.parquet"
        )
    (folder / "config.json").write_text(json.dumps({"baseline": "copy"}))
    facts = {"objective": config.objective, "size": "tiny", "parameters": 4_200_000, "steps": config.steps}
    return Built(facts | {"samples": config.steps * 24, "device": "cpu", "skill": config.skill})


CHECKPOINTS = Stage("checkpoints", 1, Training, lambda c, _: f"{c.objective}-tiny", _train)

FLOORS = (
    Row(encoder="mean", init="none", readouts=("mean",), pairing="none", noise=1.5),
    Row(encoder="state", init="none", readouts=("state",), pairing="none", noise=1.3),
    Row(encoder="pixels-8", init="none", readouts=("difference",), pairing="none", noise=0.62),
    Row(encoder="pixels-16", init="none", readouts=("difference",), pairing="none", noise=0.55),
)


def score(cache: Cache, *rows: Row):
    """The scores artifacts of some rows."""
    return [run(SCORES, one, {}, cache)[0] for one in rows]


def train(cache: Cache, *trainings: Training):
    """The checkpoints of some trainings."""
    return [run(CHECKPOINTS, one, {}, cache)[0] for one in trainings]


def demo(cache: Cache):
    """Three trained encoders with twins, an outside encoder and the floors; returns (scores, checkpoints)."""
    goals = {"two-stream": 0.3, "single-stream": 0.25, "videomae": 0.4}
    checkpoints = train(cache, *(Training(objective=name, skill=skill) for name, skill in goals.items()))
    rows = []
    readouts = ("cls", "patch-mean", "grid")
    for one, noise in zip(checkpoints, (0.6, 0.7, 1.0), strict=True):
        name = one.manifest.config["objective"]
        rows += [
            Row(encoder=name, checkpoint=one.ref, noise=noise, readouts=readouts),
            Row(encoder=name, checkpoint=one.ref, init="random", noise=noise * 1.25, readouts=readouts),
        ]
    for pairing, noise in (("concat", 0.7), ("diff", 0.6)):
        rows.append(
            Row(
                encoder="efficientnet-lite0",
                init="pretrained",
                pairing=pairing,
                readouts=("pool",),
                noise=noise,
            )
        )
    return score(cache, *rows, *FLOORS), checkpoints

"""Optical flow from patches: a linear head on what stands at a place predicts how that place moves.

One ridge (`avrl.ridge`) for all encoders: at each of G x G places the patches of both frames for an encoder of
frames, the patches of the pair for an encoder of pairs, averaged over the area of the place, so that 14 and 16 px
patches meet on one grid. Strength from validation episodes, one look at test. Patches go into sums, kept nowhere.

Two motions of a place are predicted, each by its own columns of the head: all of it, and the residual when the camera's
is taken off (`avrl.camera_motion`). Where a camera moves much, an encoder that knows nothing but that does well at the
first.

Legend: B pairs, G = 14 places a side, K = 4 motions, h w patches, D dimensions, N places of pairs, E test episodes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import polars as pl
import torch
from torch import Tensor

from avrl import intervals, splits
from avrl.camera_motion import OWN
from avrl.encoders.pixels import areas
from avrl.errors import ConfigError
from avrl.flow_labels import GRID
from avrl.outcome import WHOLE, numbers
from avrl.progress import bar
from avrl.ridge import Moments, choose_alpha_of, solve
from avrl.splits import ALL
from avrl.stills import thumbnail
from avrl.store import FrameStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from avrl.probes import Given, Task, Who
    from avrl.splits import Split

PROTOCOL = 4
RESIDUAL = "residual"
MOTIONS = {"motion": slice(0, 2), RESIDUAL: slice(2, 4)}  # what moves, also a group of R2 -> its columns
KINDS = {"all": "motion", RESIDUAL: RESIDUAL, "moving": RESIDUAL}  # of errors -> of what
AXES = ("right", "down")
EXAMPLES, EXAMPLE = 4, 112  # pairs that are kept to look at, px


def score(out: Path, who: Who, task: Task, given: Given) -> dict[str, Any]:
    """Write ``scores.parquet`` and ``episodes.parquet`` of one encoder, or of the floors ``zero`` and ``mean``.

    Rows: R2 of the motion to the right and down, and of the residual; end-point error in px (`epe`) of the motion over
    all places, of the residual over all places, and of the residual over those where it is more than a pixel
    (``moving``). In ``episodes.parquet`` an error of a place is both the target ``y`` and the error of its sums, so
    that its mean and that of its square follow.

    Raises:
        ConfigError: no pair is left to fit, to choose the strength or to test on.
    """
    root = cast("Path", given.labels)
    rows, flow_NGG2 = pl.read_parquet(root / "pairs.parquet"), np.load(root / "flow.npy")
    motion_NGGK = np.concatenate([flow_NGG2, flow_NGG2 - np.load(root / "camera.npy")], 3)
    episodes = pl.read_parquet(given.frames / "episodes.parquet")
    parts = splits.split(rows, episodes, task.seed)
    if not all(mask.any() for mask in (parts.fit_N, parts.validate_N, parts.test_N)):
        raise ConfigError(f"{root}: too few pairs to fit, to choose and to test", "raise --pairs")
    teacher = json.loads((root / "manifest.json").read_bytes())["facts"]["teacher"]
    asked = [PROTOCOL, task.probe, teacher, task.data_digests, task.gap, task.seed, "ridge"]
    named = {
        "probe": task.probe,
        **asdict(who),
        "readout": "patches",
        "gap": task.gap,
        "gap_s": task.gap / float(episodes["fps"][0]),
        "target": teacher,
        "solver": "ridge",
        "fingerprint": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12],
    }
    predicted, alphas, named["pairing"], named["dims"] = _predicted(who, task, given, motion_NGGK, rows, parts)
    alpha = {name: float(np.exp(np.log(alphas[at]).mean())) for name, at in MOTIONS.items()} if alphas else {}
    sums = _sums(predicted, motion_NGGK[parts.test_N], parts)
    trained = {
        "train": ALL,
        "n_train": GRID**2 * int(parts.train_N.sum()),
        "episodes_train": len(np.unique(parts.episode_N[parts.train_N])),
    }
    found = [
        {**named, **trained, "alpha": alpha.get(KINDS.get(row["dimension"], row["group"])), **row}
        for row in _rows(sums, (task.resamples, task.seed))
    ]
    pl.DataFrame(found, infer_schema_length=None).write_parquet(out / "scores.parquet")
    tables = [one.with_columns(dimension=pl.lit(name)) for name, one in sums.items()]
    labels = {name: pl.lit(value) for name, value in named.items() if name != "dims"}
    pl.concat(tables).with_columns(**labels).write_parquet(out / "episodes.parquet")
    _examples(given.frames, rows, motion_NGGK, predicted, parts).write_parquet(out / "examples.parquet")
    return {**{name: found[0][name] for name in ("n_train", "n_test", "episodes_train", "episodes_test")}, **named}


def _examples(
    frames: Path, rows: pl.DataFrame, motion_NGGK: np.ndarray, predicted: np.ndarray, parts: Split
) -> pl.DataFrame:
    """A few test pairs to look at: those that move most, of `EXAMPLES` tasks, whatever the prediction.

    Columns: ``episode_index``, ``frame_index``, ``task``, ``picture`` (JPEG of frame t), ``truth`` and ``predicted``,
    each a (G, G, 2) flow in px of the store's frames, to the right and down, as a flat list.
    """
    store, whole = FrameStore(frames), MOTIONS["motion"]
    truth_MGG2, predicted_MGG2 = motion_NGGK[parts.test_N][..., whole], predicted[..., whole]
    first = store.episodes.select("episode_index", "dataset_from_index", "task")
    tested = rows.filter(parts.test_N).join(first, on="episode_index", how="left", maintain_order="left")
    moves = np.linalg.norm(truth_MGG2, axis=3).mean((1, 2))
    chosen = (
        tested.with_columns(moves=moves).with_row_index("place").sort("moves", descending=True, maintain_order=True)
    )
    chosen = chosen.unique("task", keep="first", maintain_order=True).head(EXAMPLES)
    place = chosen["place"].to_numpy()
    pixels = store.read((chosen["dataset_from_index"] + chosen["frame_index"]).to_numpy())
    return chosen.select("episode_index", "frame_index", "task").with_columns(
        picture=pl.Series([thumbnail(one, EXAMPLE) for one in pixels], dtype=pl.Binary),
        truth=pl.Series(truth_MGG2[place].reshape(len(place), -1).tolist()),
        predicted=pl.Series(predicted_MGG2[place].reshape(len(place), -1).tolist()),
    )


def _predicted(
    who: Who, task: Task, given: Given, motion_NGGK: np.ndarray, rows: pl.DataFrame, parts: Split
) -> tuple[np.ndarray, list[float], str, int]:
    """Motions (M, G, G, K) of the test pairs, the strength of each, how two frames became one vector, and D."""
    K = motion_NGGK.shape[3]
    if given.encoder is None:
        mean_K = motion_NGGK[parts.train_N].mean((0, 1, 2)) if who.encoder == "mean" else np.zeros(K)
        return np.broadcast_to(mean_K, (int(parts.test_N.sum()), GRID, GRID, K)), [], "none", 1
    sums: dict[bool, Moments] = {}
    for index, z in _places(given, rows, np.flatnonzero(parts.train_N), task.gap):
        if not sums:
            sums = {kind: Moments(z.double().mean((0, 1)), K) for kind in (False, True)}
        y = torch.from_numpy(motion_NGGK[index]).flatten(1, 2)
        validates = torch.from_numpy(parts.validate_N[index])
        for kind, moments in sums.items():
            here = validates == kind
            moments.add(z[here].flatten(0, 1), y[here].flatten(0, 1))
    alpha_K = choose_alpha_of(sums[False], sums[True])
    fit = solve(sums[False].plus(sums[True]), alpha_K)
    test = _places(given, rows, np.flatnonzero(parts.test_N), task.gap)
    found = [fit.predict(z.flatten(0, 1)).view(len(z), GRID, GRID, K).numpy() for _, z in test]
    pairing = "pair" if given.encoder.paired else "concat"
    return np.concatenate(found), alpha_K.tolist(), pairing, len(fit.mean_D)


def _places(given: Given, rows: pl.DataFrame, at: np.ndarray, gap: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Some pairs: their numbers and what stands at each place, (B, G G, D) float32 on the CPU."""
    encoder, store = given.encoder, FrameStore(given.frames)
    assert encoder is not None
    first = store.episodes.select("episode_index", "dataset_from_index")
    joined = rows.join(first, on="episode_index", how="left", maintain_order="left")
    row_N = (joined["dataset_from_index"] + joined["frame_index"]).to_numpy()
    starts = range(0, len(at), given.batch_size)
    for start in bar("patches", len(starts), "batch", iterable=starts):
        index = at[start : start + given.batch_size]
        row = row_N[index]
        pixels = torch.from_numpy(store.read(np.stack([row, row + gap], 1).ravel())).to(given.device)
        if encoder.paired:
            made = on_grid(encoder.patches(pixels.view(len(index), 2, *pixels.shape[1:])))
        else:
            both = on_grid(encoder.patches(pixels.unsqueeze(1)))  # each frame once
            made = torch.cat([both[::2], both[1::2]], 3)
        yield index, made.flatten(1, 2).cpu()


def on_grid(patches_BhwD: Tensor) -> Tensor:
    """The mean over each place of the patches that it covers, by their share of its area: (B, G, G, D)."""
    _, h, w, _ = patches_BhwD.shape
    rows, columns = areas(h, GRID).to(patches_BhwD), areas(w, GRID).to(patches_BhwD)
    return torch.einsum("gh,bhwd,kw->bgkd", rows, patches_BhwD, columns)


def _sums(predicted: np.ndarray, truth: np.ndarray, parts: Split) -> dict[str, pl.DataFrame]:
    """Sums of each test episode: of each kind of end-point error, and of each axis of each motion."""
    epe = {name: np.linalg.norm(predicted[..., at] - truth[..., at], axis=3) for name, at in MOTIONS.items()}
    moves = np.linalg.norm(truth[..., MOTIONS[RESIDUAL]], axis=3) > OWN
    errors = {kind: np.where(moves | (kind != "moving"), epe[name], np.nan) for kind, name in KINDS.items()}
    found = {kind: _by_episode(one, one, parts) for kind, one in errors.items()}
    axes = [axis for name in MOTIONS for axis in _axes(name)]
    return found | {
        axis: _by_episode(truth[..., k], predicted[..., k] - truth[..., k], parts) for k, axis in enumerate(axes)
    }


def _axes(motion: str) -> list[str]:
    """What rows call them."""
    return [f"{motion} {axis}" if motion == RESIDUAL else axis for axis in AXES]


def _by_episode(y: np.ndarray, error: np.ndarray, parts: Split) -> pl.DataFrame:
    """As `avrl.intervals.Sums`, a row an episode, of places (M, G, G); NaN: a place that does not count."""
    y, error = (one.reshape(len(one), -1).astype(np.float64) for one in (y, error))
    table = pl.DataFrame(
        {
            "episode_index": parts.episode_N[parts.test_N],
            "seen": parts.seen_N[parts.test_N],
            "n": np.isfinite(y).sum(1).astype(np.float64),
            "sse": np.nansum(error**2, 1),
            "sum_y": np.nansum(y, 1),
            "sum_yy": np.nansum(y**2, 1),
        }
    )
    columns = (pl.col("seen").first(), pl.col("n", "sse", "sum_y", "sum_yy").sum())
    return table.group_by("episode_index").agg(*columns).sort("episode_index")


def _rows(sums: dict[str, pl.DataFrame], draws: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Every score with its interval, on all test episodes and on those of seen and of unseen tasks."""
    seen = sums["all"]["seen"].to_numpy()
    weights = intervals.weights(len(seen), *draws)
    for split, chosen in ((WHOLE, seen | True), ("val-seen", seen), ("val-unseen", ~seen)):
        if not chosen.any():
            continue
        for group, dimension, metric, n, found in _numbers(sums, chosen, weights[:, chosen]):
            counts = {"n_test": int(n), "episodes_test": int(chosen.sum())}
            note = "px of the store's frames" if metric == "epe" else ""
            row = {"group": group, "dimension": dimension, "metric": metric, "split": split, **counts, **found}
            yield {**row, "note": note if found["value"] is not None else "nothing moves"}


def _numbers(
    sums: dict[str, pl.DataFrame], chosen: np.ndarray, weights: np.ndarray
) -> Iterator[tuple[str, str, str, float, dict[str, float | None]]]:
    """Group, dimension, metric, places and value: R2 of both axes and its mean, mean error of each kind."""
    names = ("n", "sse", "sum_y", "sum_yy")
    for motion in MOTIONS:
        axes = _axes(motion)
        n, *moments = (np.stack([sums[axis][name].to_numpy()[chosen] for axis in axes], 1) for name in names)
        of_axes = intervals.Sums(n[:, 0], *moments)
        each = intervals.r2_interval(of_axes, weights)
        for k, axis in enumerate(axes):
            yield motion, axis, "r2", n[:, k].sum(), numbers(each, k)
        yield motion, "mean", "r2", n[:, 0].sum(), numbers(intervals.r2_interval(of_axes, weights, mean=True))
    for kind in KINDS:
        places, total = (sums[kind][name].to_numpy()[chosen] for name in ("n", "sum_y"))
        with np.errstate(invalid="ignore", divide="ignore"):
            value, drawn = total.sum() / places.sum(), (weights @ total) / (weights @ places)
        yield "flow", kind, "epe", places.sum(), numbers(intervals.interval(value, drawn, len(places)))

"""Optical flow from patches: a linear head on what stands at a place predicts how that place moves.

One ridge (`avrl.ridge`) for all encoders: at each of G x G places the patches of both frames for an encoder of
frames, the patches of the pair for an encoder of pairs, averaged over the area of the place, so that 14 and 16 px
patches meet on one grid. Strength from validation episodes, one look at test. Patches go into sums, kept nowhere.

Legend: B pairs, G = 14 places a side, h w patches, D dimensions, N places of pairs, E test episodes.
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

MOVING = 1.0  # px: a place that moves
PROTOCOL = 2
KINDS = ("all", "moving", "residual")
AXES = ("right", "down")
EXAMPLES, EXAMPLE = 4, 112  # pairs that are kept to look at, px


def score(out: Path, who: Who, task: Task, given: Given) -> dict[str, Any]:
    """Write ``scores.parquet`` and ``episodes.parquet`` of one encoder, or of the floors ``zero`` and ``mean``.

    Rows: R2 of the motion to the right and down; end-point error in px (`epe`) over all places, over those that move
    more than a pixel, and of what is left when each pair's median over places is taken off prediction and truth
    (`residual`: most of a camera's own motion). In ``episodes.parquet`` an error of a place is both the target ``y``
    and the error of its sums, so that its mean and that of its square follow.

    Raises:
        ConfigError: no pair is left to fit, to choose the strength or to test on.
    """
    root = cast("Path", given.labels)
    rows, flow_NGGC = pl.read_parquet(root / "pairs.parquet"), np.load(root / "flow.npy")
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
    predicted, alpha, named["pairing"], named["dims"] = _predicted(who, task, given, flow_NGGC, rows, parts)
    sums = _sums(predicted, flow_NGGC[parts.test_N], parts)
    trained = {
        "train": ALL,
        "alpha": alpha,
        "n_train": GRID**2 * int(parts.train_N.sum()),
        "episodes_train": len(np.unique(parts.episode_N[parts.train_N])),
    }
    found = [{**named, **trained, **row} for row in _rows(sums, (task.resamples, task.seed))]
    pl.DataFrame(found, infer_schema_length=None).write_parquet(out / "scores.parquet")
    tables = [one.with_columns(dimension=pl.lit(name)) for name, one in sums.items()]
    labels = {name: pl.lit(value) for name, value in named.items() if name != "dims"}
    pl.concat(tables).with_columns(**labels).write_parquet(out / "episodes.parquet")
    _examples(given.frames, rows, flow_NGGC, predicted, parts).write_parquet(out / "examples.parquet")
    return {**{name: found[0][name] for name in ("n_train", "n_test", "episodes_train", "episodes_test")}, **named}


def _examples(
    frames: Path, rows: pl.DataFrame, flow_NGGC: np.ndarray, predicted: np.ndarray, parts: Split
) -> pl.DataFrame:
    """A few test pairs to look at: those that move most, of `EXAMPLES` tasks, whatever the prediction.

    Columns: ``episode_index``, ``frame_index``, ``task``, ``picture`` (JPEG of frame t), ``truth`` and ``predicted``,
    each a (G, G, 2) flow in px of the store's frames, to the right and down, as a flat list.
    """
    store = FrameStore(frames)
    first = store.episodes.select("episode_index", "dataset_from_index", "task")
    tested = rows.filter(parts.test_N).join(first, on="episode_index", how="left", maintain_order="left")
    moves = np.linalg.norm(flow_NGGC[parts.test_N], axis=3).mean((1, 2))
    chosen = (
        tested.with_columns(moves=moves).with_row_index("place").sort("moves", descending=True, maintain_order=True)
    )
    chosen = chosen.unique("task", keep="first", maintain_order=True).head(EXAMPLES)
    place = chosen["place"].to_numpy()
    pixels = store.read((chosen["dataset_from_index"] + chosen["frame_index"]).to_numpy())
    return chosen.select("episode_index", "frame_index", "task").with_columns(
        picture=pl.Series([thumbnail(one, EXAMPLE) for one in pixels], dtype=pl.Binary),
        truth=pl.Series(flow_NGGC[parts.test_N][place].reshape(len(place), -1).tolist()),
        predicted=pl.Series(np.asarray(predicted)[place].reshape(len(place), -1).tolist()),
    )


def _predicted(
    who: Who, task: Task, given: Given, flow_NGGC: np.ndarray, rows: pl.DataFrame, parts: Split
) -> tuple[np.ndarray, float | None, str, int]:
    """Flow (M, G, G, 2) of the test pairs, the strength, how two frames became one vector, and D."""
    shape = (int(parts.test_N.sum()), GRID, GRID, 2)
    if given.encoder is None:
        mean = flow_NGGC[parts.train_N].mean((0, 1, 2)) if who.encoder == "mean" else np.zeros(2)
        return np.broadcast_to(mean, shape), None, "none", 1
    sums: dict[bool, Moments] = {}
    for index, z in _places(given, rows, np.flatnonzero(parts.train_N), task.gap):
        if not sums:
            sums = {kind: Moments(z.double().mean((0, 1)), 2) for kind in (False, True)}
        y = torch.from_numpy(flow_NGGC[index]).flatten(1, 2)
        validates = torch.from_numpy(parts.validate_N[index])
        for kind, moments in sums.items():
            here = validates == kind
            moments.add(z[here].flatten(0, 1), y[here].flatten(0, 1))
    alpha_K = choose_alpha_of(sums[False], sums[True])
    fit = solve(sums[False].plus(sums[True]), alpha_K)
    test = _places(given, rows, np.flatnonzero(parts.test_N), task.gap)
    found = [fit.predict(z.flatten(0, 1)).view(len(z), GRID, GRID, 2).numpy() for _, z in test]
    pairing = "pair" if given.encoder.paired else "concat"
    return np.concatenate(found), float(alpha_K.log().mean().exp()), pairing, len(fit.mean_D)


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
    """Sums of each test episode: of each kind of end-point error, and of each axis of the motion."""
    epe = np.linalg.norm(predicted - truth, axis=3)
    moves = np.linalg.norm(truth, axis=3) > MOVING
    left = [one - np.median(one, axis=(1, 2), keepdims=True) for one in (predicted, truth)]
    kinds = (epe, np.where(moves, epe, np.nan), np.linalg.norm(left[0] - left[1], axis=3))
    errors = {name: _by_episode(one, one, parts) for name, one in zip(KINDS, kinds, strict=True)}
    axes = {name: _by_episode(truth[..., k], predicted[..., k] - truth[..., k], parts) for k, name in enumerate(AXES)}
    return {**errors, **axes}


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
    seen = sums[KINDS[0]]["seen"].to_numpy()
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
    n, *moments = (np.stack([sums[axis][name].to_numpy()[chosen] for axis in AXES], 1) for name in names)
    of_axes = intervals.Sums(n[:, 0], *moments)
    each = intervals.r2_interval(of_axes, weights)
    for k, axis in enumerate(AXES):
        yield "motion", axis, "r2", n[:, k].sum(), numbers(each, k)
    yield "motion", "mean", "r2", n[:, 0].sum(), numbers(intervals.r2_interval(of_axes, weights, mean=True))
    for kind in KINDS:
        places, total = (sums[kind][name].to_numpy()[chosen] for name in ("n", "sum_y"))
        with np.errstate(invalid="ignore", divide="ignore"):
            value, drawn = total.sum() / places.sum(), (weights @ total) / (weights @ places)
        yield "flow", kind, "epe", places.sum(), numbers(intervals.interval(value, drawn, len(places)))

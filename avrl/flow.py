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
from avrl.store import FrameStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from avrl.probes import Given, Task, Who
    from avrl.splits import Split

MOVING = 1.0  # px: a place that moves
PROTOCOL = 1
KINDS = ("all", "moving", "residual")


def score(out: Path, who: Who, task: Task, given: Given) -> dict[str, Any]:
    """Write ``scores.parquet`` and ``episodes.parquet`` of one encoder, or of the floors ``zero`` and ``mean``.

    Rows: end-point error in px (`epe`) over all places, over those that move more than a pixel, and of what is left
    when each frame's median flow is taken off prediction and truth (`residual`: most of a camera's own motion). In
    ``episodes.parquet`` the target ``y`` of the sums is the error of a place.

    Raises:
        ConfigError: no pair is left to fit, to choose the strength or to test on.
    """
    root = cast("Path", given.labels)
    rows, flow_NGGC = pl.read_parquet(root / "pairs.parquet"), np.load(root / "flow.npy")
    episodes = pl.read_parquet(given.frames / "episodes.parquet")
    parts = splits.split(rows, episodes, task.seed)
    if not all(mask.any() for mask in (parts.fit_N, parts.validate_N, parts.test_N)):
        raise ConfigError(f"{root}: too few pairs to fit, to choose and to test", "raise --pairs")
    facts = json.loads((root / "manifest.json").read_bytes())["facts"]
    asked = [PROTOCOL, task.data_digests, task.gap, task.seed, "ridge"]
    named = {
        "probe": task.probe,
        **asdict(who),
        "readout": "patches",
        "gap": task.gap,
        "gap_s": task.gap / float(episodes["fps"][0]),
        "target": facts["teacher"],
        "solver": "ridge",
        "fingerprint": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12],
    }
    predicted, alpha, named["pairing"], named["dims"] = _predicted(who, task, given, flow_NGGC, rows, parts)
    errors = _errors(predicted, flow_NGGC[parts.test_N])
    tables = _rows(errors, parts, alpha, (task.resamples, task.seed))
    pl.DataFrame([{**named, **row} for row in tables]).write_parquet(out / "scores.parquet")
    sums = pl.concat([_sums(error, parts).with_columns(dimension=pl.lit(name)) for name, error in errors.items()])
    sums.with_columns(**{name: pl.lit(value) for name, value in named.items() if name != "dims"}).write_parquet(
        out / "episodes.parquet"
    )
    return {**{name: tables[0][name] for name in ("n_train", "n_test", "episodes_train", "episodes_test")}, **named}


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


def _errors(predicted: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """End-point error (M, G G) of each kind; NaN where a place does not count."""
    epe = np.linalg.norm(predicted - truth, axis=3)
    speed = np.linalg.norm(truth, axis=3)
    left = [one - np.median(one, axis=(1, 2), keepdims=True) for one in (predicted, truth)]
    kinds = (epe, np.where(speed > MOVING, epe, np.nan), np.linalg.norm(left[0] - left[1], axis=3))
    return {name: one.reshape(len(one), -1) for name, one in zip(KINDS, kinds, strict=True)}


def _sums(error: np.ndarray, parts: Split) -> pl.DataFrame:
    """Of each test episode: places that count, and the sums of their error and of its square."""
    table = pl.DataFrame(
        {
            "episode_index": parts.episode_N[parts.test_N],
            "seen": parts.seen_N[parts.test_N],
            "n": np.isfinite(error).sum(1).astype(np.float64),
            "sum_y": np.nansum(error, 1),
            "sum_yy": np.nansum(error**2, 1),
        }
    )
    columns = (pl.col("seen").first(), pl.col("n", "sum_y", "sum_yy").sum())
    return table.group_by("episode_index").agg(*columns).sort("episode_index").with_columns(sse=pl.col("sum_yy"))


def _rows(
    errors: dict[str, np.ndarray], parts: Split, alpha: float | None, draws: tuple[int, int]
) -> list[dict[str, Any]]:
    """Mean error of each kind with its interval, on all test episodes and on those of seen and unseen tasks."""
    trained = {
        "n_train": int(parts.train_N.sum()),
        "episodes_train": len(np.unique(parts.episode_N[parts.train_N])),
    }
    found = []
    for name, error in errors.items():
        sums = _sums(error, parts)
        seen, n, total = (sums[column].to_numpy() for column in ("seen", "n", "sum_y"))
        weights = intervals.weights(len(sums), *draws)
        for split, chosen in ((WHOLE, seen | True), ("val-seen", seen), ("val-unseen", ~seen)):
            if not chosen.any():
                continue
            drawn = weights[:, chosen]
            with np.errstate(invalid="ignore", divide="ignore"):
                value = np.float64(total[chosen].sum()) / n[chosen].sum()
                draw = (drawn @ total[chosen]) / (drawn @ n[chosen])
            known = numbers(intervals.interval(value, draw, int(chosen.sum())))
            row = {"group": "flow", "dimension": name, "metric": "epe", "split": split, "train": ALL, "alpha": alpha}
            counts = {"n_test": int(n[chosen].sum()), "episodes_test": int(chosen.sum()), **trained}
            note = "px of the store's frames" if known["value"] is not None else "nothing moves"
            found.append({**row, **known, **counts, "note": note})
    return found

"""Probing: features + labels -> scores. The one rule for all encoders, and the only code that touches splits.

Fit on training episodes, choose lambda on validation episodes *of train*, refit on all of train, look at test
once. Every number is a row: a target dimension, a readout, a split. Nothing is pooled but the mean of a group.

Legend: N pairs, D feature dimensions, K = 7 target dimensions, E test episodes, R resamples.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from avrl import labels
from avrl.errors import ConfigError
from avrl.outcome import Split, Test, rank
from avrl.probes.ridge import Ridge
from avrl.ridge import choose_alpha

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import polars as pl

log = logging.getLogger(__name__)

VALIDATION_SHARE = 0.2  # of the training episodes
LARGEST = 8192  # dimensions of a readout; beyond, and with more pairs than that, an eigendecomposition takes hours
PROTOCOL = 2  # bump when numbers of the same samples would change


@dataclass(frozen=True)
class Who:
    """Whose features are scored: the columns that name a row."""

    encoder: str
    checkpoint: str
    init: str


@dataclass(frozen=True)
class Task:
    """What is predicted, and how it is scored.

    Attributes:
        gap: Frames between the two of a pair.
        target: One of `avrl.labels.TARGETS`.
        readouts: Which to score; empty for all.
        seed: Of the validation episodes and the bootstrap.
        resamples: Of the bootstrap over test episodes.
        data_digests: Digests of labels and frames, for the fingerprint: a floor of other pixels is another floor.
    """

    gap: int
    target: str
    readouts: tuple[str, ...]
    seed: int
    resamples: int
    data_digests: tuple[str, str]


def split(rows: pl.DataFrame, episodes: pl.DataFrame, seed: int) -> Split:
    """By episode, as the source publishes it: ``train`` and ``val``. A fifth of train chooses lambda."""
    index = episodes["episode_index"].to_numpy()
    is_train = (episodes["split"] == "train").to_numpy()
    tasks = episodes["task"].to_numpy()
    seen_task = set(tasks[is_train])
    train = np.sort(index[is_train])
    shuffled = np.random.default_rng(seed).permutation(train)
    chosen = set(shuffled[: max(1, round(VALIDATION_SHARE * len(train)))].tolist())
    row_episode = rows["episode_index"].to_numpy()
    in_train = np.isin(row_episode, train)
    validate = np.isin(row_episode, sorted(chosen))
    seen = np.isin(row_episode, index[[task in seen_task for task in tasks]])
    return Split(in_train & ~validate, validate, ~in_train, seen, row_episode)


def score(
    out: Path, who: Who, task: Task, labels_root: Path, frames_root: Path, features_root: Path | None
) -> dict[str, Any]:
    """Write ``scores.parquet`` and ``episodes.parquet`` (per-episode sums, for paired differences later).

    Args:
        out: Directory to write into.
        who: Names of the encoder.
        task: What is predicted, and how it is scored.
        labels_root: Root of the ``labels`` artifact.
        frames_root: Root of the frame store, for splits and tasks.
        features_root: Root of the ``features`` artifact; None for the floors ``mean`` and ``state``.

    Returns:
        Facts for the manifest.

    Raises:
        ConfigError: no pair is left to fit, to choose lambda or to test on.
    """
    import polars as pl

    episodes = pl.read_parquet(frames_root / "episodes.parquet")
    rows, y_NK, state_NK = labels.pairs(pl.read_parquet(labels_root / "labels.parquet"), task.gap, task.target)
    parts = split(rows, episodes, task.seed)
    if not all(mask.any() for mask in (parts.fit_N, parts.validate_N, parts.test_N)):
        raise ConfigError(
            f"{frames_root}: two training episodes and a held-out one with frames {task.gap} apart are needed",
            "try a smaller --gap, or prep a copy with train and val",
        )
    shared = {
        "probe": "bridge",
        **asdict(who),
        "gap": task.gap,
        "gap_s": task.gap / float(episodes["fps"][0]),
        "target": task.target,
        "fingerprint": fingerprint(rows, parts, task),
    }
    scores: list[dict[str, Any]] = []
    sums: list[pl.DataFrame] = []
    for readout, pairing, z_ND in _inputs(who.encoder, state_NK, rows, features_root, task):
        named = {**shared, "readout": readout, "pairing": pairing, "dims": z_ND.shape[1]}
        predicted, alpha = _fit(z_ND, y_NK, parts)
        test = Test(y_NK[parts.test_N], predicted, parts, task.resamples, task.seed)
        scores += [{**named, **row} for row in test.rows(alpha)]
        scores.append({**named, **rank(z_ND[parts.test_N], test)})
        sums.append(test.sums(named))
    pl.DataFrame(scores, infer_schema_length=None).write_parquet(out / "scores.parquet")
    pl.concat(sums).write_parquet(out / "episodes.parquet")
    counts = {name: scores[0][name] for name in ("n_train", "n_test", "episodes_train", "episodes_test")}
    return {**counts, **shared}


def fingerprint(rows: pl.DataFrame, parts: Split, task: Task) -> str:
    """12 hex digits of the protocol: rows of tables may stand together only where these agree."""
    samples = hashlib.sha256(rows.to_numpy().tobytes())
    for mask in (parts.fit_N, parts.validate_N, parts.test_N):
        samples.update(mask.tobytes())
    asked = [PROTOCOL, task.data_digests, samples.hexdigest(), task.gap, task.target, task.seed, "ridge"]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]


def _inputs(
    encoder: str,
    state_NK: np.ndarray,
    rows: pl.DataFrame,
    features_root: Path | None,
    task: Task,
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(readout, pairing, vectors (N, D) of the pairs). Image encoders give two: concatenation and difference."""
    from avrl import features

    if features_root is None:
        yield encoder, "none", state_NK if encoder == "state" else np.zeros((len(state_NK), 1))
        return
    facts = json.loads((features_root / "manifest.json").read_bytes())["facts"]
    first = features.places(features_root, rows)
    for readout in task.readouts or facts["readouts"]:
        if readout not in facts["readouts"]:
            log.warning("%s has no readout %s; it has %s", encoder, readout, ", ".join(facts["readouts"]))
            continue
        if 2 * facts["readouts"][readout] > LARGEST and len(rows) > LARGEST:
            log.warning("readout %s of %s is too wide for a closed form and is left out", readout, encoder)
            continue
        z_ND = features.read(features_root, readout)
        # Concatenation keeps where things are (state, gripper), the difference keeps what moved: two rows, not one.
        # For an encoder of pairs the same two are f(t, t+gap) and its antisymmetric part f(t, t+gap) - f(t+gap, t).
        if facts["paired"]:
            yield readout, "pair", z_ND[first]
            swapped = features.read(features_root, readout + features.SWAPPED)
            if not np.allclose(swapped, -z_ND, atol=1e-6):  # a pixel difference is antisymmetric as it stands
                yield readout, "antisymmetric", z_ND[first] - swapped[first]
            continue
        yield readout, "concat", np.concatenate([z_ND[first], z_ND[first + task.gap]], 1)
        yield readout, "diff", z_ND[first + task.gap] - z_ND[first]


def _fit(z_ND: np.ndarray, y_NK: np.ndarray, parts: Split) -> tuple[np.ndarray, np.ndarray]:
    """Predictions for the test pairs and the alpha chosen for each dimension; test targets are not looked at."""
    z, y = torch.from_numpy(z_ND), torch.from_numpy(y_NK)
    fit, validate, test = (torch.from_numpy(mask) for mask in (parts.fit_N, parts.validate_N, parts.test_N))
    alpha = choose_alpha(z[fit], y[fit], z[validate], y[validate])
    train = fit | validate
    predicted = Ridge(alpha).fit(z[train], y[train]).predict(z[test])
    return predicted.numpy(), alpha.numpy()

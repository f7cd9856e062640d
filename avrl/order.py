"""Temporal order: a linear head tells whether two frames are shown as they happened, or swapped.

Every pair is shown in both orders, so that half of what is shown is swapped, exactly, in every episode, fold and split.
The head is ridge on the vectors in the order shown; an encoder of pairs has seen that order itself: f(a, b) or f(b, a).
By that balance the best linear head on a concatenation is w . (b - a): it can know of order only what adds up from
frame to frame, such as a hand that comes into view late, and its two pairings differ in their standardising alone.
Pairs in which nothing changes have no order: they are left out by one rule for all encoders (`avrl.stillness`).

Controls: pairs of one frame twice, of which nothing can be known (an encoder of pairs is given the mean of f(a, b) and
f(b, a), which is the same either way round), and labels shuffled in training.

Legend: N pairs, 2N shown ones (row 2n as it happened, 2n+1 swapped), D feature dimensions, M a part of them.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from avrl import probing, splits
from avrl.correctness import share
from avrl.errors import ConfigError
from avrl.features import SWAPPED, pairs_of
from avrl.labels import Target
from avrl.outcome import WHOLE, Test
from avrl.probes import WIDE
from avrl.probes.ridge import fits
from avrl.splits import ALL
from avrl.stillness import STILL, changes
from avrl.store import FrameStore
from avrl.vectors import Vectors, offers, places

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import polars as pl

    from avrl.probes import Given, Task, Who
    from avrl.splits import Split

log = logging.getLogger(__name__)

WANTED = 0.9  # accuracy that the plan asks for
PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
ORDER, SAME, SHUFFLED = "order", "same frame", "shuffled labels"
REVERSIBLE = "reversible"
SHUFFLES = 100


@dataclass(frozen=True)
class Shown:
    """Pairs in both orders, as vectors: see `avrl.probes.Inputs`.

    Attributes:
        root: Of the features.
        readout: One of them.
        pairing: ``concat``, ``diff`` or ``pair``.
        place_N2: Where the pairs lie, from `avrl.vectors.places`.
        same: Show frame t twice instead.
    """

    root: Path
    readout: str
    pairing: str
    place_N2: np.ndarray
    same: bool = False

    def _read(self, readout: str) -> Vectors:
        return Vectors(self.root, readout, self.pairing, self.place_N2)

    @property
    def dims(self) -> int:
        """D."""
        return self._read(self.readout).dims

    def blocks(self, index_M: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See `avrl.probes.Inputs`; by numbers of shown pairs."""
        pairs = np.unique(index_M // 2)
        twins = self._read(self.readout + SWAPPED).blocks(pairs) if self.pairing == "pair" else None
        for number, z in self._read(self.readout).blocks(pairs):
            one, other = self._orders(z, next(twins)[1] if twins else None)
            shown = np.stack([one, other], 1).reshape(-1, z.shape[1])
            index = (2 * number[:, None] + [0, 1]).ravel()
            asked = np.isin(index, index_M)
            yield index[asked], shown[asked]

    def _orders(self, z: np.ndarray, swapped: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The vectors as it happened and swapped, or twice the same."""
        half = z.shape[1] // 2
        if swapped is not None:
            return ((z + swapped) / 2,) * 2 if self.same else (z, swapped)
        if self.pairing == "diff":
            return (0 * z, 0 * z) if self.same else (z, -z)
        return (np.tile(z[:, :half], 2),) * 2 if self.same else (z, np.roll(z, half, 1))


def score(out: Path, who: Who, task: Task, given: Given) -> dict[str, Any]:
    """Write ``scores.parquet`` and ``episodes.parquet``, as `avrl.probing.score` does, and the verdict in each row.

    Args:
        out: Directory to write into.
        who: Names of the encoder.
        task: How it is scored.
        given: Frames, features and, if at hand, raw data, which may say which tasks are reversible.

    Returns:
        Facts for the manifest.

    Raises:
        ConfigError: too few pairs move, or the encoder has none of the readouts.
    """
    import polars as pl

    store, root = FrameStore(given.frames), cast("Path", given.features)
    pairs = pairs_of("order", store.episodes, task.gap, task.seed)
    moves_N = changes(store, pairs, task.gap) >= STILL
    static, pairs = float(1 - moves_N.mean()), pairs.filter(moves_N)
    target = _target(pairs)
    parts = splits.split(target.rows, store.episodes, task.seed)
    if not all(mask.any() for mask in (parts.fit_N, parts.validate_N, parts.test_N)):
        raise ConfigError(
            f"{given.frames}: too few pairs of frames {task.gap} apart move, {static:.0%} are static",
            "try a larger --gap, or prep more episodes, of training and held out",
        )
    reversible = _reversible(given, store.episodes)
    known = "" if reversible else "; which tasks are reversible is not known"
    shared = {
        **{"probe": task.probe, **asdict(who), "gap": task.gap, "gap_s": task.gap / float(store.episodes["fps"][0])},
        **{"target": "", "solver": "ridge", "fingerprint": probing.fingerprint(target.rows, parts, task)},
        "note": f"{static:.1%} of pairs are static (luma changes by less than {STILL} of 255) and left out{known}",
    }
    scores: list[dict[str, Any]] = []
    sums: list[pl.DataFrame] = []
    place_N2 = places(root, pairs, task.gap)
    found, left_out = offers(root, task.readouts, ("pair",), len(target.rows), but=WIDE)
    for name, why in left_out.items():
        log.warning("%s: readout %s is left out: %s", who.encoder, name, why)
    for readout, pairing in found:
        shown = Shown(root, readout, pairing, place_N2)
        named = {**shared, "readout": readout, "pairing": pairing, "dims": shown.dims}
        rows, whole = _judge(shown, target, parts, (store.episodes, reversible), task)
        scores += [{**row, **named, "verdict": verdict(row)} for row in rows]
        sums.append(whole.sums({name: value for name, value in named.items() if name != "note"}))
    if not scores:
        raise ConfigError(f"{who.encoder} has none of the readouts asked for", "leave out --readout")
    pl.DataFrame(scores, infer_schema_length=None).write_parquet(out / "scores.parquet")
    pl.concat(sums).write_parquet(out / "episodes.parquet")
    counts = {name: scores[0][name] for name in ("n_train", "n_test", "episodes_train", "episodes_test")}
    told = sum(reversible.values()) if reversible else "not known"
    facts = {"static": round(static, 4), "still_below": STILL, "reversible_tasks": told, "left_out": left_out}
    return {**counts, **shared, **facts}


def verdict(row: dict[str, Any]) -> str:
    """What an accuracy says of `WANTED`: decided only where the whole interval lies on one side."""
    if row["metric"] != "accuracy" or row["dimension"] != ORDER or row["train"] != ALL or row["low"] is None:
        return ""
    return PASS if row["low"] >= WANTED else FAIL if row["high"] < WANTED else UNDECIDED


def _target(pairs: pl.DataFrame) -> Target:
    """Every pair twice, 1 as it happened and 0 swapped (ridge is the same for 1 and -1)."""
    twice = pairs[np.repeat(np.arange(len(pairs)), 2)]
    y_NK, nothing = np.tile([1.0, 0.0], len(pairs))[:, None], np.zeros((2 * len(pairs), 0))
    return Target(twice, y_NK, nothing, nothing, {ORDER: (ORDER,)}, (ORDER,))


def _judge(
    shown: Shown, target: Target, parts: Split, of_tasks: tuple[pl.DataFrame, dict[str, bool]], task: Task
) -> tuple[list[dict[str, Any]], Test]:
    """All rows of one readout, and the test of what was trained on everything."""
    episodes, reversible = of_tasks
    draws, rows = (task.resamples, task.seed), []
    fitted = list(fits(shown, target.y_NK, parts, episodes, task.seed))
    tried, _ = probing.predictions(shown, parts, fitted)
    tests = {name: one.test(target, parts, draws) for name, one in tried.items()}
    for name, one in tried.items():
        rows += _rows(tests[name], np.exp(np.mean(np.log(one.alphas), 0)), name, ORDER)
    whole = tests[ALL]
    kinds = dict(episodes.select("episode_index", "task").iter_rows())
    for back, dimension in ((True, "reversible tasks"), (False, "other tasks")):
        there = [index for index, name in kinds.items() if reversible.get(name) is back]
        chosen_M = np.isin(parts.episode_N[parts.test_N], there)
        if chosen_M.any():
            tested = np.flatnonzero(parts.test_N)[chosen_M]
            part = Test(target, parts, tested, tried[ALL].predicted_MK[chosen_M], whole.trained, draws)
            rows += [one for one in _rows(part, tried[ALL].alphas[0], ALL, dimension) if one["split"] == WHOLE]
    return [*rows, *_controls(shown, target, parts, episodes, task, whole.counts())], whole


def _controls(
    shown: Shown, target: Target, parts: Split, episodes: pl.DataFrame, task: Task, counts: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """Accuracy of what should be a coin, by the same way."""
    shared = {"group": "control", "metric": "accuracy", "train": ALL, "split": WHOLE, "alpha": None, **counts}
    for control, inputs, y_NK in (
        (SAME, replace(shown, same=True), target.y_NK),
        (SHUFFLED, shown, _shuffled(target.y_NK, task.seed)),
    ):
        fit = next(one for one in fits(inputs, y_NK, parts, episodes, task.seed) if one[0].train == ALL)
        predicted_MK = probing.predictions(inputs, parts, [fit])[0][ALL].predicted_MK
        right_M = ((predicted_MK > 0.5) == (target.y_NK[parts.test_N] > 0.5)).mean(1)
        yield {
            **shared,
            "dimension": control,
            **share(right_M, parts.episode_N[parts.test_N], task.resamples, task.seed),
        }


def _rows(test: Test, alpha_K: np.ndarray, train: str, dimension: str) -> list[dict[str, Any]]:
    """Accuracy and AUC; R2 of a label says nothing more."""
    every = test.rows(alpha_K, train, apart=train == ALL)
    return [{**row, "dimension": dimension} for row in every if row["metric"] in ("accuracy", "auc")]


def _shuffled(y_NK: np.ndarray, seed: int) -> np.ndarray:
    """Labels swapped within pairs at random, as balanced as the true ones, `SHUFFLES` times: (2N, SHUFFLES).

    Once would not do: where pairs differ in one direction only, a head fitted on noise has it wholly right or wrong.
    """
    swap_NK = np.random.default_rng([seed, 3]).random((len(y_NK) // 2, SHUFFLES)) < 0.5
    return np.where(np.repeat(swap_NK, 2, 0), 1 - y_NK, y_NK)


def _reversible(given: Given, episodes: pl.DataFrame) -> dict[str, bool]:
    """Task -> whether EgoDex lists it as one that is done and undone, told by its first episode; empty if unknown."""
    if given.raw is None:
        return {}
    source = json.loads((given.frames / "manifest.json").read_bytes())["facts"]["source"]
    if source != "egodex":
        return {}
    from avrl.sources import egodex

    kinds = {
        row["task"]: egodex.kind_of_task(given.raw, row)
        for row in episodes.unique("task", keep="first", maintain_order=True).iter_rows(named=True)
    }
    return {task: kind == REVERSIBLE for task, kind in kinds.items() if kind}

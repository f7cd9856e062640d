"""The probe beside its peers: scikit-learn's RidgeCV, and the probe of 20 epochs of Adam that does not converge.

    python -m tests.benchmarks.probe speed               # time and memory, each in a process of its own: minutes
    python -m tests.benchmarks.probe speed --pairs 180000 --dims 1536 --only 'avrl, one ridge'   # the goal: 60 s
    python -m tests.benchmarks.probe order --cache DIR   # on the demo's features: who stands above whom

`speed`: features with columns of many sizes lie on disk as a `features` artifact has them; seven targets are linear in
them with as much noise. `order`: the Adam probe is the one that a public attempt used: one linear layer, Adam, lr 1e-3,
batch 256, 20 epochs, features and targets as they are, and the best epoch taken by its score on *test*.

Legend: N pairs, D feature dimensions, K target dimensions.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import zarr

from avrl import labels, splits
from avrl.cache import Cache
from avrl.features import BLOCK
from avrl.probes.ridge import fits
from avrl.probing import predictions
from avrl.ridge import ALPHAS
from avrl.splits import ALL
from avrl.vectors import Vectors, places

EPOCHS, BATCH, LR = 20, 256, 1e-3
LENGTH, TASKS, K = 60, 37, 7  # 37: no divisor of the 10 of which one tests, or tasks that test would not be trained on
READOUTS = {"cls": "pair", "pool": "diff", "difference": "pair"}  # one row an encoder


def adam(z_ND: np.ndarray, y_NK: np.ndarray, z_test: np.ndarray, y_test: np.ndarray) -> np.ndarray:
    """R2 (K,) of the epoch that is best on test."""
    torch.manual_seed(0)
    layer, best = torch.nn.Linear(z_ND.shape[1], y_NK.shape[1]), np.full(y_NK.shape[1], -np.inf)
    optimizer = torch.optim.Adam(layer.parameters(), lr=LR)
    z, y = torch.from_numpy(z_ND).float(), torch.from_numpy(y_NK).float()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(z)).split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(layer(z[index]), y[index]).backward()
            optimizer.step()
        with torch.no_grad():
            score = r2(layer(torch.from_numpy(z_test).float()).numpy(), y_test)
        best = score if score.mean() > best.mean() else best
    return best


def r2(predicted_NK: np.ndarray, y_NK: np.ndarray) -> np.ndarray:
    """Coefficient of determination (K,)."""
    error: np.ndarray = ((predicted_NK - y_NK) ** 2).sum(0) / ((y_NK - y_NK.mean(0)) ** 2).sum(0)
    return 1 - error


def make(root: Path, n: int, d: int) -> None:
    """Features, targets and episodes of a made problem."""
    rng = np.random.default_rng(0)
    scale_D = rng.lognormal(0, 1, d).astype(np.float32)  # DINOv2's and SigLIP's columns differ as much
    weight_DK = rng.normal(size=(d, K)) / np.sqrt(d)
    array = zarr.open_group(str(root / "features.zarr"), mode="w").create_array(
        "cls", shape=(n, d), chunks=(BLOCK, d), dtype="float32"
    )
    y_NK = np.empty((n, K))
    for at in range(0, n, BLOCK):
        x = rng.normal(size=(min(BLOCK, n - at), d)).astype(np.float32)
        array[at : at + len(x)] = x * scale_D + 3 * scale_D
        y_NK[at : at + len(x)] = 1e-3 * (x @ weight_DK + rng.normal(size=(len(x), K)))
    np.save(root / "y.npy", y_NK)
    episode = np.arange(-(-n // LENGTH))
    called = np.where(episode % 10 == 0, "val", "train")
    table = {"episode_index": episode, "task": [f"task {i % TASKS}" for i in episode], "split": called}
    pl.DataFrame(table).write_parquet(root / "episodes.parquet")


def problem(root: Path) -> tuple[Vectors, np.ndarray, splits.Split, pl.DataFrame]:
    """What `make` has made, unread."""
    y_NK, episodes = np.load(root / "y.npy"), pl.read_parquet(root / "episodes.parquet")
    rows = pl.DataFrame({"episode_index": np.arange(len(y_NK)) // LENGTH})
    vectors = Vectors(root, "cls", "pair", np.arange(len(y_NK))[:, None])
    return vectors, y_NK, splits.split(rows, episodes, 0), episodes


def ours(root: Path, *, whole: bool) -> np.ndarray:
    """The ridge of all of train alone, or with new tasks and few examples too."""
    vectors, y_NK, parts, episodes = problem(root)
    if not whole:
        episodes = episodes.with_columns(task=pl.lit("one"))  # a single task cannot be left out
    fitted = list(fits(vectors, y_NK, parts, episodes, 0)) if whole else [next(fits(vectors, y_NK, parts, episodes, 0))]
    tried, _ = predictions(vectors, parts, fitted)
    return r2(tried[ALL].predicted_MK, y_NK[parts.test_N])


def in_memory(root: Path) -> tuple[np.ndarray, ...]:
    """Training and test rows, read whole."""
    _, y_NK, parts, _ = problem(root)
    z = np.asarray(zarr.open_array(str(root / "features.zarr/cls"), mode="r")[:])
    return z[parts.train_N], y_NK[parts.train_N], z[parts.test_N], y_NK[parts.test_N]


def scikit(root: Path) -> np.ndarray:
    """StandardScaler and RidgeCV with the same strengths, chosen by leave-one-out for each target."""
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    z, y, z_test, y_test = in_memory(root)
    scaler = StandardScaler(copy=False).fit(z)
    model = RidgeCV(np.array(ALPHAS) * len(z), alpha_per_target=True).fit(scaler.transform(z), y)
    return r2(model.predict(scaler.transform(z_test)), y_test)


CONTENDERS = {
    "avrl, one ridge": lambda root: ours(root, whole=False),
    "avrl, new tasks and few examples too": lambda root: ours(root, whole=True),
    "scikit-learn RidgeCV": scikit,
    "20 epochs of Adam": lambda root: adam(*in_memory(root)),
}


def contend(name: str, root: Path, pipe: Any) -> None:
    """One contender in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    score = CONTENDERS[name](root)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send((time.monotonic() - begun, (peak - before) / 2**10, float(score.mean())))


def speed(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.pairs, options.dims)
        print(f"{options.pairs} pairs x {options.dims}, {torch.get_num_threads()} threads; highest possible R2 is .5")
        print("| probe | seconds | MiB more than before | R2 |\n|---|---|---|---|")
        for name in options.only or CONTENDERS:
            here, there = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(target=contend, args=(name, Path(folder), there))
            process.start()
            there.close()
            try:
                seconds, memory, score = here.recv()
                print(f"| {name} | {seconds:.1f} | {memory:,.0f} | {score:.3f} |", flush=True)
            except EOFError:
                print(f"| {name} | died | | |", flush=True)
            process.join()


def order(options: argparse.Namespace) -> None:
    cache = Cache(options.cache)
    store, table = (next(iter(cache.artifacts(noun))) for noun in ("frames", "labels"))
    store = next(one for one in cache.artifacts("frames") if one.manifest.facts["source"] == "bridge")
    target = labels.pairs(pl.read_parquet(table.root / "labels.parquet"), 1, "reached")
    episodes = pl.read_parquet(store.root / "episodes.parquet")
    parts = splits.split(target.rows, episodes, 0)
    y_NK, at = target.y_NK[:, :3], np.flatnonzero(parts.test_N)
    print("| features | ridge: position R2 | 20 epochs of Adam, best epoch on test |\n|---|---|---|")
    for one in sorted(cache.artifacts("features"), key=lambda one: one.ref):
        place_N2 = places(one.root, target.rows, 1)
        for readout in one.manifest.facts["readouts"]:
            pairing = READOUTS.get(readout)
            if not pairing or (one.manifest.facts["paired"] and pairing == "diff"):
                continue
            vectors = Vectors(one.root, readout, pairing, place_N2)
            fitted = [next(fits(vectors, y_NK, parts, episodes, 0))]
            tried, _ = predictions(vectors, parts, fitted)
            z_train, z_test = (
                np.concatenate([z for _, z in vectors.blocks(np.flatnonzero(mask))])
                for mask in (parts.train_N, parts.test_N)
            )
            other = adam(z_train, y_NK[parts.train_N], z_test, y_NK[at])
            name = f"{one.manifest.config['encoder']} ({one.manifest.config['init']}), {readout}"
            print(f"| {name} | {r2(tried[ALL].predicted_MK, y_NK[at]).mean():.3f} | {other.mean():.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    racing = verbs.add_parser("speed")
    racing.add_argument("--pairs", type=int, default=60_000)
    racing.add_argument("--dims", type=int, default=768)
    racing.add_argument("--only", nargs="*", choices=list(CONTENDERS))
    racing.set_defaults(call=speed)
    ordering = verbs.add_parser("order")
    ordering.add_argument("--cache", type=Path, required=True)
    ordering.set_defaults(call=order)
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()

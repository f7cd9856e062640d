"""What learns: wirings, objectives, gaps and ablations trained alike on simulator video and judged on unseen tasks.

    python tests/benchmarks/extra_scenes.py --out DIR           # 22 tasks to train on, 15 others to judge on
    python -m tests.benchmarks.learning run --frames A --probe B --labels C --out DIR [--seeds 0 1 2] [WIRING ...]
    python -m tests.benchmarks.learning table --out DIR

A, B and C are artifacts of `avrl prep` and `avrl probe bridge` (--image-size 112). One run a core, one thread each; a
run that is there already is not made again. The judge: ridge on frozen features, the end effector's displacement over
one step (.2 s), trained on twelve tasks and tested on the other three, five times, so each of the 15 tasks is unseen
once; intervals by bootstrap over episodes, of the mean over seeds. Every trained row stands beside its untrained twin.

Legend: N pairs, D feature dimensions, E episodes, K=3 (x, y, z), S seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch

from avrl import encoders, labels
from avrl.meters import meters
from avrl.objectives import modules
from avrl.pairs import Pairs, Sampling, parted
from avrl.ridge import Path as RidgePath
from avrl.ridge import choose_alpha
from avrl.store import FrameStore
from avrl.training import BETAS, CLIP, _groups, learning_rate
from tests.benchmarks.wirings import WIRINGS, Wiring, build

if TYPE_CHECKING:
    from avrl.encoders import Encoder
    from avrl.objectives import Objective

SIZE, IMAGE_SIZE = "tiny", 112
STEPS, BATCH, LR, WARMUP, WEIGHT_DECAY = 750, 8, 3e-4, 50, 0.05
FOLDS, VALIDATION, RESAMPLES = 5, 0.2, 2000
STORE: Resident  # what `run` loads before it forks
JUDGE: Judge
OUT: Path
EVERY = 2  # of the pairs: neighbours say the same
FLOORS = ("pixels-8", "pixels-16", "efficientnet-lite0")
WORDS = ("readout", "pairing")
HEAD = ("wiring", "seeds", "skill", "rank of cls, patches")
COLUMNS = ("R2 (each seed)", "minus twin", "minus pixel floor")


class Resident:
    """All frames of a store in memory, so that runs differ by what they learn and not by what they read."""

    threads = 1

    def __init__(self, root: Path) -> None:
        store = FrameStore(root)
        self.episodes = store.episodes
        first = self.episodes["dataset_from_index"].to_numpy()
        rows_N = np.concatenate([np.arange(n) + at for at, n in zip(first, self.episodes["length"], strict=True)])
        self.place = np.zeros(rows_N.max() + 1, np.int64)  # shards end with rows that hold no frame
        self.place[rows_N] = np.arange(len(rows_N))
        self.frames = store.read(rows_N)

    def read(self, rows_N: np.ndarray, *, threads: int = 1) -> np.ndarray:
        """As `FrameStore.read`."""
        return self.frames[self.place[rows_N]]


class Judge:
    """Frozen features -> out-of-fold errors of the displacement, by episode.

    Args:
        probe: The frame store of other tasks.
        table: Its ``labels.parquet``.
    """

    def __init__(self, probe: Path, table: Path) -> None:
        store = Resident(probe)
        target = labels.pairs(pl.read_parquet(table), 1, "reached")
        rows, y_NK, self.state_NK = target.rows, target.y_NK, target.state_NS
        take = (rows["frame_index"] % EVERY == 1).to_numpy()
        rows, self.y_NK, self.state_NK = rows.filter(take), y_NK[take, :3], self.state_NK[take]
        first = dict(store.episodes.select("episode_index", "dataset_from_index").iter_rows())
        task = dict(store.episodes.select("episode_index", "task").iter_rows())
        self.episode_N = rows["episode_index"].to_numpy()
        tasks = sorted(set(task.values()))
        self.fold_N = np.array([tasks.index(task[one]) % FOLDS for one in self.episode_N])
        at_N = np.array([first[one] for one in self.episode_N]) + rows["frame_index"].to_numpy()
        self.pairs_NTHWC = store.read(np.stack([at_N, at_N + 1], 1).ravel())
        self.pairs_NTHWC = self.pairs_NTHWC.reshape(len(at_N), 2, *self.pairs_NTHWC.shape[1:])

    def features(self, encoder: Encoder) -> dict[tuple[str, str], np.ndarray]:
        """(readout, pairing) -> (N, D), as `avrl.probing` has them."""
        found: dict[tuple[str, str], list[np.ndarray]] = {}
        for at in range(0, len(self.pairs_NTHWC), 64):
            pair = torch.from_numpy(self.pairs_NTHWC[at : at + 64])
            if encoder.paired:
                ahead, back = encoder.encode(pair), encoder.encode(pair.flip(1))
                made = {(name, "pair"): z for name, z in ahead.items() if name != "grid"}  # the slowest to solve
                made |= {(name, "antisymmetric"): z - back[name] for name, z in ahead.items()}
            else:
                one, two = encoder.encode(pair[:, :1]), encoder.encode(pair[:, 1:])
                made = {(name, "diff"): two[name] - z for name, z in one.items()}
                made |= {(name, "concat"): torch.cat([z, two[name]], 1) for name, z in one.items()}
            for key, z_BD in made.items():
                found.setdefault(key, []).append(z_BD.numpy())
        return {key: np.concatenate(parts) for key, parts in found.items()}

    def errors(self, z_ND: np.ndarray) -> np.ndarray:
        """Squared errors (N, K), each pair predicted by a ridge that never saw its task."""
        z, y, squared = torch.from_numpy(z_ND), torch.from_numpy(self.y_NK), np.empty_like(self.y_NK)
        for fold in range(FOLDS):
            test = self.fold_N == fold
            known = np.unique(self.episode_N[~test])
            chosen = np.random.default_rng(fold).permutation(known)[: round(VALIDATION * len(known))]
            validate = np.isin(self.episode_N, chosen) & ~test
            fit, aside, train = (torch.from_numpy(mask) for mask in (~test & ~validate, validate, ~test))
            alpha = choose_alpha(z[fit], y[fit], z[aside], y[aside])
            fit_all = RidgePath(z[train], y[train]).fit(alpha)
            squared[test] = (fit_all.predict(z[torch.from_numpy(test)]).numpy() - self.y_NK[test]) ** 2
        return squared

    def table(self, features: dict[tuple[str, str], np.ndarray]) -> pl.DataFrame:
        """Sums of squared errors: a row an episode, readout, pairing and dimension."""
        parts = []
        for (readout, pairing), z_ND in features.items():
            named = {"readout": pl.lit(readout), "pairing": pl.lit(pairing), "dims": pl.lit(z_ND.shape[1])}
            sums = pl.DataFrame({"episode": self.episode_N, **dict(zip("xyz", self.errors(z_ND).T, strict=True))})
            parts.append(sums.group_by("episode").sum().sort("episode").with_columns(**named))
        return pl.concat(parts)

    def spread(self) -> pl.DataFrame:
        """What an error is measured against: squared distance from the mean, a row an episode."""
        squared = (self.y_NK - self.y_NK.mean(0)) ** 2
        sums = pl.DataFrame({"episode": self.episode_N, **dict(zip("xyz", squared.T, strict=True))})
        return sums.group_by("episode").sum().sort("episode")


def trained(objective: Objective, wiring: Wiring, store: Resident, seed: int) -> dict[str, Any]:
    """Train with the same number of samples as every other; returns what is known of the run."""
    frames = int(dict(wiring.network).get("num_frames", 2))  # type: ignore[call-overload]
    sampling = Sampling(seed, wiring.max_gap, wiring.sample_decay, 100, gaps=wiring.gaps, num_frames=frames)
    pairs = Pairs(store, sampling, BATCH)  # type: ignore[arg-type]
    model = modules(objective)
    optimizer = torch.optim.AdamW(_groups(objective, WEIGHT_DECAY), lr=LR, betas=BETAS)
    begun, errors = time.process_time(), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, WARMUP, LR)
        batch = pairs.batch(step)
        losses = model(batch.frames_BTHWC, batch.gap_B, batch.seed_B)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        errors.append((float(losses["error"]), float(losses["reference"])))
    error, reference = np.sum(errors[-STEPS // 10 :], 0)
    return {"skill": float(1 - error / reference), "cpu_seconds": time.process_time() - begun}


def looked_at(objective: Objective, store: Resident) -> dict[str, float]:
    """Collapse meters on pairs of episodes that training never draws."""
    pairs = Pairs(store, Sampling(0, 10, 1.0, 100), 128, parted(store.episodes)[1])  # type: ignore[arg-type]
    encoder, frames_BTHWC = objective.encoder(), pairs.batch(0).frames_BTHWC
    patches = encoder.patches(frames_BTHWC)
    return meters(encoder.encode(frames_BTHWC)["cls"], patches.flatten(0, 2))


def job(order: tuple[str, int, bool]) -> str:
    """One run: train, judge, write; a row of an untrained network is only judged."""
    name, seed, train = order
    torch.set_num_threads(1)
    wiring = WIRINGS[name]
    objective = build(wiring, SIZE, IMAGE_SIZE, seed)
    facts: dict[str, Any] = {"wiring": name, "seed": seed, "trained": train}
    if train:
        facts |= trained(objective, wiring, STORE, seed)
    modules(objective).eval()
    facts |= looked_at(objective, STORE)
    write(facts, JUDGE.table(JUDGE.features(objective.encoder())))
    return f"{name}, seed {seed}, {'trained' if train else 'untrained'}: " + json.dumps(facts)


def write(facts: dict[str, Any], table: pl.DataFrame) -> None:
    """A run as ``NAME.parquet`` and, last, ``NAME.json``."""
    name = stem(facts["wiring"], facts["seed"], facts["trained"])
    table.write_parquet(OUT / f"{name}.parquet")
    (OUT / f"{name}.json.tmp").write_text(json.dumps(facts))
    (OUT / f"{name}.json.tmp").rename(OUT / f"{name}.json")


def stem(name: str, seed: int, train: bool) -> str:
    """File name of a run."""
    return f"{'-'.join(name.replace('%', '').replace(',', '').split())}-{seed}-{'trained' if train else 'untrained'}"


def twin(name: str) -> str:
    """The first wiring with the same network, whose untrained weights are the same."""
    wiring = WIRINGS[name]
    key = (tuple(one for one in wiring.network if one[0] != "decoder"), wiring.luma)
    return next(
        one
        for one, other in WIRINGS.items()
        if (tuple(field for field in other.network if field[0] != "decoder"), other.luma) == key
    )


def load(frames: Path, probe: Path, table: Path, out: Path) -> None:
    """Read what all runs of a process share."""
    global STORE, JUDGE, OUT
    torch.set_num_threads(1)
    STORE, JUDGE, OUT = Resident(frames), Judge(probe, table), out


def run(options: argparse.Namespace) -> None:
    """All runs that are not there yet, one a core."""
    options.out.mkdir(parents=True, exist_ok=True)
    given = (options.frames, options.probe, options.labels, options.out)
    load(*given)
    if not (OUT / "spread.parquet").exists():
        judged = len(np.unique(JUDGE.episode_N))
        print(f"{len(STORE.episodes)} episodes to train on; {len(JUDGE.y_NK)} pairs of {judged} to judge on")
        for name in FLOORS:
            write({"wiring": name, "seed": 0, "trained": False}, JUDGE.table(JUDGE.features(encoders.load(name))))
        state = {("state", "none"): JUDGE.state_NK}
        write({"wiring": "state", "seed": 0, "trained": False}, JUDGE.table(state))
        JUDGE.spread().write_parquet(OUT / "spread.parquet")
    names = options.wirings or list(WIRINGS)
    orders = [(one, seed, True) for seed in options.seeds for one in names]
    orders += [(one, seed, False) for seed in options.seeds for one in dict.fromkeys(map(twin, names))]
    orders = [one for one in orders if not (OUT / f"{stem(*one)}.json").exists()]
    with multiprocessing.get_context("spawn").Pool(options.processes, load, given) as pool:  # polars dies of forks
        for words in pool.imap_unordered(job, orders, chunksize=1):
            print(words, flush=True)


class Results:
    """All runs of a folder, and R2 with its interval of any mean over seeds, or difference of two."""

    def __init__(self, out: Path) -> None:
        spread = pl.read_parquet(out / "spread.parquet").sort("episode")
        self.spread_EK = spread.select("x", "y", "z").to_numpy()
        e = len(self.spread_EK)
        drawn = np.random.default_rng(0).integers(e, size=(RESAMPLES, e))
        self.weights = np.vstack([np.ones(e), *(np.bincount(one, minlength=e)[None] for one in drawn)])
        self.facts: dict[tuple[str, int, bool], dict[str, Any]] = {}
        self.sums: dict[tuple[str, int, bool, str, str], np.ndarray] = {}
        for path in sorted(out.glob("*.json")):
            facts = json.loads(path.read_bytes())
            key = (facts["wiring"], facts["seed"], facts["trained"])
            self.facts[key] = facts
            for (readout, pairing), rows in pl.read_parquet(path.with_suffix(".parquet")).group_by(WORDS):
                errors_EK = rows.sort("episode").select("x", "y", "z").to_numpy()
                self.sums[*key, str(readout), str(pairing)] = self._r2(errors_EK)

    def _r2(self, errors_EK: np.ndarray) -> np.ndarray:
        """Mean over x, y, z of R2: as it is, then of every resample."""
        r2: np.ndarray = (1 - (self.weights @ errors_EK) / (self.weights @ self.spread_EK)).mean(1)
        return r2

    def seeds(self, name: str, train: bool) -> list[int]:
        """Seeds that were run."""
        return sorted(seed for wiring, seed, was in self.facts if (wiring, was) == (name, train))

    def over(self, name: str, train: bool, seeds: list[int], readout: str, pairing: str) -> np.ndarray | None:
        """Mean over seeds, as it is and resampled; None if there is no such readout."""
        rows = [self.sums.get((name, seed, train, readout, pairing)) for seed in seeds]
        return None if not rows or any(one is None for one in rows) else np.mean(rows, 0)  # type: ignore[arg-type]


def words(values: np.ndarray | None, sign: str = "") -> str:
    """``.31 [.27, .35]``."""
    if values is None:
        return "-"
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return f"{short(values[0], sign)} [{short(low, sign)}, {short(high, sign)}]"


def short(value: float, sign: str = "") -> str:
    """``.31``."""
    return format(value, f"{sign}.2f").replace("0.", ".")


def table(options: argparse.Namespace) -> None:
    """Print markdown tables: the floors, then trained, minus its untrained twin, minus the better pixel floor."""
    results = Results(options.out)
    floors = {name: results.over(name, False, [0], "difference", "pair") for name in FLOORS[:2]}
    keys = {key[3:] for key in results.sums}
    for name in (*FLOORS, "state"):
        for readout, pairing in sorted(keys):
            found = results.over(name, False, [0], readout, pairing)
            if found is not None:
                print(f"| {name}, {readout}, {pairing} | {words(found)} |")
    best = max((one for one in floors.values() if one is not None), key=lambda one: float(one[0]), default=None)
    head = [*HEAD, *(f"{readout}, {pairing}: {what}" for readout, pairing in options.readouts for what in COLUMNS)]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name in WIRINGS:
        seeds = results.seeds(name, True)
        if not seeds:
            continue
        facts = [results.facts[name, seed, True] for seed in seeds]
        skill, cls, patches = (np.mean([one[key] for one in facts]) for key in ("skill", "rank_cls", "rank_patches"))
        cells = [name, str(len(seeds)), f"{skill:.2f}", f"{cls:.0f}, {patches:.0f}"]
        for readout, pairing in options.readouts:
            here = results.over(name, True, seeds, readout, pairing)
            plain = results.over(twin(name), False, seeds, readout, pairing)
            alone = [float(results.sums[name, seed, True, readout, pairing][0]) for seed in seeds]
            apart = f" ({', '.join(map(short, alone))})" if len(seeds) > 1 else ""
            cells.append(words(here) + apart)
            cells += [words(None if here is None or one is None else here - one, "+") for one in (plain, best)]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    doing = verbs.add_parser("run")
    for name in ("--frames", "--probe", "--labels", "--out"):
        doing.add_argument(name, type=Path, required=True)
    doing.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    doing.add_argument("--processes", type=int, default=os.cpu_count())
    doing.add_argument("wirings", nargs="*", choices=[[], *WIRINGS])
    doing.set_defaults(call=run)
    telling = verbs.add_parser("table")
    telling.add_argument("--out", type=Path, required=True)
    shown = [("cls", "antisymmetric"), ("grid", "antisymmetric")]
    telling.set_defaults(call=table, readouts=shown)
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()

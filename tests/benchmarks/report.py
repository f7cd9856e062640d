"""`avrl report` of more than 10,000 scores, as a whole process; and how heavy its page is.

    python -m tests.benchmarks.report [--encoders 12] [--gaps 1 2 4 8] [--episodes 200] [--profile]

A cache of synthetic scores: each trained encoder beside its untrained twin, outside encoders, floors, at four gaps
(four protocols), five readouts each, over as many test episodes as named, and a checkpoint for each trained encoder.
Goals: 10 s by the clock, the page below 5 MB. `--profile` says where the time of the stage itself goes.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from avrl.cache import Cache
from avrl.stages.report import PAGE, STAGE, ReportConfig, inputs
from tests import scored

READOUTS = ("cls", "patch-mean", "grid", "m", "p")
SECONDS, BYTES = 10, 5_000_000


def fill(cache: Cache, n_encoders: int, gaps: list[int], n_episodes: int) -> tuple[int, int]:
    """Scores of trained encoders, twins, outside encoders and floors; returns artifacts and rows."""
    scored.N_EPISODES, scored.SEEN = n_episodes, np.arange(n_episodes) % 4 != 0
    ours = [f"two-stream-ablated-{i}" for i in range(n_encoders)]
    rows = []
    for gap in gaps:
        fixed = {"gap": gap, "fingerprint": f"{gap:012x}"}
        checkpoints = scored.train(cache, *(scored.Training(objective=name) for name in ours))
        for i, one in enumerate(checkpoints):
            row = scored.Row(encoder=ours[i], checkpoint=one.ref, readouts=READOUTS, noise=0.5 + i / 20, **fixed)
            rows += [row, replace(row, init="random", noise=row.noise * 1.2)]
        for i in range(n_encoders // 3):
            outside = scored.Row(
                encoder=f"outside-{i}", init="pretrained", readouts=READOUTS, pairing="concat", **fixed
            )
            rows.append(outside)
        rows += [replace(one, **fixed) for one in scored.FLOORS]
    artifacts = scored.score(cache, *rows)
    return len(artifacts), sum(pl.read_parquet(one.root / "scores.parquet").height for one in artifacts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", type=int, default=12)
    parser.add_argument("--gaps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder))
        n_artifacts, n_rows = fill(cache, options.encoders, options.gaps, options.episodes)
        if options.profile:
            given = inputs(cache.artifacts("scores"), cache.artifacts("checkpoints"))
            Path(folder, "out").mkdir()
            with cProfile.Profile() as profile:
                STAGE.build(ReportConfig(), given, Path(folder, "out"))
            pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
            return
        begun = time.perf_counter()
        command = [sys.executable, "-c", "from avrl_cli.app import main; main()", "report", "-q"]
        subprocess.run(command, env={**os.environ, "AVRL_CACHE": folder}, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begun
        (made,) = cache.artifacts("tables")
        page = (made.root / PAGE).stat().st_size
    print(f"{n_rows:,} rows of {n_artifacts} artifacts: {seconds:.1f} s (goal {SECONDS}), of which the stage", end=" ")
    print(
        f"{made.manifest.seconds:.1f}; page {page / 1e6:.2f} MB (goal {BYTES / 1e6:.0f}), all {made.bytes / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()

"""Prep of 1080p clips, zip to frame store, beside ``ffmpeg -threads 1 -i clip -f null -``, which only decodes.

    python -m tests.benchmarks.decode [--rounds 5] [--frames 300] [--workers 2]

Interleaved, medians; ratios carry over to other machines, figures do not. Goal: N workers at 0.80 of N decoders side
by side. Cpu is the steadier column on a shared machine. The start of the workers, 2 s of a run of hours, is left out.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from avrl.episodes import View
from avrl.frames import Job, encode_episode
from avrl.packing import Packer
from avrl.sources import egodex as source
from avrl.video import executable
from tests.clips import egodex, ffmpeg, poses

# A room at 5 Mbit/s: a fractal seen by a shaky camera with a noisy sensor; no B-frames, as phones record.
SCENE = (
    "-f lavfi -i mandelbrot=size=2200x1240:rate=30:start_scale=0.{seed}:end_scale=0.01 "
    "-vf crop=1920:1080:x=140+120*sin(n/9):y=80+60*cos(n/7),noise=alls=5:allf=t,format=yuv420p "
    "-frames:v {frames} -c:v libx264 -preset fast -b:v 5M -g 30 -bf 0 "
    "-colorspace bt709 -color_primaries bt709 -color_trc bt709 {{}}"
)


def cpu() -> float:
    """Cpu seconds of this process and of its finished children."""
    return sum(os.times()[:4])


def null(clip: Path, processes: int) -> float:
    """Decode a clip in so many processes at once, and throw the frames away; cpu seconds."""
    before = cpu()
    command = [executable(), "-v", "error", "-nostdin", "-threads", "1", "-i", str(clip), "-f", "null", "-"]
    running = [subprocess.Popen(command) for _ in range(processes)]
    if any([one.wait() for one in running]):
        raise SystemExit("ffmpeg failed")
    return cpu() - before


def encoded(job: Job, episode: source.Episode) -> tuple[dict[str, Any], float]:
    """In a worker: the record of an episode, and cpu seconds."""
    before = cpu()
    return encode_episode(job, episode), cpu() - before


def prep(pool: Any, raw: Path, out: Path, processes: int) -> float:
    """Bring as many episodes as there are processes into a store; cpu seconds."""
    before = cpu()
    job = Job("egodex", raw, out / "scratch", View(224), quality=90, drop=False)
    job.scratch.mkdir(parents=True)
    packer, used = Packer(out), 0.0
    tasks = [(job, episode) for episode in source.survey(raw)[0][:processes]]
    for record, seconds in pool.starmap(encoded, tasks, chunksize=1):
        packer.add(record)
        used += seconds
    packer.flush()
    return used + cpu() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=300, help="a clip")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, get_context("spawn").Pool(options.workers) as pool:
        folder, outs = Path(name), (Path(name) / f"out{k}" for k in itertools.count())
        for k in range(2):
            clip = ffmpeg(SCENE.format(seed=k + 3, frames=options.frames))
            (folder / f"{k}.mp4").write_bytes(clip)
            egodex(folder / f"raw{k}", {f"task/{i}": (clip, poses(options.frames)) for i in range(options.workers)})
            print(f"clip {k}: {options.frames} frames, {len(clip) / options.frames / 1000:.1f} kB each")
            prep(pool, folder / f"raw{k}", next(outs), options.workers)  # every worker imports what it needs
        for processes in sorted({1, options.workers}):
            rows = []
            for _, k in itertools.product(range(options.rounds), range(2)):
                started = time.perf_counter()
                null_cpu = null(folder / f"{k}.mp4", processes)
                between = time.perf_counter()
                our_cpu = prep(pool, folder / f"raw{k}", next(outs), processes)
                ours, nulls = time.perf_counter() - between, between - started
                n = processes * options.frames
                rows.append((n / nulls, n / ours, nulls / ours, null_cpu / our_cpu))
            a, b, wall, used = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"{processes} at once: null {a:.0f}, prep {b:.0f} frames/s; ratio {wall:.2f} wall, {used:.2f} cpu")


if __name__ == "__main__":
    main()

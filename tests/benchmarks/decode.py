"""Prep of a 1080p clip, zip to frame store, beside ``ffmpeg -threads 1 -i clip -f null -``, which only decodes.

    python -m tests.benchmarks.decode [--rounds 6] [--frames 330] [--workers 2]

Interleaved, medians; ratios carry over to other machines, figures do not. Cpu is the steadier column on a shared
machine. The start of the workers, 2 s of a run of hours, is left out.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import statistics
import subprocess
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw

from avrl import codec, video
from avrl.episodes import View
from avrl.frames import Job, encode_episode
from avrl.packing import Packer
from avrl.sources import egodex as source
from tests.clips import BT709, FFMPEG, descendants, egodex, ffmpeg, poses, psnr

# Dead leaves, which have the edges and the spectrum of photographs, before a shaky camera with a noisy sensor. The
# camera turns: shifted by whole pixels, a clip decodes a quarter faster than any that a camera made. 5 Mbit/s, no B.
CAMERA = (
    "-loop 1 -framerate 30 -i {picture} -vf rotate=0.03*sin(n/11),crop=1920:1080:x=140+120*sin(n/9):y=80+60*cos(n/7),"
    "scale=out_color_matrix=bt709,noise=alls=5:allf=t,format=yuv420p "
    f"-frames:v {{frames}} -c:v libx264 -preset fast -b:v 5M -g 30 -bf 0 {BT709} {{{{}}}}"
)
SIZE, QUALITY, EVERY = 224, 90, 30  # every how many-th frame is compared with the reference
CLIPS = 4  # in a row, for each process
KR, KB = 0.2126, 0.0722  # BT.709


def filmed(folder: Path, frames: int, seed: int = 0) -> bytes:
    """An mp4 of a 1080p clip of so many frames."""
    leaves(folder / "leaves.png", seed)
    return ffmpeg(CAMERA.format(picture=folder / "leaves.png", frames=frames))


def leaves(path: Path, seed: int) -> None:
    """A picture of 2200 x 1240 full of discs that cover one another."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (2200, 1240))
    draw = ImageDraw.Draw(picture)
    for x, y, share in rng.uniform((-100, -100, 0.01), (2300, 1340, 1), (3000, 3)):
        a = 40 / share**0.5
        colour = np.clip(rng.normal(115, 40) + rng.normal(0, 18, 3), 0, 255).astype(int)
        draw.ellipse((x - a, y - 0.7 * a, x + a, y + 0.7 * a), fill=tuple(colour.tolist()))
    picture.save(path)


def cpu() -> float:
    """Cpu seconds of this process and of its finished children."""
    return sum(os.times()[:4])


def null(clip: Path, processes: int) -> float:
    """Decode `CLIPS` clips in each of so many processes, and throw the frames away; cpu seconds."""
    before = cpu()
    command = f"{FFMPEG} -v error -nostdin -threads 1 -i {clip} -f null -"
    in_a_row = " && ".join([command] * CLIPS)
    running = [subprocess.Popen(in_a_row, shell=True) for _ in range(processes)]
    if any([one.wait() for one in running]):
        raise SystemExit("ffmpeg failed")
    return cpu() - before


def encoded(task: tuple[Job, source.Episode]) -> tuple[dict[str, Any], float]:
    """In a worker: the record of an episode, and cpu seconds."""
    before = cpu()
    return encode_episode(*task), cpu() - before


def prep(pool: Any, raw: Path, out: Path, processes: int) -> tuple[float, float]:
    """Bring `CLIPS` episodes for each process into a store; cpu seconds, and MiB of the largest process."""
    before = cpu()
    job = Job("egodex", raw, out / "scratch", View(SIZE), quality=QUALITY, drop=False)
    job.scratch.mkdir(parents=True)
    packer, used = Packer(out), 0.0
    tasks = [(job, episode) for episode in source.survey(raw)[0][: processes * CLIPS]]
    for record, seconds in pool.imap(encoded, tasks):
        packer.add(record)
        used += seconds
    packer.flush()
    return used + cpu() - before, max(peak(pid) for pid, _ in descendants())


def peak(pid: int) -> float:
    """MiB that a process has had in memory at most."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        found = None
    return int(found[1]) / 1024 if found else 0.0  # nothing, if it has ended


def box(n: int, size: int) -> np.ndarray:
    """(size, n) matrix whose rows take the mean over n / size pixels, cut pixels by their share."""
    edges, at = np.linspace(0, n, size + 1), np.arange(n)
    return np.clip(np.minimum(at + 1, edges[1:, None]) - np.maximum(at, edges[:-1, None]), 0, None) * size / n


def reference(clip: Path) -> np.ndarray:
    """Every `EVERY`-th frame in RGB at full resolution, boxed to `SIZE`, in floats and rounded nowhere."""
    command = (
        f"-v error -i {clip} -vf select=not(mod(n\\,{EVERY})) -fps_mode passthrough -f rawvideo -pix_fmt yuv420p -"
    )
    data = subprocess.run([FFMPEG, *command.split()], capture_output=True, check=True).stdout
    frames, mean = [], box(1080, SIZE)
    for frame in np.frombuffer(data, np.uint8).reshape(-1, 1620, 1920).astype(float):
        u, v = (np.kron(one, np.ones((2, 2))) for one in frame[1080:].reshape(2, 540, 960))
        y, pb, pr = (frame[:1080] - 16) / 219, (u - 128) / 224, (v - 128) / 224
        r, b = y + 2 * (1 - KR) * pr, y + 2 * (1 - KB) * pb
        rgb = np.clip([r, (y - KR * r - KB * b) / (1 - KR - KB), b], 0, 1) * 255
        frames.append(np.moveaxis(mean @ rgb[:, :, 420:1500] @ mean.T, 0, -1).copy())
    return np.stack(frames)


def fidelity(clip: Path) -> str:
    """Our pictures and their JPEGs against the reference, beside JPEGs of the reference itself."""
    want = reference(clip)
    planes = list(itertools.islice(video.Clip(clip, "clip").decode(View(SIZE)), 0, None, EVERY))
    y, cb, cr = np.moveaxis(np.stack(planes).astype(float), 1, 0)
    scaled = np.stack(
        [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)]
    )
    before = psnr(np.moveaxis(scaled, 0, -1), want)
    jpegs = [[codec.encode(one, QUALITY) for one in pictures] for pictures in (planes, want.round().astype(np.uint8))]
    ours, best = (np.stack([simplejpeg.decode_jpeg(one) for one in which]) for which in jpegs)
    bytes_a_frame = statistics.mean(map(len, jpegs[0]))
    bias = np.abs((ours - want).mean((0, 1, 2))).max()
    return (
        f"scaled {before:.2f} dB (goal 38); {bytes_a_frame / 1000:.1f} kB a JPEG, {psnr(ours, want):.2f} dB "
        f"(JPEG alone {psnr(best, want):.2f}), bias {bias:.2f} (goal <= 0.5)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--frames", type=int, default=330, help="of the clip")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, outs = Path(name), (Path(name) / f"out{k}" for k in itertools.count())
        clip, raw = folder / "clip.mp4", folder / "raw"
        clip.write_bytes(filmed(folder, options.frames))
        episode = (clip.read_bytes(), poses(options.frames))
        egodex(raw, {f"task/{i}": episode for i in range(options.workers * CLIPS)})
        print(f"{options.frames} frames of {clip.stat().st_size / options.frames / 1000:.1f} kB; {video.chain()}")
        print(fidelity(clip))
        for processes in sorted({1, options.workers}):
            rows = []
            with get_context("spawn").Pool(processes) as pool:
                prep(pool, raw, next(outs), processes)  # every worker imports what it needs
                for _ in range(options.rounds):
                    started = time.perf_counter()
                    null_cpu = null(clip, processes)
                    between = time.perf_counter()
                    our_cpu, memory = prep(pool, raw, next(outs), processes)
                    ours, nulls = time.perf_counter() - between, between - started
                    n = processes * options.frames * CLIPS
                    rows.append((n / nulls, n / ours, nulls / ours, null_cpu / our_cpu))
            a, b, wall, used = (statistics.median(column) for column in zip(*rows, strict=True))
            goal = " (goal 0.85; 0.90 with zscale)" if processes == options.workers else ""
            print(
                f"{processes} at once: null {a:.0f}, prep {b:.0f} frames/s; ratio {wall:.2f} wall{goal}, {used:.2f} cpu"
            )
        print(f"a worker: {memory:.0f} MiB (goal <= 150)")


if __name__ == "__main__":
    main()

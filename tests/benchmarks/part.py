"""A part of 2,000 clips through fetch (loopback) -> prep -> loader, and what the plan said of it beforehand.

    python -m tests.benchmarks.part [--clips 2000] [--distinct 50] [--stream]

Prints predicted against actual size and time (goal: within 10%), and the peak memory of any process (goal: 2 GB). Clips
are small (320 x 180, 30 to 150 frames), so that 2,000 of them take minutes; every 40th is another scene.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from tests.clips import ffmpeg, poses
from tests.loopback import Files, serving

SCENE = (
    "-f lavfi -i mandelbrot=size=360x220:rate=30:start_scale={scale}:end_scale=0.01 "
    "-vf crop=320:180:x=20+18*sin(n/9+{seed}):y=20+15*cos(n/7),noise=alls={noise}:allf=t,hue=h={hue},format=yuv420p "
    "-frames:v {frames} -c:v libx264 -preset fast -crf 27 -g 30 -bf 0 -threads 1 "
    "-colorspace bt709 -color_primaries bt709 -color_trc bt709 {{}}"
)


class Published(Files):
    """The loopback server with a version that need not be computed."""

    slice_bytes = 1 << 20

    def etag(self, data: bytes) -> str:
        return '"1"'


def build(path: Path, n_clips: int, n_distinct: int) -> None:
    """A zip of so many clips of 20 tasks; lengths and scenes differ, as many as are distinct."""
    rng = random.Random(0)
    made = []
    for seed in range(n_distinct):
        frames = rng.randrange(30, 150)
        look = {"scale": f"0.{rng.randrange(1, 9)}", "noise": rng.randrange(1, 6), "hue": rng.randrange(360)}
        made.append((ffmpeg(SCENE.format(seed=seed, frames=frames, **look)), poses(frames)))
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(n_clips):
            clip, pose = made[rng.randrange(n_distinct)]
            name = f"part1/task_{n % 20:02d}/{n // 20}"
            archive.writestr(zipfile.ZipInfo(f"{name}.mp4"), clip)
            archive.writestr(zipfile.ZipInfo(f"{name}.hdf5"), pose)


def avrl(cache: Path, *words: str) -> tuple[dict, float, int]:
    """Run a verb: its JSON document, wall seconds, and the largest resident size of any of its processes (bytes)."""
    begun = time.perf_counter()
    environment = {**os.environ, "AVRL_CACHE": str(cache), "no_proxy": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-c", "from avrl_cli.app import main; main()", *words, "--json", "-q"],
        stdout=subprocess.PIPE,
        env=environment,
    )
    peak = 0
    with tempfile.TemporaryFile() as text:
        while process.poll() is None:
            peak = max(peak, *(resident(pid) for pid in family(process.pid)))
            time.sleep(0.2)
        text.write(process.stdout.read())
        text.seek(0)
        if process.returncode:
            raise SystemExit(f"avrl {' '.join(words)} ended with {process.returncode}")
        return json.loads(text.read()), time.perf_counter() - begun, peak


def family(pid: int) -> list[int]:
    from tests.clips import descendants

    return [pid, *(child for child, _ in descendants(pid))]


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--distinct", type=int, default=50)
    parser.add_argument("--stream", action="store_true", help="without a fetch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "part1.zip", options.clips, options.distinct)
        data = (folder / "part1.zip").read_bytes()
        (folder / "part1.zip").unlink()
        print(f"{options.clips} clips, {len(data) / 1e6:.0f} MB", flush=True)
        with serving(Published, {"part1.zip": data}) as server:
            where = ["--from", server.url, "--part", "1"]
            if not options.stream:
                _, seconds, peak = avrl(folder, "fetch", *where)
                print(f"fetch: {len(data) / seconds / 1e6:.0f} MB/s, peak {peak / 2**20:.0f} MiB", flush=True)
            words = ["prep", "--stream", *where] if options.stream else ["prep"]
            plan = avrl(folder, *words, "--dry-run")[0]["plan"][0]
            made, seconds, peak = avrl(folder, *words)
        facts = made["artifacts"][-1]
        shown = {
            "frames": (plan["frames"], facts["facts"]["frames"]),
            "bytes": (plan["bytes"], facts["bytes"]),
            "seconds": (plan["seconds"], facts["seconds"]),
        }
        for what, (said, came) in shown.items():
            print(f"prep {what}: planned {said:,.0f}, came {came:,.0f}: {said / came:.3f} (goal 0.9 to 1.1)")
        print(f"prep: {plan['sampled']} episodes decoded to know, peak {peak / 2**20:.0f} MiB a process (goal 2048)")
        load(Path(facts["path"]))


def load(root: Path) -> None:
    """Random pairs for ten seconds; what a process grows by while it reads."""
    from avrl.pairs import Pairs, Sampling
    from avrl.store import FrameStore

    pairs = Pairs(FrameStore(root), Sampling(seed=0, max_gap=10, sample_decay=0.8, pairs_per_episode=100), 64)
    pairs.batch(0)
    before, begun, step = resident(os.getpid()), time.perf_counter(), 1
    sums = np.zeros(3)
    while time.perf_counter() - begun < 10:
        sums += pairs.batch(step).frames_BTHWC[0, 0, 0].numpy().mean(0)
        step += 1
    assert sums.all()
    grown = resident(os.getpid()) - before
    print(f"loader: {(step - 1) * 64 / 10:.0f} pairs/s, grown by {grown / 2**20:.0f} MiB (mapped pages too)")


if __name__ == "__main__":
    main()

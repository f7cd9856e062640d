"""Renders the larger set that `tests.benchmarks.wirings` trains and judges on, in the sample's two layouts.

A developer's script: ``python tests/benchmarks/extra_scenes.py --out DIR [--only part1|part2|bridge]``, with what
`avrl/sample/render.py` needs. 22 tasks x 20 clips with a moving camera to pretrain on (part1.zip, part2.zip); 15 other
tasks x 20 runs at 5 Hz from four static cameras to judge on. Some 7 minutes a part.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "avrl/sample"))
import render
from containers import bridge_record, jpeg, write_dataset

EPISODES = 20
# One side of the table, 42 degrees apart: the direction of a motion in the picture is not its direction in the world.
render.BRIDGE_CAMERAS = ((304.0, -28.0), (318.0, -40.0), (332.0, -26.0), (346.0, -36.0))
VAL_EVERY = 5  # every fifth task is val
SCENES = [(scene, said) for task in render.EGODEX_TASKS.values() for scene, said in task.items()]


def make_bridge(out: Path) -> None:
    """Writes `bridge_dataset/1.0.0/`: all runs of a task in one split, cameras in turn."""
    splits: dict[str, list[bytes]] = {"train": [], "val": []}
    for t, (scene, sentence) in enumerate((render.BRIDGE_TASKS | render.BRIDGE_VAL_ONLY).items()):
        arm = render.Arm(scene, (512, 512))
        records = splits["val" if t % VAL_EVERY == VAL_EVERY - 1 else "train"]
        for n in range(EPISODES):
            images, states, actions, camera = render.record(arm, 500_000 + 1000 * t + n, (t + n) % 4)
            number = sum(map(len, splits.values()))
            origin = f"metaworld/{scene}/camera{camera}/{n}"
            files = [jpeg(image, 90) for image in images]
            records.append(bridge_record(files, states, actions, sentence, (number, origin)))
        arm.renderer.close()
        print(scene, flush=True)
    for records in splits.values():
        np.random.default_rng(0).shuffle(records)
    write_dataset(out / "bridge_dataset/1.0.0", splits, {"train": 3, "val": 2})


def make_egodex(out: Path, part: int) -> None:
    """Writes `partN.zip`, a folder a scene, with half of the scenes."""
    render.EGODEX_TASKS = {scene.replace("-", "_"): {scene: said} for scene, said in SCENES[part - 1 :: 2]}
    render.make_egodex(out / f"part{part}", EPISODES)
    (out / f"part{part}/egodex/sample.zip").replace(out / f"part{part}.zip")


MAKE = {
    "part1": lambda out: make_egodex(out, 1),
    "part2": lambda out: make_egodex(out, 2),
    "bridge": make_bridge,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=MAKE, help="one part (default: all)")
    chosen = parser.parse_args()
    for one in (chosen.only,) if chosen.only else MAKE:
        MAKE[one](chosen.out)

"""The same trajectories in every form that Bridge V2 is published in: RLDS, LeRobot v2 and v3, raw pickles and JPEGs.

As `clips`: nothing here uses avrl's readers or its labels, so that tests compare two minds.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import clips
import numpy as np
import polars as pl
from PIL import Image

CAMERA = "observation.images.image_0"
NAMES = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
V2 = {
    "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}
V3 = {
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
AV1 = "-c:v libsvtav1 -crf 12 -preset 8"


@dataclass
class Trajectory:
    """States and actions (T, 7), pictures (T, H, W, 3), and what was asked of the robot."""

    state: np.ndarray
    action: np.ndarray
    frames: np.ndarray
    language: str = "move it"


def trajectories(lengths=(12, 9, 14, 11), size=48, seed=0):
    """Random walks; the last action is zeros, as the RLDS builder appends it; grippers have in-between values."""
    rng = np.random.default_rng(seed)
    found = []
    for k, n in enumerate(lengths):
        state, action = rng.normal(0, 0.1, (2, n, 7)).astype(np.float32).cumsum(1)
        action[0, :6] = 0
        action[:, 6] = rng.choice([0.0, 0.3, 0.6, 1.0], n)
        action[-2, 6] = (0.3, 0.6)[k % 2]  # in between: what follows tells
        action[-1] = 0
        found.append(Trajectory(state, action, clips.ramps(n, size, size, seed=k), f"task {k % 2}"))
    return found


# RLDS.


def rlds(folder, train, val=()):
    """Shards below ``bridge_dataset/1.0.0``."""

    def records(those):
        return [
            clips.framed(clips.example(clips.trajectory(t.state, t.action, clips.jpegs(t.frames), t.language)))
            for t in those
        ]

    return clips.bridge(folder, records(train), records(val))


# LeRobot.


def openvla(one):
    """What OpenVLA's transform makes of a trajectory: the copy IPEC-COMMUNITY/bridge_orig_lerobot went through it."""
    state, action = one.state[1:], one.action[1:]
    gripper, carry = np.empty(len(action)), action[-1, 6]
    for step in reversed(range(len(action))):
        value = action[step, 6]
        carry = 1.0 if value > 0.95 else 0.0 if value < 0.05 else carry
        gripper[step] = carry
    moved = np.concatenate([state[1:, :6] - state[:-1, :6], gripper[:-1, None]], 1)
    padded = np.insert(state[:-1], 6, 0.0, axis=1)
    return Trajectory(padded, moved.astype(np.float32), one.frames[1:-1], one.language)


def info(version, those, *, splits=None, kind="video", cameras=(CAMERA,), names=NAMES, fps=5, **changed):
    """``meta/info.json``; state names come from the width, 8 being OpenVLA's with a pad."""
    width = those[0].state.shape[1]
    of_state = [*names[:6], "pad", names[6]] if width == 8 else names
    of_state, names = (  # flat lists under a word, as most have them
        {"motors": one} if isinstance(one, list) and isinstance(one[0], str) else one for one in (of_state, names)
    )
    picture = {"dtype": kind, "shape": [48, 48, 3], "names": ["height", "width", "rgb"]}
    features = {
        "observation.state": {"dtype": "float32", "shape": [width], "names": of_state},
        "action": {"dtype": "float32", "shape": [7], "names": names},
        **{one: picture for one in cameras},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    }
    return {
        "codebase_version": version,
        "fps": fps,
        "total_episodes": len(those),
        "total_frames": sum(len(t.state) for t in those),
        "chunks_size": 1000,
        "splits": splits or {"train": f"0:{len(those)}"},
        "features": features,
        **(V2 if version.startswith("v2") else V3),
        **changed,
    }


def rows(index, one, tasks, first=0, kind="video"):
    """An episode's rows of a data parquet."""
    n = len(one.state)
    columns = {
        "observation.state": one.state.tolist(),
        "action": one.action.tolist(),
        "timestamp": (np.arange(n) / 5).astype(np.float32),
        "frame_index": np.arange(n),
        "episode_index": [index] * n,
        "index": first + np.arange(n),
        "task_index": [tasks.index(one.language)] * n,
    }
    if kind == "image":
        columns[CAMERA] = [{"bytes": png(frame), "path": f"{i}.png"} for i, frame in enumerate(one.frames)]
    lists = {"observation.state": pl.List(pl.Float32), "action": pl.List(pl.Float32)}
    return pl.DataFrame(columns, schema_overrides=lists)


@cache
def encoded(data, shape, options, gop):
    """Frames as a clip at 5 Hz; most tests ask for the same few, and an encoder takes a while to start."""
    return clips.encode(np.frombuffer(data, np.uint8).reshape(shape), options, gop=gop, fps=5)


def png(frame):
    """A frame as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "png")
    return buffer.getvalue()


def write(path, data):
    """Write text, bytes, an object as JSON, a list of objects as lines of JSON, or a table; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, pl.DataFrame):
        data.write_parquet(path)
    elif isinstance(data, bytes):
        path.write_bytes(data)
    else:
        lines = data if isinstance(data, list) else [data]
        path.write_text("".join(json.dumps(one) + "\n" for one in lines))


def lerobot2(folder, those, *, version="v2.1", options="", kind="video", black=0, **changed):
    """A parquet and a clip an episode; so many black cameras stand before the main one."""
    cameras = [f"observation.images.black_{k}" for k in range(black)] + [CAMERA]
    tasks = sorted({t.language for t in those})
    write(folder / "meta/info.json", info(version, those, kind=kind, cameras=cameras, **changed))
    write(folder / "meta/tasks.jsonl", [{"task_index": k, "task": one} for k, one in enumerate(tasks)])
    listed = [{"episode_index": k, "tasks": [t.language], "length": len(t.state)} for k, t in enumerate(those)]
    write(folder / "meta/episodes.jsonl", listed)
    for k, t in enumerate(those):
        write(folder / f"data/chunk-000/episode_{k:06d}.parquet", rows(k, t, tasks, kind=kind))
        for camera in cameras if kind == "video" else ():
            frames = t.frames if camera == CAMERA else np.zeros_like(t.frames)
            clip = encoded(frames.tobytes(), frames.shape, options, 2)
            write(folder / f"videos/chunk-000/{camera}/episode_{k:06d}.mp4", clip)
    return folder


def lerobot3(folder, those, *, version="v3.0", options="", kind="video", stem="file-000", meta=None, **changed):
    """One parquet and one clip for all episodes; the list is a parquet too. `meta` changes columns of the list."""
    tasks = sorted({t.language for t in those})
    write(folder / "meta/info.json", info(version, those, kind=kind, **changed))
    named = pl.DataFrame({"task_index": range(len(tasks)), "__index_level_0__": tasks})
    write(folder / "meta/tasks.parquet", named)
    starts = np.cumsum([0, *(len(t.state) for t in those)])
    n = len(those)
    listed = {
        "episode_index": range(n),
        "tasks": [[t.language] for t in those],
        "length": [len(t.state) for t in those],
        "data/chunk_index": [0] * n,
        "data/file_index": [0] * n,
        f"videos/{CAMERA}/chunk_index": [0] * n,
        f"videos/{CAMERA}/file_index": [0] * n,
        f"videos/{CAMERA}/from_timestamp": starts[:-1] / 5,
        f"videos/{CAMERA}/to_timestamp": starts[1:] / 5,
        "stats/action/mean": [[0.0] * 7] * n,
    }
    write(folder / f"meta/episodes/chunk-000/{stem}.parquet", pl.DataFrame(listed | (meta or {})))
    data = [rows(k, t, tasks, starts[k], kind) for k, t in enumerate(those)]
    write(folder / f"data/chunk-000/{stem}.parquet", pl.concat(data))
    if kind == "video":
        keys = ",".join(f"{at / 5:.3f}" for at in starts[:-1])
        frames = np.concatenate([t.frames for t in those])
        clip = encoded(frames.tobytes(), frames.shape, f"{options} -force_key_frames {keys}", 10)
        write(folder / f"videos/{CAMERA}/chunk-000/{stem}.mp4", clip)
    return folder


# Raw.

DATE = "2022-03-04_05-06-07"
TASK = "bridge_data_v2/toykitchen1/pnp/00"


def pickled(one, *, bare=False, old=False, protocol=3):
    """``obs_dict.pkl`` and ``policy_out.pkl``: float64, actions one fewer than states; `old` is numpy 1's spelling."""
    held = {"full_state": one.state.astype(np.float64), "time_stamp": np.arange(len(one.state)), "env_done": [False]}
    actions = [row.astype(np.float64) for row in one.action[:-1]]
    steps = actions if bare else [{"actions": row, "policy_type": "VR", "n": np.float64(1)} for row in actions]
    both = [pickle.dumps(thing, protocol) for thing in (held, steps)]
    return [data.replace(b"numpy._core", b"numpy.core") for data in both] if old else both


def files(one, **options):
    """What lies in a trajectory's folder, by name."""
    states, actions = pickled(one, **options)
    pictures = {f"images0/im_{n}.jpg": data for n, data in enumerate(clips.jpegs(one.frames))}
    text = f"{one.language}\nconfidence: 1\n"
    return {"obs_dict.pkl": states, "policy_out.pkl": actions, "lang.txt": text.encode(), **pictures}


def raw(folder, those, *, date=DATE, more=None, name="demos_8_17.zip", **options):
    """The zip as published, or with name="" the same unpacked; `more` are files beside, by path from the root."""
    members = {}
    for k, t in enumerate(those):
        inside = f"raw/{TASK}/{date}/raw/traj_group0/traj{k}"
        members |= {f"{inside}/{n}": data for n, data in files(t, **options).items()}
    members |= more or {}
    folder.mkdir(parents=True, exist_ok=True)
    if not name:
        for path, data in members.items():
            write(folder / path, data)
        return folder
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, data in sorted(members.items()):  # im_10 before im_2, as a zip may have it
            archive.writestr(zipfile.ZipInfo(path), data)
    return folder


def linked(module, copy, root, parts):
    """The raw artifact that `fetch` makes of a copy."""
    for name, path in module.local_files(copy, parts).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(Path(path).absolute())
    return root

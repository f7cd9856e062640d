"""Labels: raw -> what a robot or a hand did, one row a frame; and what is to be predicted of a pair (t, t+gap).

Every source has its own rules: those of Bridge V2 are here, those of others in the modules that `MOTION` names.
Two rules of Bridge are applied here and nowhere else: the first action of every trajectory is all zero
(a recording artefact, so pairs start at frame 1, as OpenVLA drops step 0), and the gripper command is binarised
by a backward scan (above .95 open, below .05 closed, in between as the next step), as OpenVLA and Octo do.
Copies that went through OpenVLA's own transform have had them already, and their actions are relabelled as the motion
that happened. Whether they have is what the form of the data says (`avrl.sources.bridge.Form.relabelled`), and it goes
with the numbers, as the column `RELABELLED`: no caller can apply a rule twice.

Legend: N pairs, T frames of an episode, K target dimensions.
"""

from __future__ import annotations

import importlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from avrl.artifact import SCRATCH, write_durably
from avrl.errors import ConfigError, IntegrityError
from avrl.progress import bar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import polars as pl

    from avrl.episodes import Episode

    Table = pl.DataFrame | pl.LazyFrame

MOTION = {"egodex": "avrl.hand_motion", "lerobot": "avrl.lerobot_motion"}  # a `Motion` each; Bridge's is below
DIMENSIONS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
GROUPS = {"position": ("x", "y", "z"), "rotation": ("roll", "pitch", "yaw"), "gripper": ("gripper",)}
UNITS = {"position": "m", "rotation": "rad", "gripper": "open = 1"}
TARGETS = ("reached", "commanded")
OPEN, CLOSED = 0.95, 0.05
FIRST_FRAME = 1  # frame 0's action is not one
EPISODES = 256  # a part
ROWS = 2**18  # of a row group, however the parts are cut
EXACT = 1e-6  # m or rad: what float32 leaves of a difference
RELABELLED = "relabelled"  # a column of labels.parquet only where the rules were applied upstream; true throughout


@dataclass(frozen=True)
class Target:
    """What is to be predicted of pairs (t, t+gap).

    Attributes:
        rows: ``episode_index`` and ``frame_index`` of t, a row a pair.
        y_NK: In the units of the data, float64.
        state_NS: What is known of the state at t, for the floor ``state``.
        motion_NS: How the state changes until t+gap, and what it holds then: for the ceiling ``oracle``.
        groups: Names of the K dimensions, by group, in the order of the columns.
        binary: Names of those that are 0 or 1.
        name: What moves, where a source has several of them: each is a target of its own, over its own pairs.
    """

    rows: pl.DataFrame
    y_NK: np.ndarray
    state_NS: np.ndarray
    motion_NS: np.ndarray
    groups: Mapping[str, tuple[str, ...]]
    binary: tuple[str, ...] = ()
    name: str = ""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the K columns."""
        return tuple(name for group in self.groups.values() for name in group)


class Motion(Protocol):
    """What the module of a source's labels offers."""

    def columns(self, raw: Path, episode: Episode, scratch: Path) -> dict[str, np.ndarray]:
        """What was recorded of an episode: columns of one length, a row a frame of the store; damage is refused."""

    def facts(self, labels: pl.LazyFrame) -> dict[str, Any]:
        """What is worth saying of all of it, for the manifest; labels may be larger than the memory."""

    def targets(self, labels: Table, gap: int, target: str, scratch: Path | None) -> Iterable[Target]:
        """See `targets`."""


def extract(raw: Path, frames: Path, out: Path, source: str = "bridge") -> dict[str, Any]:
    """Write ``labels.parquet`` for the episodes of a frame store: what was recorded of every frame of the store.

    A part at a time is in memory, and goes to scratch when it is whole: a killed run goes on with the next.

    Args:
        raw: Root of the raw artifact.
        frames: Root of the frame store made of it; what was dropped there is left out here.
        out: Directory to fill; what an interrupted call left there is kept.
        source: Whose data it is.

    Returns:
        Counts for the manifest.

    Raises:
        IntegrityError: a record is damaged; states and frames differ in number; or a robot's actions are not what
            the form of the data says.
    """
    import polars as pl

    from avrl.episodes import Episode

    episodes = pl.read_parquet(frames / "episodes.parquet")
    read = _motion(source).columns if source in MOTION else _columns
    (out / SCRATCH).mkdir(exist_ok=True)
    parts = {start: out / SCRATCH / f"labels-{start:09d}.parquet" for start in range(0, len(episodes), EPISODES)}
    todo = [start for start, part in parts.items() if not part.exists()]  # its name shows only when it is whole
    with bar("labels", len(todo), "part") as progress:
        for start in todo:
            tables = []
            for row in episodes[start : start + EPISODES].iter_rows(named=True):
                episode = Episode(**{name: row[name] for name in Episode.__dataclass_fields__})
                tables.append(_table(read(raw, episode, out / SCRATCH), episode))
            data = io.BytesIO()
            pl.concat(tables).write_parquet(data)
            write_durably(parts[start], data.getvalue())
            progress.update()
    pl.scan_parquet(list(parts.values())).sink_parquet(out / "labels.parquet", row_group_size=ROWS)
    labels = pl.scan_parquet(out / "labels.parquet")
    done = RELABELLED in labels.collect_schema()
    more = _motion(source).facts(labels) if source in MOTION else {RELABELLED: True} if done else {}
    return {"episodes": len(episodes), "frames": int(episodes["length"].sum()), **more}


def _table(columns: dict[str, np.ndarray], episode: Episode) -> pl.DataFrame:
    """What was recorded of an episode, with its number and those of its frames."""
    import polars as pl

    table = pl.DataFrame(columns)
    if len(table) != episode.length:
        raise IntegrityError(f"{episode.episode_id}: {len(table)} states, {episode.length} frames")
    index = pl.lit(episode.episode_index, pl.Int64).alias("episode_index")
    return table.select(index, pl.int_range(pl.len(), dtype=pl.Int64).alias("frame_index"), pl.all())


def targets(
    labels: Table, gap: int, target: str, source: str = "bridge", scratch: Path | None = None
) -> Iterable[Target]:
    """What is to be predicted of all pairs (t, t+gap) within an episode, in the order of the table; none is empty.

    Args:
        labels: ``labels.parquet``.
        gap: Frames between the two.
        target: One of `TARGETS`.
        source: Whose data it is.
        scratch: A folder where numbers may lie that are too many for memory.

    Raises:
        ConfigError: the gap is longer than every episode, or there is no such target in these labels.
    """
    if source in MOTION:
        return _motion(source).targets(labels, gap, target, scratch)
    return [pairs(labels.lazy().collect(), gap, target)]


def starts(labels: Table, gap: int) -> np.ndarray:
    """Rows (N,) of the first frames of all pairs within an episode.

    Raises:
        ConfigError: the gap is longer than every episode.
    """
    index = labels.lazy().select("episode_index").collect().to_series().to_numpy()
    found = np.flatnonzero(index[gap:] == index[: len(index) - gap]) if len(index) > gap else np.zeros(0, int)
    if not len(found):
        raise ConfigError(f"no episode has two frames that are {gap} apart", "try a smaller --gap")
    return found


def _motion(source: str) -> Motion:
    return cast("Motion", importlib.import_module(MOTION[source]))


def _columns(raw: Path, episode: Episode, scratch: Path) -> dict[str, np.ndarray]:
    """State and action of a Bridge trajectory."""
    from avrl.sources import bridge

    state, action = bridge.robot(raw, episode)
    done = bridge.relabelled(raw)
    _require_said(done, state, action, f"{(raw / episode.file).resolve()} ({episode.episode_id})")
    state, action = thinned(state, action, episode.stride)
    columns = {f"state_{name}": state[:, i] for i, name in enumerate(DIMENSIONS)}
    columns |= {f"action_{name}": action[:, i] for i, name in enumerate(DIMENSIONS)}
    return columns | ({RELABELLED: np.ones(len(state), bool)} if done else {})


def thinned(state_TK: np.ndarray, action_TK: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """State and action of every stride-th frame, where a store keeps only those.

    The action is what was commanded until the next one kept: the sum of the motions, and the last command to the
    gripper, binarised while the steps between are still there.
    """
    if stride == 1:
        return state_TK, action_TK
    starts = np.arange(0, len(state_TK), stride)
    last = np.minimum(starts + stride, len(state_TK)) - 1
    motion = np.add.reduceat(action_TK[:, :6], starts, 0, dtype=np.float64)
    action = np.concatenate([motion, binarised(action_TK[:, 6])[last, None]], 1)
    return state_TK[starts], action.astype(action_TK.dtype)


def _require_said(done: bool, state_TK: np.ndarray, action_TK: np.ndarray, name: str) -> None:
    """Refuse a copy of the data that says one thing of its actions and shows another: rules would go wrong in silence.

    Relabelled actions are the differences of the states to the last digit of a float32; no robot obeys so well.

    Raises:
        IntegrityError: it is such a copy.
    """
    motion = np.diff(state_TK[:, :6], axis=0)
    apart = np.abs(motion - action_TK[:-1, :6]).max(initial=0)
    if done and apart > EXACT:
        what = "its state is padded as by OpenVLA's transform, but its actions are not the differences of its states"
    elif not done and len(motion) > 1 and np.abs(motion[0]).max() > EXACT >= apart:
        what = "its actions are the differences of its states, and nothing says whether its first frame is gone too"
    else:
        return
    raise IntegrityError(f"{name}: {what}", "take another copy of the data: the RLDS shards, say")


def pairs(labels: pl.DataFrame, gap: int, target: str) -> Target:
    """All pairs (t, t+gap) within an episode, and what is to be predicted of each.

    Args:
        labels: ``labels.parquet``.
        gap: Frames between the two.
        target: ``reached``: state[t+gap] - state[t], the motion that happened. ``commanded``: the sum of the
            actions of the steps between. Angles are differences on the circle. The gripper is the command of
            the last step before t+gap, 1 open and 0 closed, for both.

    Returns:
        y in m, rad and 1 (open) or 0; the state has the same seven dimensions.

    Raises:
        ConfigError: the gap is longer than every episode, or no command is left in these labels.
    """
    import polars as pl

    done = RELABELLED in labels.columns
    if done and target == "commanded":
        raise ConfigError(
            "the actions of this copy of the data are relabelled as the motion that happened: no command is left",
            "--target reached, or fetch the RLDS shards",
        )
    episode_N, frame_N, y_NK, state_NS, motion_NS = [], [], [], [], []
    for (index,), rows in labels.group_by("episode_index", maintain_order=True):
        state = rows.select(f"state_{name}" for name in DIMENSIONS).to_numpy().astype(np.float64)
        action = rows.select(f"action_{name}" for name in DIMENSIONS).to_numpy().astype(np.float64)
        start = np.arange(0 if done else FIRST_FRAME, len(state) - gap)
        if not len(start):
            continue
        reached = motion = state[start + gap] - state[start]
        reached[:, 3:6] = wrapped(reached[:, 3:6])
        if target == "commanded":
            total = np.concatenate([np.zeros((1, 6)), np.cumsum(action[:, :6], 0)])
            motion = total[start + gap] - total[start]
        command = binarised(action[:, 6])[start + gap - 1]
        episode_N.append(np.full(len(start), index))
        frame_N.append(start)
        y_NK.append(np.concatenate([motion[:, :6], command[:, None]], 1))
        state_NS.append(state[start])
        motion_NS.append(np.concatenate([reached, state[start + gap, 6:]], 1))
    if not y_NK:
        raise ConfigError(f"no episode has two frames that are {gap} apart", "try a smaller --gap")
    rows = pl.DataFrame(
        {"episode_index": np.concatenate(episode_N), "frame_index": np.concatenate(frame_N)},
        schema={"episode_index": pl.Int64, "frame_index": pl.Int64},
    )
    y, state, motion = (np.concatenate(one) for one in (y_NK, state_NS, motion_NS))
    return Target(rows, y, state, motion, GROUPS, GROUPS["gripper"])


def wrapped(angle: np.ndarray) -> np.ndarray:
    """Angles in radians brought to [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def binarised(gripper_T: np.ndarray) -> np.ndarray:
    """Open (1) or closed (0) at each step; what is in between takes the next definite value.

    A trajectory that ends in between takes the nearer of the two there.
    """
    binary = np.empty(len(gripper_T))
    carry = float(gripper_T[-1] > 0.5)
    for step in range(len(gripper_T) - 1, -1, -1):
        value = gripper_T[step]
        carry = 1.0 if value > OPEN else 0.0 if value < CLOSED else carry
        binary[step] = carry
    return binary

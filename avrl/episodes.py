"""Episodes: one clip or one robot trajectory each, as rows that every later hop shares.

Column names are LeRobot's. ``episode_index`` is the position in the source's own sorted order and never moves,
whatever is dropped later, so labels and frames that were made apart still meet on it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl


@dataclass(frozen=True)
class Episode:
    """Where an episode's frames lie, and what they show.

    Attributes:
        episode_index: Position in the source's sorted order; stable under drops.
        episode_id: Readable name, unique in the raw artifact (``part1/fold_towel/12``).
        task: Name of the task; the unit of "unseen tasks".
        language: Instruction in words; may be empty.
        split: ``train``, ``val`` or ``test``, as the source publishes it.
        length: Number of frames that the container promises.
        fps: Frames per second.
        file: File of the raw artifact that holds it, relative to the artifact's root.
        member: Name inside that file, if it is a zip.
        offset: Byte position inside that file, if it is a record file.
    """

    episode_index: int
    episode_id: str
    task: str
    language: str
    split: str
    length: int
    fps: float
    file: str
    member: str = ""
    offset: int = 0


@dataclass(frozen=True)
class Dropped:
    """An episode that cannot be used, by name and with the reason."""

    episode_id: str
    reason: str


SCHEMA = {
    "episode_index": "Int64",
    "episode_id": "String",
    "task": "String",
    "language": "String",
    "split": "String",
    "length": "Int64",
    "fps": "Float64",
    "file": "String",
    "member": "String",
    "offset": "Int64",
}


def table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Placed episodes as a frame with LeRobot's column names; rows of the store are [from, to)."""
    import polars as pl

    schema = {name: getattr(pl, kind) for name, kind in SCHEMA.items()}
    frame = pl.DataFrame(rows, schema={**schema, "dataset_from_index": pl.Int64})
    return frame.with_columns((pl.col("dataset_from_index") + pl.col("length")).alias("dataset_to_index"))


def write_dropped(dropped: list[Dropped], path: Path) -> None:
    """Write the list of dropped episodes, also when it is empty: an absent file would say nothing."""
    import polars as pl

    rows = [asdict(one) for one in dropped]
    pl.DataFrame(rows, schema={"episode_id": pl.String, "reason": pl.String}).write_parquet(path)

"""Episodes: one clip or one robot trajectory each, as rows that every later hop shares.

Column names are LeRobot's. ``episode_index`` is the position in the source's own sorted order and never moves,
whatever is dropped later, so labels and frames that were made apart still meet on it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from avrl.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl


SHORT = 10  # frames: `avrl pretrain`'s longest gap by default does not fit an episode of so many
RATE_TOLERANCE = 0.01  # 29.97 is as good as 30
NO_LANGUAGE = "(none)"  # names the task of an episode without an instruction, where that is the only name there is
TOO_SHORT, UNSURE = "too short", "no confidences"  # what an `Episode.note` may say


@dataclass(frozen=True)
class View:
    """How pictures of a source become frames of a store.

    Attributes:
        image_size: Side of the square frames, px.
        crop: ``center`` takes the central square, ``none`` squeezes the whole picture into one.
        fps: Frames per second to keep; 0 keeps all.
    """

    image_size: int
    crop: str = "center"
    fps: float = 0.0

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of what is kept of a picture, px."""
        if self.crop == "none":
            return 0, 0, width, height
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side

    def stride(self, fps: float, name: str) -> int:
        """Every how many-th frame is kept of an episode of so many frames per second.

        Raises:
            ConfigError: the rate asked for is no whole part of the episode's: gaps would differ in seconds.
        """
        stride = round(fps / self.fps) if self.fps else 1
        if stride < 1 or (self.fps and abs(fps / stride / self.fps - 1) > RATE_TOLERANCE):
            raise ConfigError(
                f"{name} has {fps:g} frames per second, of which {self.fps:g} is no whole part",
                f"try --fps {fps / max(1, stride):g}",
            )
        return stride


@dataclass(frozen=True)
class Episode:
    """Where an episode's frames lie, and what they show.

    Attributes:
        episode_index: Position in the source's sorted order; stable under drops.
        episode_id: Readable name, unique in the raw artifact (``part1/fold_towel/12``).
        task: Name of the task; the unit of "unseen tasks".
        language: Instruction in words; may be empty.
        split: ``train``, ``val`` or ``test``, as the source publishes it.
        length: Number of frames in the store: of what the container promises, every ``stride``-th.
        fps: Frames per second in the store.
        file: File of the raw artifact that holds it, relative to the artifact's root.
        member: Name inside that file, if it is a zip or a folder; LeRobot's name of the camera.
        offset: Position inside that file: the byte in a record file, LeRobot's ``episode_index``.
        bytes: Of its clip or its record in the source.
        stride: Frames of the source from one frame of the store to the next.
        note: What is worth knowing of it: ``too short``, ``no confidences``; empty if nothing is.
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
    bytes: int = 0
    stride: int = 1
    note: str = ""

    def opened(
        self, n_frames: int, fps: float, stride: int, *, language: str, task: str = "", unsure: bool = False
    ) -> Episode:
        """The same episode with what only its files tell.

        Args:
            n_frames: Of the source.
            fps: Of the source.
            stride: Every how many-th is kept.
            language: Instruction; without a task of its own, it names the task.
            task: Name of the task.
            unsure: It does not say how sure its poses are.
        """
        length = -(-n_frames // stride)
        notes = [TOO_SHORT] * (length <= SHORT) + [UNSURE] * unsure
        return replace(
            self,
            length=length,
            fps=fps / stride,
            stride=stride,
            language=language,
            task=task or language or NO_LANGUAGE,
            note=", ".join(notes),
        )


@dataclass(frozen=True)
class Dropped:
    """An episode that cannot be used, by name and with the reason.

    Attributes:
        episode_id: Its name.
        reason: In words.
        kind: ``unpaired`` (a file of it is missing), ``mismatch`` (its files differ in length) or ``damaged``.
        episode_index: Its position among the source's episodes; -1 if it never was one.
    """

    episode_id: str
    reason: str
    kind: str = "damaged"
    episode_index: int = -1


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
    "bytes": "Int64",
    "stride": "Int64",
    "note": "String",
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

    rows = [asdict(one) for one in sorted(dropped, key=lambda one: (one.episode_index, one.episode_id))]
    schema = {"episode_id": pl.String, "reason": pl.String, "kind": pl.String, "episode_index": pl.Int64}
    pl.DataFrame(rows, schema=schema).write_parquet(path)

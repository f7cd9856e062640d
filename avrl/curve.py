"""The training curve: ``log.parquet``, one row a window of steps, and the progress line on a terminal.

Windows are short at first, so that a run of days has something to say of itself in its first minute.

`avrl.watch` writes each row down as it comes and adds what it finds on held-out pairs, now and then. How often is a
runtime option, so that goes into a file of its own, ``looks/held-out.parquet``, beside the pictures.

Rows hold nothing that a clock decides, so that a resumed run writes the same files as an undisturbed one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from avrl.artifact import LOOKS
from avrl.checkpoint import Snapshot
from avrl.progress import bar

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator
    from torch import Tensor

Row = dict[str, float | None]

COLUMNS = ("step", "epoch", "samples", "loss", "skill", "lr", "grad_norm")
FOUND = (  # by `avrl.watch`, now and then
    *("held_out_skill", "rank_cls", "cosine_cls", "std_cls", "rank_patches", "cosine_patches", "std_patches"),
    "probe_r2",
)
HELD_OUT = f"{LOOKS}/held-out.parquet"
ROWS = 1000  # of a run at its last pace, whatever its length: a row is the mean over a window of steps
FIRST = 64  # rows of one step each; then as many of two, of four, up to the last pace


class Curve:
    """Means over windows of steps, summed on the device so that a step does not wait for a number.

    Args:
        total: Steps of the run.
        steps_per_epoch: For the epoch column.
        batch_size: For the samples column.
        found: Snapshot to go on from.
    """

    def __init__(self, total: int, steps_per_epoch: int, batch_size: int, found: Snapshot | None) -> None:
        self.total, self.steps_per_epoch, self.batch_size = total, steps_per_epoch, batch_size
        self.window = 1 << (math.ceil(total / ROWS) - 1).bit_length()
        self.rows: list[Row] = list(found.rows) if found else []
        self._sums: Tensor | None = torch.tensor(found.window, dtype=torch.float64) if found and found.window else None
        self._bar: Any = None

    def progress(self, first: int, rank: int) -> Any:
        """A progress bar on rank 0's terminal."""
        self._bar = bar("pretrain", self.total, "step", initial=first, hidden=rank > 0)
        return self._bar

    def add(
        self, step: int, losses: dict[str, Tensor], norm: Tensor, lr: float, accelerator: Accelerator
    ) -> Row | None:
        """Count a step; at the end of a window all ranks' means become a row, which is returned."""
        values = torch.stack([losses["loss"], losses["error"], losses["reference"], norm]).detach().double()
        self._sums = values if self._sums is None else self._sums.to(values.device) + values
        done = step + 1
        if done % self.window_at(done) and done != self.total:
            return None
        sums = accelerator.reduce(self._sums, "mean").tolist()
        count = done - int(self.rows[-1]["step"] or 0) if self.rows else done
        loss, error, reference, grad_norm = (value / count for value in sums)
        self._sums = None
        skill = 1 - error / reference if reference > 0 else math.nan
        known = (done, done / self.steps_per_epoch, done * self.batch_size, loss, skill, lr, grad_norm)
        row: Row = {**dict(zip(COLUMNS, known, strict=True)), **dict.fromkeys(FOUND)}
        self.rows.append(row)
        if self._bar is not None:
            rate = (self._bar.format_dict.get("rate") or 0) * self.batch_size
            self._bar.set_postfix_str(f"loss {loss:.5f}, skill {skill:.3f}, {rate:.0f} samples/s", refresh=False)
        return row

    def window_at(self, done: int) -> int:
        """Steps of the row that a step is in: powers of two, so that rows of one length end where the next begin."""
        return min(self.window, 1 << max(0, (done // FIRST).bit_length() - 1))

    def snapshot(self, step: int, accelerator: Accelerator) -> Snapshot:
        """The state of the log after so many steps, the same on every rank from here on."""
        if self._sums is not None:
            self._sums = accelerator.reduce(self._sums, "mean")
        return Snapshot(step, self.rows, [] if self._sums is None else self._sums.tolist())

    def write(self, out: Path) -> None:
        """Write ``log.parquet``, one row a window, and what was found at looks, one row a look, if there was one."""
        import polars as pl

        kinds = {name: pl.Int64 if name in ("step", "samples") else pl.Float64 for name in (*COLUMNS, *FOUND)}
        rows = pl.DataFrame(self.rows, schema=kinds)
        rows.select(COLUMNS).write_parquet(out / "log.parquet")
        found = rows.select("step", *FOUND).filter(pl.any_horizontal(pl.col(FOUND).is_not_null()))
        if len(found):
            (out / LOOKS).mkdir(exist_ok=True)
            found.write_parquet(out / HELD_OUT)

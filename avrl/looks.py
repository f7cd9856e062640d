"""Looks: what a run has learned so far, on episodes that it never trains on: pictures, skill, collapse meters, motion.

A look reads fixed pairs, draws nothing from torch's random state and moves no weight: a run that is looked at ends
with the very weights of one that is not, and with the same digest, of which `avrl.artifact.LOOKS` is no part. It runs
on the first rank alone, in float32, whatever the run's arithmetic.

Legend: B samples, T frames, H W pixels, C=3 RGB, N samples, D feature dimensions, K=9 cells of the picture.
"""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from avrl.artifact import LOOKS, write_durably
from avrl.meters import meters
from avrl.objectives.channels import unit
from avrl.pairs import Pairs, parted
from avrl.ridge import Path as RidgePath
from avrl.ridge import choose_alpha

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import polars as pl
    from torch import Tensor

    from avrl.objectives import Objective
    from avrl.pairs import Batch, Sampling
    from avrl.store import FrameStore

log = logging.getLogger(__name__)

PAIRS = 64  # of a look
PASS = 16  # pairs in one forward pass: less memory than a training step takes
SHOWN = 4  # pairs in a picture
BRIGHTER = 4  # times: an error of a tenth would hardly be seen
MARGIN, HEADER = 4, 14  # px
FITTED, FIT, TEST = 64, 512, 256  # episodes and pairs of training that the probe is fitted on; held-out pairs
CELLS = 3  # of the picture, each way: the target of the probe and its readout (``grid``)
DARK = (1 / 255) ** 2  # squared level: below it, a difference is the JPEG's noise, whose logarithm means nothing


class Looks:
    """Fixed pairs of held-out episodes, and what is measured on them.

    Args:
        store: Frames.
        sampling: The run's; its gaps are the look's, so that ``skill`` and ``held_out_skill`` can be compared.
        objective: What is trained, as it stands at each look.
        folder: Where ``looks/`` lies.

    Raises:
        IntegrityError: a frame is damaged.
    """

    def __init__(self, store: FrameStore, sampling: Sampling, objective: Objective, folder: Path) -> None:
        self.store, self.objective, self.folder = store, objective, folder / LOOKS
        self.sampling = replace(sampling, seed=0)  # runs of different seeds are looked at on the same pairs
        self.training, self.held_out = parted(store.episodes)
        self.device = next(objective.parameters()).device  # type: ignore[attr-defined]
        self.batches = list(self._batches(self.held_out, PAIRS)) if len(self.held_out) else []
        if not self.batches:
            log.info("%d episodes are too few to hold some out: no pictures, no meters", len(store.episodes))

    def _batches(self, episodes: pl.DataFrame, number: int) -> Iterator[Batch]:
        """So many pairs of these episodes, in passes."""
        pairs = Pairs(self.store, replace(self.sampling, pairs_per_episode=number), PASS, episodes)
        return (pairs.batch(step) for step in range(number // PASS))

    def cut_back(self, step: int) -> None:
        """Remove the pictures of later steps: the run goes on from this one."""
        for path in self.folder.glob("step-*.png"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()

    @torch.no_grad()
    def look(self, step: int) -> dict[str, float]:
        """Draw ``looks/step-<n>.png``; return the columns ``held_out_skill`` and those of `avrl.meters`."""
        encoder = self.objective.encoder()
        error, reference, cls, patches = 0.0, 0.0, [], []
        for batch in self.batches:
            frames, gap, seed = (one.to(self.device) for one in (batch.frames_BTHWC, batch.gap_B, batch.seed_B))
            parts = self.objective.loss(frames, gap, seed)
            error, reference = error + float(parts["error"]), reference + float(parts["reference"])
            readouts, patches_BND = encoder.codes(frames[:, (0, -1)])
            cls.append(readouts["cls"])
            patches.append(patches_BND.flatten(0, 1))
        skill = 1 - error / reference if reference > 0 else float("nan")
        self._draw(step)
        return {"held_out_skill": skill, **meters(torch.cat(cls), torch.cat(patches))}

    def _draw(self, step: int) -> None:
        first = self.batches[0]
        chosen = (first.frames_BTHWC[:SHOWN].to(self.device), first.seed_B[:SHOWN].to(self.device))
        self.folder.mkdir(exist_ok=True)
        write_durably(self.folder / f"step-{step:09d}.png", sheet(self.objective.panels(*chosen)))

    @torch.no_grad()
    def probe(self) -> float:
        """How well a linear readout tells where pixels change: R2 on held-out episodes, pooled over `CELLS`^2 cells.

        The target is made of the pair's own pixels (`motion`). The readout is fitted on episodes of training, of which
        one in four chooses the strength of the ridge. Pooled, for a cell that hardly moves would drown the others.
        """
        known = self.training.gather_every(max(1, len(self.training) // FITTED)).head(FITTED)
        choosing = [row % 4 == 3 for row in range(len(known))]
        z_valid, y_valid = self._read(known.filter(choosing), FIT // 4)
        z, y = self._read(known.filter([not one for one in choosing]), FIT - FIT // 4)
        z_test, y_test = self._read(self.held_out, TEST)
        fit = RidgePath(z, y).fit(choose_alpha(z, y, z_valid, y_valid))
        error = (fit.predict(z_test) - y_test).square().mean(0)
        return 1 - float(error.sum() / y_test.var(0, unbiased=False).sum())

    def _read(self, episodes: pl.DataFrame, number: int) -> tuple[Tensor, Tensor]:
        """Features (N, D) and targets (N, K) of so many pairs, float64 on the CPU."""
        encoder, z, y = self.objective.encoder(), [], []
        for batch in self._batches(episodes, number):
            ends = batch.frames_BTHWC[:, (0, -1)].to(self.device)
            z.append(encoder.encode(ends)["grid"].double().cpu())
            y.append(motion(ends).double().cpu())
        return torch.cat(z), torch.cat(y)


def motion(frames_BTHWC: Tensor) -> Tensor:
    """Logarithm of the mean squared difference of two frames in [0, 1], in each cell of the picture: (B, K)."""
    change_BCHW = unit(frames_BTHWC, frames_BTHWC.shape[2]).diff(dim=1)[:, 0]
    return (F.adaptive_avg_pool2d(change_BCHW.square().mean(1), CELLS) + DARK).log().flatten(1)


def sheet(panels: dict[str, Tensor]) -> bytes:
    """A PNG: a row a sample, a column a panel, and last how far the two last ones are apart.

    Args:
        panels: Name -> pictures (B, 3, H, W) in [0, 1], all of one size; prediction and target come last.
    """
    from PIL import Image, ImageDraw, ImageFont

    *_, predicted, target = panels.values()
    columns = {**panels, f"error x {BRIGHTER}": (predicted - target).abs() * BRIGHTER}
    height, width = (side + MARGIN for side in target.shape[2:])
    picture = Image.new("RGB", (len(columns) * width, HEADER + len(target) * height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default_imagefont()
    for column, (name, pictures_BCHW) in enumerate(columns.items()):
        pen.text((column * width, 1), name, "black", font)
        levels = (pictures_BCHW.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for row, one in enumerate(levels):
            picture.paste(Image.fromarray(np.ascontiguousarray(one)), (column * width, HEADER + row * height))
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()

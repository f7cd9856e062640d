"""Probes: what is fitted on frozen features. One file each.

Legend: N pairs, D feature dimensions, M a part of the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np

    from avrl.encoders import Encoder


WIDE = "grid"  # the readout of most dimensions: a probe of a subset makes and scores it only if it is named
STEP = 64  # pairs that an attentive probe learns from at once: part of what it finds, so nobody's to choose


@dataclass(frozen=True)
class Who:
    """Whose features are scored: the columns that name a row; `weights` as `avrl.encoders.pins.whose` has it."""

    encoder: str
    checkpoint: str
    init: str
    licence: str = ""
    weights: str = ""


@dataclass(frozen=True)
class Task:
    """What is predicted, and how it is scored.

    Attributes:
        probe: Name of what is predicted, as the command line has it.
        gap: Frames between the two of a pair.
        target: One of `avrl.labels.TARGETS`; empty where a probe has but one.
        readouts: Which to score; empty for all.
        seed: Of the validation episodes, of smaller training sets and of the bootstrap.
        resamples: Of the bootstrap over test episodes.
        data_digests: Of labels, if it has any, and frames, for the fingerprint: a floor of other pixels is another one.
        solver: ``ridge`` or ``attentive``.
        samples: Pairs that the attentive probe sees in training; 0 for the ridge.
    """

    probe: str
    gap: int
    target: str
    readouts: tuple[str, ...]
    seed: int
    resamples: int
    data_digests: tuple[str, ...]
    solver: str = "ridge"
    samples: int = 0


@dataclass(frozen=True)
class Given:
    """What a probe reads: roots of artifacts, or an encoder for one that looks at patches.

    Attributes:
        frames: A frame store, for splits, tasks and pixels.
        labels: What a robot or a hand did.
        features: Vectors of frames or pairs; None for floors.
        stills: Of an encoder of pairs, those of a frame shown twice, where the probe asks for them.
        encoder: Frozen, on its device.
        device: Where the encoder is.
        batch_size: Rows a forward pass.
        raw: What the frames were made of, if it is at hand and the probe asks for it.
        scratch: Where a fit of many steps keeps its state, to go on after a kill; None: nowhere.
    """

    frames: Path
    labels: Path | None = None
    features: Path | None = None
    stills: Path | None = None
    encoder: Encoder | None = None
    device: str = "cpu"
    batch_size: int = 64
    raw: Path | None = None
    scratch: Path | None = None


class Inputs(Protocol):
    """Vectors of pairs by the pairs' numbers, so that they need not all be in memory: `avrl.features.Vectors`.

    Attributes:
        readout: Of the encoder.
        pairing: How two frames became one vector.
        dims: D.
    """

    @property
    def readout(self) -> str: ...  # noqa: D102
    @property
    def pairing(self) -> str: ...  # noqa: D102
    @property
    def dims(self) -> int: ...  # noqa: D102

    def blocks(self, index_M: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some pairs by their numbers, in rising order: numbers (m,) and vectors (m, D) float32, some at a time."""
        ...

"""Optical flow as a stage of the noun `labels`: frames -> what a teacher says of how places move."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from avrl.config import Opt
from avrl.stage import Built, Inputs, Stage


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Which pairs, and who says how they move."""

    gap: Annotated[int, Opt("Gap of a pair", unit="frames")]
    pairs: Annotated[int, Opt("Pairs at most, spread over episodes")]
    seed: Annotated[int, Opt("Draws the pairs")]
    teacher: Annotated[Literal["dis", "raft"], Opt("Who finds the flow")]
    weights: Annotated[str, Opt("SHA-256 of the teacher's weights")] = ""
    weights_path: Annotated[str, Opt("File of the teacher's weights", runtime=True)] = ""
    device: Annotated[Literal["auto", "cpu"], Opt("auto: a GPU if there is one", runtime=True)] = "auto"


def _build(config: FlowConfig, inputs: Inputs, out: Path) -> Built:
    import torch

    from avrl.flow_labels import extract

    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu"
    asked = {"gap": config.gap, "pairs": config.pairs, "seed": config.seed, "teacher": config.teacher}
    file = Path(config.weights_path) if config.weights_path else None
    return Built(extract(inputs["frames"].root, out, file=file, device=device, **asked))  # type: ignore[arg-type]


STAGE = Stage("labels", 3, FlowConfig, lambda config, inputs: f"flow-{config.teacher}-gap{config.gap}", _build)

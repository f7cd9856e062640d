"""Optical flow as a stage of the noun `labels`: frames -> what a teacher says of how places move."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from avrl.config import Opt
from avrl.encoders import Known
from avrl.errors import IntegrityError, MissingError, NotFoundError
from avrl.stage import Built, Inputs, Stage

TORCHVISION = "https://download.pytorch.org/models"
# Kept and fetched as encoders' weights are. A file's name ends with the first digits of its SHA-256.
RAFT = {
    name: Known("avrl.flow_labels", name, "BSD-3-Clause", url=f"{TORCHVISION}/{file}")
    for name, file in (
        ("raft", "raft_large_C_T_SKHT_V2-ff5fadd5.pth"),
        ("raft-small", "raft_small_C_T_V2-01064c6d.pth"),
    )
}


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Which pairs, and who says how they move."""

    gap: Annotated[int, Opt("Gap of a pair", unit="frames")]
    pairs: Annotated[int, Opt("Pairs at most, spread over episodes")]
    seed: Annotated[int, Opt("Draws the pairs")]
    teacher: Annotated[Literal["dis", "raft", "raft-small"], Opt("Who finds the flow")]
    weights: Annotated[str, Opt("SHA-256 of the teacher's weights")] = ""
    weights_path: Annotated[str, Opt("File of the teacher's weights", runtime=True)] = ""
    device: Annotated[Literal["auto", "cpu"], Opt("auto: a GPU if there is one", runtime=True)] = "auto"


def weights_of(teacher: str, given: str = "") -> Path | None:
    """File of a teacher's weights: the user's own, else torchvision's (fetched the first time); None if it has none.

    Raises:
        NotFoundError: there is no such file.
        MissingError: torchvision's is not at hand and does not come.
        IntegrityError: it is not what was published.
        TemporaryError: the download broke off.
        DiskFullError: no space for it.
    """
    if given and not Path(given).is_file():
        raise NotFoundError(
            f"no weights file {given}", "pass torchvision's file of RAFT, or leave --teacher-weights out"
        )
    if given or teacher not in RAFT:
        return Path(given) if given else None
    from avrl.encoders import pins
    from avrl.encoders.hub import from_address

    url = RAFT[teacher].url
    try:
        path = from_address(teacher, RAFT[teacher])
    except MissingError as error:
        command = f"avrl fetch encoders --encoder {teacher}"
        raise MissingError(error.cause, f"where there is network: {command}; or pass --teacher-weights FILE") from error
    digits, found = Path(url).stem.rpartition("-")[2], pins.digest(path)
    if not found.startswith(digits):
        raise IntegrityError(
            f"{path} is not what was published as {url}: its SHA-256 begins with {found[: len(digits)]}",
            f"rm {path} and run the same command",
        )
    return path


def _build(config: FlowConfig, inputs: Inputs, out: Path) -> Built:
    import torch

    from avrl.flow_labels import extract

    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu"
    asked = {"gap": config.gap, "pairs": config.pairs, "seed": config.seed, "teacher": config.teacher}
    file = Path(config.weights_path) if config.weights_path else None
    return Built(extract(inputs["frames"].root, out, file=file, device=device, **asked))  # type: ignore[arg-type]


STAGE = Stage("labels", 3, FlowConfig, lambda config, inputs: f"flow-{config.teacher}-gap{config.gap}", _build)

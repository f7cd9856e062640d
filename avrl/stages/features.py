"""Stage `features`: frames -> vectors of a frozen encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from avrl.config import Opt
from avrl.encoders import licence
from avrl.stage import Built, Inputs, Stage

if TYPE_CHECKING:
    from avrl.encoders import Encoder


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Which frozen encoder; `gap` is 0 for an encoder of single frames, whose features serve every gap."""

    encoder: Annotated[str, Opt("Encoder")]
    init: Annotated[Literal["trained", "pretrained", "random"], Opt("Weights")]
    gap: Annotated[int, Opt("Gap of a pair", unit="frames")]
    weights: Annotated[str, Opt("SHA-256 of the weights file")] = ""
    weights_path: Annotated[str, Opt("Weights file", runtime=True)] = ""
    batch_size: Annotated[int, Opt("Rows a forward pass", runtime=True)] = 64
    device: Annotated[Literal["auto", "cpu"], Opt("auto: a GPU if there is one", runtime=True)] = "auto"


def frozen(config: Any, inputs: Inputs) -> tuple[Encoder, str]:
    """The frozen encoder of a request (its `encoder`, `init`, `weights_path`, `device`), and the device it is on."""
    import torch

    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu"
    if "checkpoint" in inputs:
        from avrl.artifact import verify
        from avrl.checkpoint import load
        from avrl.objectives import modules

        verify(inputs["checkpoint"])  # safetensors carries no checksum: a flipped bit would load
        objective = load(inputs["checkpoint"].root, init=config.init)
        modules(objective).to(device)
        return objective.encoder(), device
    from avrl import encoders

    path = Path(config.weights_path) if config.weights_path else None
    init = "pretrained" if config.init == "none" else config.init  # a floor is what it is
    encoder = encoders.load(config.encoder, init=init, weights=path)
    return (encoder.to(device) if hasattr(encoder, "to") else encoder), device


def _build_features(config: FeaturesConfig, inputs: Inputs, out: Path) -> Built:
    import torch

    from avrl.encoders import weights
    from avrl.features import extract

    encoder, device = frozen(config, inputs)
    facts = extract(encoder, inputs["frames"].root, out, gap=config.gap, batch_size=config.batch_size, device=device)
    facts |= {"encoder": config.encoder, "init": config.init, "device": device}
    if isinstance(encoder, torch.nn.Module):
        facts["parameters"] = sum(one.numel() for one in encoder.parameters())
    if not config.weights:  # our own, whose licence comes with the checkpoint, or none at all
        return Built(facts)
    path = Path(config.weights_path) if config.weights_path else None
    return Built({**facts, "weights": weights.origin(config.encoder, path)}, licence(config.encoder))


def called(config: Any) -> str:
    """Name of what is encoded, for slugs."""
    twin = "-untrained" if config.init == "random" else ""
    gap = f"-gap{config.gap}" if config.gap else ""
    return f"{config.encoder.replace(':', '-').replace('/', '-')}{twin}{gap}"


FEATURES = Stage("features", 2, FeaturesConfig, lambda config, inputs: called(config), _build_features)

"""The stages behind ``probe``: features (frozen encoder), labels (what the robot did), scores (the probe)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from avrl.config import Opt
from avrl.encoders import ENCODERS, licence
from avrl.errors import ConfigError
from avrl.stage import Built, Inputs, Stage

if TYPE_CHECKING:
    from avrl.artifact import Artifact
    from avrl.encoders import Encoder

FLOORS = ("mean", "state")  # floors that need no features


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


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """States and actions of every frame; nothing to choose."""


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """What is predicted, from whose features."""

    encoder: Annotated[str, Opt("Encoder or floor")]
    init: Annotated[Literal["trained", "pretrained", "random", "none"], Opt("Weights")]
    checkpoint: Annotated[str, Opt("Reference of our checkpoint")]
    gap: Annotated[int, Opt("Gap of a pair", unit="frames")]
    target: Annotated[Literal["reached", "commanded"], Opt("Target")]
    readout: Annotated[tuple[str, ...], Opt("Readouts; empty for all")]
    seed: Annotated[int, Opt("Of validation episodes and bootstrap")]
    resamples: Annotated[int, Opt("Of the bootstrap")]


def require_split(store: Artifact, gaps: tuple[int, ...]) -> None:
    """Refuse a frame store that cannot be scored, before features are made of it.

    Raises:
        ConfigError: fewer than two training episodes, or none held out, are longer than a gap.
    """
    import polars as pl

    episodes = pl.read_parquet(store.root / "episodes.parquet", columns=["length", "split"])
    for gap in gaps:
        splits = episodes.filter(pl.col("length") > gap)["split"].to_list()
        n_train = splits.count("train")
        if n_train < 2 or n_train == len(splits):
            raise ConfigError(
                f"{store.ref} has {n_train} training and {len(splits) - n_train} held-out episodes of more than {gap} "
                "frames, at least 2 and 1 are needed",
                "prep a copy with both (avrl fetch bridge --part train,val; some are train only), or a smaller --gap",
            )


def _encoder(config: FeaturesConfig, inputs: Inputs, device: str) -> Encoder:
    if "checkpoint" in inputs:
        from avrl.artifact import verify
        from avrl.checkpoint import load
        from avrl.objectives import modules

        verify(inputs["checkpoint"])  # safetensors carries no checksum: a flipped bit would load
        objective = load(inputs["checkpoint"].root, init=config.init)
        modules(objective).to(device)
        return objective.encoder()
    from avrl import encoders

    path = Path(config.weights_path) if config.weights_path else None
    encoder = encoders.load(config.encoder, init=config.init, weights=path)
    return encoder.to(device) if hasattr(encoder, "to") else encoder


def _build_features(config: FeaturesConfig, inputs: Inputs, out: Path) -> Built:
    import torch

    from avrl.encoders import weights
    from avrl.features import extract

    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu"
    encoder = _encoder(config, inputs, device)
    facts = extract(encoder, inputs["frames"].root, out, gap=config.gap, batch_size=config.batch_size, device=device)
    facts |= {"encoder": config.encoder, "init": config.init, "device": device}
    if not config.weights:  # our own, whose licence comes with the checkpoint, or none at all
        return Built(facts)
    path = Path(config.weights_path) if config.weights_path else None
    return Built({**facts, "weights": weights.origin(config.encoder, path)}, licence(config.encoder))


def _build_labels(config: LabelsConfig, inputs: Inputs, out: Path) -> Built:
    from avrl.labels import extract

    return Built(extract(inputs["raw"].root, inputs["frames"].root, out))


def _build_scores(config: ScoresConfig, inputs: Inputs, out: Path) -> Built:
    from avrl.artifact import verify
    from avrl.probing import Task, Who, score

    for role in ("labels", "features"):
        if role in inputs:
            verify(inputs[role])
    features = inputs.get("features")
    task = Task(
        gap=config.gap,
        target=config.target,
        readouts=config.readout,
        seed=config.seed,
        resamples=config.resamples,
        data_digests=(inputs["labels"].digest, inputs["frames"].digest),
    )
    who = Who(config.encoder, config.checkpoint, config.init)
    roots = inputs["labels"].root, inputs["frames"].root, features.root if features else None
    return Built(score(out, who, task, *roots))


def _name(config: FeaturesConfig | ScoresConfig) -> str:
    twin = "-untrained" if config.init == "random" else ""
    gap = f"-gap{config.gap}" if config.gap else ""
    return f"{config.encoder.replace(':', '-').replace('/', '-')}{twin}{gap}"


FEATURES = Stage("features", 2, FeaturesConfig, lambda config, inputs: _name(config), _build_features)
LABELS = Stage("labels", 2, LabelsConfig, lambda config, inputs: inputs["raw"].ref.rsplit("-", 1)[0], _build_labels)
SCORES = Stage("scores", 2, ScoresConfig, lambda config, inputs: f"{_name(config)}-{config.target}", _build_scores)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is predicted, and how it is scored."""

    gap: Annotated[tuple[int, ...], Opt("Gaps between the two frames of a pair", unit="frames of the store")] = (1,)
    target: Annotated[
        Literal["reached", "commanded"], Opt("Motion that happened (state difference), or that was commanded")
    ] = "reached"
    readout: Annotated[tuple[str, ...], Opt("Readouts to score; empty for all")] = ()
    seed: Annotated[int, Opt("Of validation episodes and bootstrap")] = 0
    resamples: Annotated[int, Opt("Of the bootstrap over test episodes")] = 1000
    batch_size: Annotated[int, Opt("Rows a forward pass", runtime=True)] = 64
    device: Annotated[Literal["auto", "cpu"], Opt("auto: a GPU if there is one", runtime=True)] = "auto"

    def __post_init__(self) -> None:
        if not self.gap or min(self.gap) < 1:
            raise ConfigError(f"--gap {','.join(map(str, self.gap))} is not a list of positive numbers of frames")
        if self.resamples < 100 or self.batch_size < 1:
            raise ConfigError("--resamples takes at least 100, --batch-size at least 1")


@dataclass(frozen=True)
class Entry:
    """One encoder to probe, with one set of weights.

    Attributes:
        name: What rows call it.
        init: ``trained`` (our checkpoint), ``pretrained``, ``random`` (untrained twin), ``none`` (floor).
        checkpoint: Our checkpoint, if it is ours.
        weights: Weights file that the user named.
    """

    name: str
    init: Literal["trained", "pretrained", "random", "none"]
    checkpoint: Artifact | None = None
    weights: str = ""

    def features(self, config: ProbeConfig, gap: int) -> FeaturesConfig | None:
        """The features it needs for a gap; None for a floor that needs none.

        Raises:
            MissingError: its weights are not at hand.
        """
        if self.name in FLOORS:
            return None
        paired = self.checkpoint is not None or (self.name in ENCODERS and ENCODERS[self.name].paired)
        digest = ""
        if self.checkpoint is None and self.init != "random":
            from avrl.encoders.weights import identity

            digest = identity(self.name, self.init, Path(self.weights) if self.weights else None)
        return FeaturesConfig(
            encoder=self.name,
            init="random" if self.init == "random" else "trained" if self.checkpoint else "pretrained",
            gap=gap if paired else 0,
            weights=digest,
            weights_path="" if self.init == "random" else self.weights,
            batch_size=config.batch_size,
            device=config.device,
        )

    def scores(self, config: ProbeConfig, gap: int) -> ScoresConfig:
        """The scores stage's request."""
        return ScoresConfig(
            encoder=self.name,
            init=self.init,
            checkpoint=self.checkpoint.ref if self.checkpoint else "",
            gap=gap,
            target=config.target,
            readout=config.readout,
            seed=config.seed,
            resamples=config.resamples,
        )

"""The stages behind ``probe``: features (frozen encoder), labels (what the robot did), scores (the probe)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from avrl.config import Opt
from avrl.errors import ConfigError
from avrl.stage import Built, Inputs, Stage

if TYPE_CHECKING:
    from avrl.artifact import Artifact
    from avrl.encoders import Encoder

UNSEEING = ("mean", "state", "oracle")  # floors, and a ceiling, that need no features
PAIRED = ("pixels-8", "pixels-16")  # encoders of pairs that are not checkpoints: known here without torch


@dataclass(frozen=True)
class Kind:
    """Something that can be probed.

    Attributes:
        source: Whose frames, unless ``--on`` says otherwise.
        module: Its `score` makes the scores.
        floors: What is scored along with every encoder.
        labelled: It needs labels of the raw data.
        dense: It encodes patches by itself; else it reads features.
        told: It asks what the raw data say of their tasks, if they are at hand.
    """

    source: str
    module: str
    floors: tuple[str, ...]
    labelled: bool = False
    dense: bool = False
    told: bool = False


MOTION = ("mean", "state", "pixels-8", "pixels-16", "oracle")
KINDS = {
    "bridge": Kind("bridge", "avrl.probing", MOTION, labelled=True),
    "order": Kind("egodex", "avrl.order", PAIRED, told=True),
    "clusters": Kind("egodex", "avrl.clusters", PAIRED),
}


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
    """What is predicted, from whose features. Only a dense probe has weights here: others have them in the features."""

    probe: Annotated[str, Opt("What is predicted")]
    encoder: Annotated[str, Opt("Encoder or floor")]
    init: Annotated[Literal["trained", "pretrained", "random", "none"], Opt("Weights")]
    checkpoint: Annotated[str, Opt("Reference of our checkpoint")]
    gap: Annotated[int, Opt("Gap of a pair", unit="frames")]
    target: Annotated[Literal["reached", "commanded", ""], Opt("Target")]
    readout: Annotated[tuple[str, ...], Opt("Readouts; empty for all")]
    seed: Annotated[int, Opt("Of validation episodes and bootstrap")]
    resamples: Annotated[int, Opt("Of the bootstrap")]
    weights: Annotated[str, Opt("SHA-256 of the weights file")] = ""
    weights_path: Annotated[str, Opt("Weights file", runtime=True)] = ""
    batch_size: Annotated[int, Opt("Rows a forward pass", runtime=True)] = 64
    device: Annotated[Literal["auto", "cpu"], Opt("auto: a GPU if there is one", runtime=True)] = "auto"


def require_split(store: Artifact, gaps: tuple[int, ...]) -> None:
    """Refuse a frame store that cannot be scored, before features are made of it.

    Raises:
        ConfigError: fewer than two training episodes, or none held out, are longer than a gap.
    """
    import polars as pl

    from avrl.splits import is_test

    episodes = pl.read_parquet(store.root / "episodes.parquet", columns=["length", "split", "task"])
    for gap in gaps:
        test = is_test(episodes)[(episodes["length"] > gap).to_numpy()]
        n_test = int(test.sum())
        if len(test) - n_test < 2 or not n_test:
            raise ConfigError(
                f"{store.ref} has {len(test) - n_test} training and {n_test} held-out episodes of more than {gap} "
                "frames, at least 2 and 1 are needed",
                "prep a copy with both (avrl fetch bridge --part train,val; some are train only), or a smaller --gap",
            )


def _encoder(config: FeaturesConfig | ScoresConfig, inputs: Inputs) -> tuple[Encoder, str]:
    """The frozen encoder of a request, and the device it is on."""
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
    from avrl.features import extract

    encoder, device = _encoder(config, inputs)
    facts = extract(encoder, inputs["frames"].root, out, gap=config.gap, batch_size=config.batch_size, device=device)
    return Built({**facts, "encoder": config.encoder, "init": config.init, "device": device})


def _build_labels(config: LabelsConfig, inputs: Inputs, out: Path) -> Built:
    from avrl.labels import extract

    return Built(extract(inputs["raw"].root, inputs["frames"].root, out))


def _build_scores(config: ScoresConfig, inputs: Inputs, out: Path) -> Built:
    from avrl.artifact import verify
    from avrl.probes import Given, Task, Who

    for role in ("labels", "features"):
        if role in inputs:
            verify(inputs[role])
    kind, roots = KINDS[config.probe], {role: one.root for role, one in inputs.items()}
    task = Task(
        probe=config.probe,
        gap=config.gap,
        target=config.target,
        readouts=config.readout,
        seed=config.seed,
        resamples=config.resamples,
        data_digests=tuple(inputs[role].digest for role in ("labels", "frames") if role in inputs),
    )
    licence = inputs["features"].manifest.facts.get("licence", "") if "features" in inputs else ""
    given = Given(
        roots["frames"],
        roots.get("labels"),
        roots.get("features"),
        _encoder(config, inputs)[0] if kind.dense and config.encoder not in UNSEEING else None,
        config.batch_size,
        roots.get("raw"),
    )
    module = importlib.import_module(kind.module)
    return Built(module.score(out, Who(config.encoder, config.checkpoint, config.init, licence), task, given))


def _name(config: FeaturesConfig | ScoresConfig) -> str:
    twin = "-untrained" if config.init == "random" else ""
    gap = f"-gap{config.gap}" if config.gap else ""
    return f"{config.encoder.replace(':', '-').replace('/', '-')}{twin}{gap}"


FEATURES = Stage("features", 1, FeaturesConfig, lambda config, inputs: _name(config), _build_features)
LABELS = Stage("labels", 2, LabelsConfig, lambda config, inputs: inputs["raw"].ref.rsplit("-", 1)[0], _build_labels)
SCORES = Stage(
    "scores",
    3,
    ScoresConfig,
    lambda config, inputs: "-".join(filter(None, (config.probe, _name(config), config.target))),
    _build_scores,
)


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
        if self.name in UNSEEING:
            return None
        paired = self.checkpoint is not None or self.name in PAIRED
        return FeaturesConfig(
            encoder=self.name,
            init="random" if self.init == "random" else "trained" if self.checkpoint else "pretrained",
            gap=gap if paired else 0,
            weights=self.identity(),
            weights_path="" if self.init == "random" else self.weights,
            batch_size=config.batch_size,
            device=config.device,
        )

    def identity(self) -> str:
        """SHA-256 of the weights file of an outside encoder; empty for others.

        Raises:
            MissingError: the weights are not at hand.
        """
        if self.checkpoint or self.init == "random" or self.name in UNSEEING:
            return ""
        from avrl.encoders.weights import identity

        return identity(self.name, self.init, Path(self.weights) if self.weights else None)

    def scores(self, config: ProbeConfig, probe: str, gap: int) -> ScoresConfig:
        """The scores stage's request."""
        kind = KINDS[probe]
        asked = ScoresConfig(
            probe=probe,
            encoder=self.name,
            init=self.init,
            checkpoint=self.checkpoint.ref if self.checkpoint else "",
            gap=gap,
            target=config.target if kind.labelled else "",
            readout=config.readout,
            seed=config.seed,
            resamples=config.resamples,
            device=config.device,
            batch_size=config.batch_size,
        )
        return replace(asked, weights=self.identity(), weights_path=self.weights) if kind.dense else asked

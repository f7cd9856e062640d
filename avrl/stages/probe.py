"""The stages behind ``probe``, but for features: labels (what a robot or a hand did) and scores (the probe)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from avrl.config import Opt
from avrl.encoders import ENCODERS, known, licence, pins
from avrl.errors import ConfigError
from avrl.probes import STEP
from avrl.stage import Built, Inputs, Stage
from avrl.stages.features import FeaturesConfig, called, frozen

if TYPE_CHECKING:
    from avrl.artifact import Artifact

UNSEEING = ("mean", "state", "oracle", "zero")  # floors, and a ceiling, that need no features


@dataclass(frozen=True)
class Kind:
    """Something that can be probed.

    Attributes:
        source: Whose frames, unless ``--on`` says otherwise.
        module: Its `score` makes the scores.
        floors: What is scored along with every encoder.
        labelled: It needs labels of the raw data.
        commands: These hold what was commanded, beside what was reached.
        dense: It encodes patches by itself; else it reads features.
        flow: Its labels are optical flow.
        told: It asks what the raw data say of their tasks, if they are at hand.
        rows: Which pairs it looks at, of those that `avrl.subsets` knows.
    """

    source: str
    module: str
    floors: tuple[str, ...]
    labelled: bool = False
    commands: bool = False
    dense: bool = False
    flow: bool = False
    told: bool = False
    rows: Literal["all", "order", "clusters"] = "all"


PIXELS = ("pixels-8", "pixels-16")
MOTION = ("mean", "state", *PIXELS, "oracle")
KINDS = {
    "bridge": Kind("bridge", "avrl.probing", MOTION, labelled=True, commands=True),
    "egodex": Kind("egodex", "avrl.probing", MOTION, labelled=True),
    "lerobot": Kind("lerobot", "avrl.probing", MOTION, labelled=True, commands=True),
    "flow": Kind("egodex", "avrl.flow", ("mean", "zero", *PIXELS), dense=True, flow=True),
    "order": Kind("egodex", "avrl.order", PIXELS, told=True, rows="order"),
    "clusters": Kind("egodex", "avrl.clusters", PIXELS, rows="clusters"),
}


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """What was recorded of every frame; nothing to choose."""


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
    solver: Annotated[Literal["ridge", "attentive"], Opt("Family of the probe")]
    samples: Annotated[int, Opt("Pairs an attentive probe sees in training")]
    pairs: Annotated[int, Opt("Pairs that flow is found of")]
    teacher: Annotated[str, Opt("Who finds the flow")]
    whose: Annotated[str, Opt("An outside encoder's weights: published, or a file")] = ""
    weights: Annotated[str, Opt("SHA-256 of the weights file")] = ""
    weights_path: Annotated[str, Opt("Weights file", runtime=True)] = ""
    batch_size: Annotated[int, Opt("Rows a forward pass", runtime=True)] = 64
    device: Annotated[Literal["auto", "cpu"], Opt("auto: a GPU if there is one", runtime=True)] = "auto"


def looks(config: ScoresConfig) -> bool:
    """Whether a request encodes patches by itself."""
    return KINDS[config.probe].dense or config.solver == "attentive"


def _build_labels(config: LabelsConfig, inputs: Inputs, out: Path) -> Built:
    from avrl.copies import require_same
    from avrl.labels import extract

    require_same(inputs["raw"])  # else labels of what is now would stand beside frames of what was
    return Built(extract(inputs["raw"].root, inputs["frames"].root, out, inputs["raw"].manifest.config["source"]))


def _build_scores(config: ScoresConfig, inputs: Inputs, out: Path) -> Built:
    from avrl.artifact import verify
    from avrl.probes import Given, Task, Who

    for one in (inputs[role] for role in ("labels", "features", "stills") if role in inputs):
        verify(one)
    kind, roots = KINDS[config.probe], {role: one.root for role, one in inputs.items()}
    task = Task(
        probe=config.probe,
        gap=config.gap,
        target=config.target,
        readouts=config.readout,
        seed=config.seed,
        resamples=config.resamples,
        solver=config.solver,
        samples=config.samples if config.solver == "attentive" else 0,
        data_digests=tuple(inputs[role].digest for role in ("labels", "frames") if role in inputs),
    )
    given = Given(
        roots["frames"],
        roots.get("labels"),
        roots.get("features"),
        roots.get("stills"),
        batch_size=config.batch_size,
        raw=roots.get("raw"),
    )
    if looks(config) and config.encoder not in UNSEEING:
        encoder, device = frozen(config, inputs)
        given = replace(given, encoder=encoder, device=device)
    name = pins.named(config.encoder, config.whose)
    who = Who(name, config.checkpoint, config.init, _terms(config, inputs), config.whose)
    return Built(importlib.import_module(kind.module).score(out, who, task, given))


def _terms(config: ScoresConfig, inputs: Inputs) -> str:
    """Licence of the weights; of our own, that of what they were trained on. Random weights are nobody's."""
    if config.init in ("random", "none"):
        return ""
    if not config.checkpoint:
        return "; ".join(licence(config.encoder, config.whose))
    return "; ".join((inputs.get("checkpoint") or inputs["features"]).manifest.licence)


LABELS = Stage("labels", 3, LabelsConfig, lambda config, inputs: inputs["raw"].ref.rsplit("-", 1)[0], _build_labels)
SCORES = Stage(
    "scores",
    7,
    ScoresConfig,
    lambda config, inputs: "-".join(
        filter(None, (config.probe, called(config), config.target, config.solver.removeprefix("ridge")))
    ),
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
    seed: Annotated[tuple[int, ...], Opt("Of validation episodes, few examples and bootstrap", flag="--seeds")] = (0,)
    resamples: Annotated[int, Opt("Of the bootstrap over test episodes")] = 1000
    solver: Annotated[Literal["ridge", "attentive"], Opt("Closed form on vectors, or one query over all patches")] = (
        "ridge"
    )
    samples: Annotated[int, Opt("Pairs that an attentive probe sees in training")] = 100_000
    pairs: Annotated[int, Opt("Pairs at most that flow is found of, spread over episodes")] = 2000
    teacher: Annotated[
        Literal["dis", "raft", "raft-small"], Opt("Who finds the flow: OpenCV's DIS, or torchvision's RAFT")
    ] = "dis"
    teacher_weights: Annotated[
        str, Opt("torchvision's file of RAFT, large or small, instead of the published one", runtime=True)
    ] = ""
    batch_size: Annotated[int, Opt("Rows a forward pass", runtime=True)] = 64
    device: Annotated[Literal["auto", "cpu"], Opt("auto: a GPU if there is one", runtime=True)] = "auto"

    @property
    def readouts(self) -> tuple[str, ...]:
        """Those to score, in one order however they were typed: another would be another request."""
        return tuple(sorted(set(self.readout)))

    def __post_init__(self) -> None:
        if not self.seed:
            raise ConfigError("--seeds names no seed", "type: --seeds 0,1,2")
        if not self.gap or min(self.gap) < 1:
            raise ConfigError(f"--gap {','.join(map(str, self.gap))} is not a list of positive numbers of frames")
        if self.teacher == "dis" and self.teacher_weights:
            raise ConfigError("--teacher-weights are RAFT's, and dis has none", "type: --teacher raft")
        if self.samples < STEP:
            raise ConfigError(f"--samples {self.samples} is less than one step of {STEP}")
        if self.resamples < 100 or min(self.batch_size, self.pairs) < 1:
            raise ConfigError("--resamples takes at least 100, --batch-size and --pairs at least 1")


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

    def features(self, config: ProbeConfig, probe: str, gap: int, seed: int, frames: int) -> FeaturesConfig | None:
        """The features it needs for a gap of a store of so many frames; None for what needs none.

        A store of few frames is encoded whole, for all probes at once.

        Raises:
            MissingError: its weights are not at hand.
        """
        from avrl.subsets import PAIRS

        if self.name in UNSEEING or looks(self.scores(config, probe, gap, seed)):
            return None
        rows = KINDS[probe].rows if frames > PAIRS else "all"
        return FeaturesConfig(
            encoder=self.name,
            init="random" if self.init == "random" else "trained" if self.checkpoint else "pretrained",
            gap=gap if self.paired or rows != "all" else 0,
            rows=rows,
            seed=seed if rows == "clusters" else 0,
            readouts=() if self.init == "none" else config.readouts,
            weights=self.identity(),
            weights_path="" if self.init == "random" else self.weights,
            batch_size=config.batch_size,
            device=config.device,
        )

    def stills(self, config: ProbeConfig, probe: str, gap: int, seed: int) -> FeaturesConfig | None:
        """What an encoder of pairs says of single frames, for a probe that asks; None for others.

        Raises:
            MissingError: its weights are not at hand.
        """
        if not (self.paired and KINDS[probe].rows == "clusters"):
            return None
        found = self.features(config, probe, gap, seed, 0)
        return replace(found, rows="clusters", seed=seed, still=True) if found else None

    @property
    def paired(self) -> bool:
        """Whether it sees both frames of a pair at once."""
        return self.checkpoint is not None or (self.name in ENCODERS and ENCODERS[self.name].paired)

    def identity(self) -> str:
        """SHA-256 of the weights file of an outside encoder; empty for others.

        Raises:
            MissingError: the weights are not at hand.
        """
        if self.checkpoint or self.init == "random" or self.name in UNSEEING:
            return ""
        from avrl.encoders.weights import identity

        return identity(self.name, self.init, Path(self.weights) if self.weights else None)

    def scores(self, config: ProbeConfig, probe: str, gap: int, seed: int) -> ScoresConfig:
        """The scores stage's request.

        Raises:
            MissingError: its weights are not at hand.
        """
        kind, digest = KINDS[probe], self.identity()
        asked = ScoresConfig(
            probe=probe,
            encoder=self.name,
            init=self.init,
            checkpoint=self.checkpoint.ref if self.checkpoint else "",
            gap=gap,
            target=config.target if kind.labelled else "",
            readout=() if self.init == "none" else config.readouts,  # floors have their own
            seed=seed,
            resamples=config.resamples,
            solver=config.solver if kind.labelled else "ridge",
            # What has no part in a probe is kept at its default: other values are the same request.
            samples=config.samples if kind.labelled and config.solver == "attentive" else ProbeConfig.samples,
            pairs=config.pairs if kind.flow else ProbeConfig.pairs,
            teacher=config.teacher if kind.flow else ProbeConfig.teacher,
            whose=pins.whose(known(self.name), digest, own=bool(self.weights)) if digest else "",
            device=config.device,
            batch_size=config.batch_size,
        )
        if not looks(asked):
            return asked
        return replace(asked, readout=(), weights=digest, weights_path=self.weights)

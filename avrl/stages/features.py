"""Stage `features`: frames -> vectors of a frozen encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from avrl.cache import size
from avrl.config import Opt
from avrl.encoders import ENCODERS, Known, known, licence
from avrl.probes import WIDE
from avrl.stage import Built, Inputs, Stage, changed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from avrl.artifact import Artifact, Manifest
    from avrl.cache import Cache
    from avrl.encoders import Encoder


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Which frozen encoder; `gap` is 0 for all rows of an encoder of single frames, whose features serve every gap."""

    encoder: Annotated[str, Opt("Encoder")]
    init: Annotated[Literal["trained", "pretrained", "random"], Opt("Weights")]
    gap: Annotated[int, Opt("Gap of a pair", unit="frames")]
    rows: Annotated[Literal["all", "order", "clusters"], Opt("All pairs, or those that a probe looks at")] = "all"
    seed: Annotated[int, Opt("Of the pairs that clusters looks at")] = 0
    readouts: Annotated[tuple[str, ...], Opt("Readouts to keep; empty for all, of a subset but for the grid")] = ()
    still: Annotated[bool, Opt("Frame t twice, instead of the pair")] = False
    weights: Annotated[str, Opt("SHA-256 of the weights file")] = ""
    weights_path: Annotated[str, Opt("Weights file", runtime=True)] = ""
    batch_size: Annotated[int, Opt("Rows a forward pass", runtime=True)] = 64
    device: Annotated[Literal["auto", "cpu"], Opt("auto: a GPU if there is one", runtime=True)] = "auto"

    def whole(self) -> FeaturesConfig:
        """The request for all readouts, whose features serve this one too; itself if there is none."""
        return self if self.rows != "all" and WIDE in self.readouts else replace(self, readouts=())


@dataclass(frozen=True)
class Plan:
    """What features will come to: rows, and bytes that are still to be written, at most."""

    rows: int
    bytes: int
    left_out: dict[str, str]

    def words(self) -> str:
        """For the terminal."""
        but = "".join(f"; without {name}: {why}" for name, why in self.left_out.items())
        return f"{self.rows:,} rows, {size(self.bytes)} at most{but}"


def plan(config: FeaturesConfig, inputs: Inputs, cache: Cache) -> Plan:
    """What a build would come to, from the encoder without its weights.

    Raises:
        MissingError: a package that the encoder needs is not installed.
        RuntimeError: the encoder cannot be built without memory, as some of timm's can not.
    """
    import polars as pl

    from avrl.features import begun, encoded, layout

    encoder = _weightless(config, inputs)
    episodes = pl.read_parquet(inputs["frames"].root / "episodes.parquet")
    rows = len(encoded(config.rows, episodes, config.gap, config.seed, paired=encoder.paired)[1])
    there = begun(cache.partial(FEATURES.name, _slug(config, inputs), FEATURES.key(config, inputs)))
    whole = layout(encoder, rows, config.rows, config.readouts, still=config.still)
    return Plan(rows, whole.bytes * max(0, rows - there) // max(1, rows), whole.left_out)


def _weightless(config: FeaturesConfig, inputs: Inputs) -> Encoder:
    """The encoder of a request, to ask what it gives: no memory and no time, 0.2 s for ViT-L."""
    import torch

    init: Any = "random" if config.weights or "checkpoint" in inputs else config.init
    with torch.device("meta"):
        return frozen(replace(config, init=init, weights_path=""), inputs, "meta")[0]


def readouts(config: FeaturesConfig, inputs: Inputs, cache: Cache) -> set[str]:
    """The readouts that an encoder has: by all its features if they are there, else by its network.

    Raises:
        MissingError, RuntimeError: as `plan`.
    """
    there = cache.find(FEATURES.name, FEATURES.key(config.whole(), inputs))
    facts = there.manifest.facts if there else {}
    return {*facts["readouts"], *facts["left_out"]} if facts else set(_weightless(config, inputs).readouts)


def frozen(config: Any, inputs: Inputs, device: str = "") -> tuple[Encoder, str]:
    """The frozen encoder of a request (its `encoder`, `init`, `weights_path`, `device`), and the device it is on."""
    import torch

    device = device or ("cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu")
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

    from avrl.encoders import pins, weights
    from avrl.features import extract

    encoder, device = frozen(config, inputs)
    facts = extract(
        encoder,
        inputs["frames"].root,
        out,
        gap=config.gap,
        batch_size=config.batch_size,
        device=device,
        rows=config.rows,
        seed=config.seed,
        readouts=config.readouts,
        still=config.still,
    )
    facts |= {"encoder": config.encoder, "init": config.init}
    if isinstance(encoder, torch.nn.Module):
        facts["parameters"] = sum(one.numel() for one in encoder.parameters())
    if not config.weights:  # our own, whose licence comes with the checkpoint, or none at all
        return Built(facts)
    path = Path(config.weights_path) if config.weights_path else None
    whose = pins.whose(known(config.encoder), config.weights, own=path is not None)
    return Built({**facts, "weights": weights.origin(config.encoder, path)}, licence(config.encoder, whose))


def outdated(hits: Iterable[Artifact]) -> str:
    """One line on what was found and made with other versions of what makes its numbers; empty if nothing was.

    No key knows of versions, as most change no number. What is made from something told is made anew along with it.
    """
    told = [(one, words) for one in hits if (words := changed(one.manifest, _makers(one.manifest)))]
    anew = {one.digest for one, _ in told}
    first = [one for one, _ in told if not any(each.digest in anew for each in one.manifest.inputs)]
    versions = ", ".join(dict.fromkeys(word for _, words in told for word in words))
    roots = " ".join(str(one.root) for one in first)
    return f"{len(told)} of these were made with {versions}; to make them anew: rm -r {roots}" if told else ""


def _makers(manifest: Manifest) -> tuple[str, ...]:
    """The packages whose version may change the numbers of features, of scores, or of flow."""
    config = manifest.config
    if manifest.stage in ("features", "scores"):
        return ("torch",) if config["init"] == "none" else ENCODERS.get(config["encoder"], Known("", "")).packages
    teacher = config.get("teacher", "")
    return {"": (), "dis": ("opencv-python-headless",)}.get(teacher, ("torch", "torchvision"))


def called(config: Any) -> str:
    """Name of what is encoded, for slugs."""
    twin = "-untrained" if config.init == "random" else ""
    gap = f"-gap{config.gap}" if config.gap else ""
    return f"{config.encoder.replace(':', '-').replace('/', '-')}{twin}{gap}"


def _slug(config: FeaturesConfig, inputs: Inputs) -> str:
    return called(config) + "-still" * config.still + f"-for-{config.rows}" * (config.rows != "all")


FEATURES = Stage("features", 3, FeaturesConfig, _slug, _build_features)

"""The encoders that a probe is asked for by name: each with its untrained twin, or refused with what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from avrl.errors import ConfigError, NotFoundError
from avrl.sources import SAMPLED
from avrl.stages.pretrain import OBJECTIVES, network
from avrl.stages.probe import KINDS, Entry
from avrl_cli import advice
from avrl_cli.options import listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from avrl.artifact import Artifact
    from avrl.cache import Cache

ALONG = ("random", "pixels")  # untrained twins and pixel floors: scored along with any encoder, so naming them is idle


def named(store: Cache, what: str, on: str, given: Sequence[str], weights: str) -> list[Entry]:
    """The encoders asked for, each with its untrained twin.

    Args:
        store: Where our checkpoints are.
        what: What is probed.
        on: Whose frames, as it was typed.
        given: Names as they were typed, which may be lists with commas.
        weights: Weights file of the only one; empty: the published weights.

    Raises:
        ConfigError: no name, an unknown one, or weights for several or for one of our checkpoints.
        NotFoundError: there is no such checkpoint, or no such weights file.
        IntegrityError: the weights file is none.
        MissingError: an encoder that is not public.
    """
    on, typed = _place(store, what, on), listed(given)
    names = [name for name in dict.fromkeys(typed) if name not in (*ALONG, *KINDS[what].floors)]
    if not names:
        along = f" ({', '.join(typed)}: scored along with any)" if typed else ""
        raise ConfigError(f"probe needs an encoder{along}", f"type: {advice.probe(what, on)}")
    if weights and len(names) != 1:
        raise ConfigError("--weights goes with exactly one --encoder", "probe the encoders one by one")
    return [entry for name in names for entry in _entries(store, name, on, weights)]


def _place(store: Cache, what: str, on: str) -> str:
    """Whose frames, for what is to be typed next: where there are only the sample's, its."""
    return on or (advice.SAMPLE if KINDS[what].source in SAMPLED and advice.only_sample(store) else "")


def _entries(store: Cache, name: str, on: str, weights: str) -> list[Entry]:
    """An encoder and its untrained twin."""
    from avrl.encoders.weights import find, recognise

    checkpoint = _checkpoint(store, name, on)
    if checkpoint and weights:
        raise ConfigError(f"{name} is a checkpoint, with weights of its own", "leave out --weights")
    if weights:
        recognise(find(name, Path(weights)))  # a typo, or a web page that was saved, shows at once
    if checkpoint:
        called = network(checkpoint.manifest.config).name
        return [Entry(called, "trained", checkpoint), Entry(called, "random", checkpoint)]
    return [Entry(name, "pretrained", weights=weights), Entry(name, "random")]


def _checkpoint(store: Cache, name: str, on: str) -> Artifact | None:
    """The checkpoint that an encoder's name means; None if it is the name of an outside encoder."""
    from avrl.encoders import ENCODERS, known, meant

    if name in ENCODERS or name.startswith("timm:"):
        known(name)  # refuses what is not public, or not in timm, before anything is looked for
        return None
    try:
        return store.resolve(
            "checkpoints",
            "" if name in OBJECTIVES else name,
            where=lambda one: name not in OBJECTIVES or network(one.manifest.config).name == name,
            what=f"{name} checkpoint" if name in OBJECTIVES else "checkpoints",
            make=advice.pretrain(name, on) if name in OBJECTIVES else "",
            option="--encoder",
        )
    except NotFoundError as error:
        if name in OBJECTIVES or error.next_step:
            raise
        ours = [*OBJECTIVES, *(one.ref for one in store.artifacts("checkpoints"))]
        raise ConfigError(f"no encoder or checkpoint named {name!r}", meant(name, ours)) from None

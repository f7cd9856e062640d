"""Checkpoints: what training keeps. ``model.safetensors`` + ``config.json`` for good, snapshots to go on from.

A snapshot directory is renamed into place after its ``state.json``, which carries the SHA-256 of its files and has its
own beside it, so an interrupted or rotten one is told from a good one. Retention runs after a snapshot is published,
never before.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from avrl.artifact import make_durable, sha256_of, write_durably
from avrl.errors import IntegrityError
from avrl.objectives import Network, Objective, create, modules

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from torch.optim import Optimizer

log = logging.getLogger(__name__)

OWN = "state.sha256"  # of state.json, where a flipped bit may be another number
KEPT = 2  # snapshots that stay: if the newest is damaged, the one before it is still there


def save(out: Path, objective: Objective, config: dict[str, Any]) -> None:
    """Write ``model.safetensors`` and ``config.json`` (what `create` needs to build the network again)."""
    save_file(modules(objective).state_dict(), out / "model.safetensors")
    write_durably(out / "config.json", json.dumps(config, indent=1, sort_keys=True).encode())


def load(root: Path, *, init: str = "trained") -> Objective:
    """Build the network of a checkpoint.

    Args:
        root: Directory of a ``checkpoints`` artifact.
        init: ``trained``, or ``random`` for its untrained twin: the very weights that training started from.

    Raises:
        IntegrityError: a file is missing or unreadable, or weights and network do not fit.
    """
    try:
        config = json.loads((root / "config.json").read_bytes())
        objective = build(config)
        if init == "trained":
            modules(objective).load_state_dict(load_file(root / "model.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:  # TypeError: a field it does not know
        reason = " ".join(str(error).split("\n\t")[:2])  # torch lists every tensor that does not fit
        raise IntegrityError(f"{root} is no checkpoint that this avrl can load: {reason[:300]}") from error
    modules(objective).eval().requires_grad_(False)
    return objective


def build(config: dict[str, Any]) -> Objective:
    """A network with the weights that training with this config starts from; see `avrl.objectives.Network`."""
    network = Network(**config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(network.seed)
        return create(network)


@dataclass(frozen=True)
class Snapshot:
    """A point to go on from.

    Attributes:
        step: The next global step.
        rows: Of the log so far.
        window: Sums of the row that is begun.
        arithmetic: What products of matrices came out as on the way here.
        refused: Names of later ones beside it, which do not verify.
    """

    step: int
    rows: list[dict[str, float | None]]
    window: list[float]
    arithmetic: str = ""
    refused: tuple[str, ...] = ()


def copied(objective: Objective, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """What a snapshot holds, by file, as copies on the host: training may go on while they are written."""
    held = {
        "model.safetensors": modules(objective).state_dict(),
        "optimizer.safetensors": _moments(objective, optimizer),
    }
    return {
        file: {name: one.detach().to("cpu", copy=True) for name, one in state.items()} for file, state in held.items()
    }


def save_snapshot(folder: Path, held: dict[str, dict[str, Tensor]], snapshot: Snapshot) -> None:
    """Publish ``<folder>/step-<n>`` with what `copied` gave, then remove all but the newest `KEPT` that are good.

    Those of later steps go too: this run would have gone on from them, had they been good. What was refused when the
    run went on does not count. A save that fails takes no
    room, so that what it failed for can be told on a full disk.
    """
    final = folder / f"step-{snapshot.step:09d}"
    partial = folder / f".{final.name}.tmp"
    for stale in (*folder.glob(".step-*"), final):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, tensors in held.items():
            save_file(tensors, partial / name)
            make_durable(partial / name)
        state = {
            "step": snapshot.step,
            "rows": snapshot.rows,
            "window": snapshot.window,
            "arithmetic": snapshot.arithmetic,
            "sha256": {path.name: sha256_of(path) for path in sorted(partial.iterdir())},
        }
        write_durably(partial / "state.json", json.dumps(state).encode())
        write_durably(partial / OWN, sha256_of(partial / "state.json").encode())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(final)
    make_durable(folder)
    bad = set(snapshot.refused) - {final.name}
    stay = sorted(one for one in folder.glob("step-*") if one.name <= final.name and one.name not in bad)[-KEPT:]
    for old in folder.glob("step-*"):
        if old not in stay:
            shutil.rmtree(old)


def load_snapshot(folder: Path, objective: Objective, optimizer: Optimizer) -> Snapshot | None:
    """Go on from the newest snapshot that verifies; older ones are tried if it does not. None: there is none.

    Raises:
        IntegrityError: snapshots are there, and every one of them is damaged.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    refused: list[str] = []
    for path in found:
        try:
            if sha256_of(path / "state.json") != (path / OWN).read_text(encoding="latin-1"):
                raise IntegrityError(f"{path / 'state.json'} is not what {OWN} says")
            state = json.loads((path / "state.json").read_bytes())
            for name, digest in state["sha256"].items():
                if sha256_of(path / name) != digest:
                    raise IntegrityError(f"{path / name} is not what its state.json says")
            modules(objective).load_state_dict(load_file(path / "model.safetensors"))
            _restore_moments(objective, optimizer, load_file(path / "optimizer.safetensors"))
        except (OSError, ValueError, KeyError, RuntimeError, IntegrityError) as error:
            log.warning("snapshot %s is damaged (%s); trying the one before it", path, error)
            refused.append(path.name)
            continue
        log.info("going on from step %d", state["step"])
        arithmetic = state.get("arithmetic", "")
        return Snapshot(state["step"], state["rows"], state["window"], arithmetic, tuple(refused))
    if found:
        raise IntegrityError(
            f"no snapshot in {folder} verifies",
            f"rm -r {folder} and the same command starts over, or with --sync goes on from what S3 has",
        )
    return None


def _moments(objective: Objective, optimizer: Optimizer) -> dict[str, Tensor]:
    """AdamW's state under the names of its parameters."""
    flat = {}
    for name, parameter in modules(objective).named_parameters():
        for key, value in optimizer.state[parameter].items():
            flat[f"{key}/{name}"] = torch.as_tensor(value)
    return flat


def _restore_moments(objective: Objective, optimizer: Optimizer, flat: dict[str, Tensor]) -> None:
    parameters = dict(modules(objective).named_parameters())
    for name, value in flat.items():
        key, _, of = name.partition("/")
        parameter = parameters[of]
        optimizer.state[parameter][key] = value.to(parameter.device)

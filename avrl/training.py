"""Pretraining: batches -> checkpoint, the same steps in the same order on 1 process or many, killed or not.

The state of a run is weights, optimizer and the global step; order and randomness are functions of the step
(`avrl.pairs`) and the learning rate is too. So a resumed run is bit-identical to an undisturbed one on a CPU.
"""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from avrl import checkpoint
from avrl.artifact import SCRATCH
from avrl.augment import augment
from avrl.averaging import adopt, average
from avrl.cost import cost, sentence
from avrl.curve import Curve
from avrl.devices import accelerator_of, arithmetic, compile_blocks, compiling, device_name, fitting
from avrl.errors import ConfigError
from avrl.objectives import Network, modules
from avrl.pace import Clock, speed
from avrl.pairs import Pairs, Sampling, sent
from avrl.ranks import Stop, Stopped, agree, lost_ranks, require_shared
from avrl.store import opened
from avrl.watch import Watch

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path
    from typing import Self

    from accelerate import Accelerator
    from torch import Tensor

    from avrl.checkpoint import Snapshot
    from avrl.objectives import Objective
    from avrl.pairs import Batch

log = logging.getLogger(__name__)

BETAS = (0.9, 0.95)  # He et al. 2022 (MAE), table 8
CLIP = 1.0  # largest gradient norm


@dataclass(frozen=True)
class Recipe:
    """What one run is: plain values, so that it travels to the processes of other GPUs.

    `network` is what ``config.json`` keeps; see `avrl.checkpoint.build`.
    """

    network: dict[str, Any]
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup_epochs: float
    sampling: Sampling
    precision: str
    device: str
    threads: int
    save_minutes: float
    augment: bool = False
    ema: float = 0.0
    accumulate: int = 1
    compile: bool = False
    look_every: int = 0
    probe_every: int = 0
    tracker: str = "none"

    def sentence(self) -> str:
        """The settings in a line, to be printed before a run."""
        asked, weight = self.sampling, self.network["loss_decay"]
        shape = {"ratio": f"p ~ {asked.sample_decay:g}^(gap-1)", "uniform": "all alike", "triangular": "a triangle"}
        rises = ", so it never falls" if self.warmup_epochs >= self.epochs else ""
        return (
            f"{self.epochs} epochs of {asked.pairs_per_episode} pairs an episode, global batch {self.batch_size}; "
            f"AdamW, lr {self.lr:g}, warm-up {self.warmup_epochs:g} epochs{rises}, weight decay {self.weight_decay:g}; "
            f"gaps 1 to {asked.max_gap}, {shape[asked.gaps]}, weighted {weight:g}^(gap-1) in the loss; "
            f"seed {asked.seed}"
        )


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then half a cosine to zero; a function of the step alone (Loshchilov & Hutter 2017)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@lost_ranks()
@fitting()
def train(out: Path, frames: Path, recipe: Recipe) -> dict[str, Any]:
    """Train, from wherever an earlier call was stopped, and write the checkpoint. Every rank calls this.

    Args:
        out: Directory to fill with ``model.safetensors``, ``config.json``, ``log.parquet``, ``looks/``.
        frames: Root of the ``frames`` artifact.
        recipe: What to train and how.

    Returns:
        Facts for the manifest.

    Raises:
        ConfigError: the batch does not divide among ranks, which share no folder; too few episodes, GPUs or memory.
        DivergedError: the loss or a gradient is not finite; no weights of that step are kept anywhere.
        Stopped: a signal came; the state is saved.
        TemporaryError: another rank died, or does not answer.
    """
    accelerator = accelerator_of(recipe.device, recipe.precision)
    world, rank = accelerator.num_processes, accelerator.process_index
    pairs = _pairs(frames, recipe, world)
    learner = _Learner(recipe, accelerator, out / SCRATCH / "snapshots")
    total = recipe.epochs * pairs.steps_per_epoch
    warmup = round(recipe.warmup_epochs * pairs.steps_per_epoch)
    curve = Curve(total, pairs.steps_per_epoch, recipe.batch_size, learner.found)
    first = learner.found.step if learner.found else 0
    require_shared(accelerator, out, first)
    saved = time.monotonic()
    watch = Watch(out, recipe, pairs, learner.objective, learner.optimizer, curve, first, warmup, rank)
    clock = Clock(pairs)
    with Stop() as stop, watch, learner, curve.progress(first, rank) as bar:
        for step, batch in enumerate(pairs.stream(first, total, rank, world), first):
            lr = learning_rate(step, total, warmup, recipe.lr)
            losses, norm = learner.losses(batch), learner.clip()
            due = time.monotonic() - saved > 60 * recipe.save_minutes
            code, due = agree(accelerator, losses["loss"], norm, stop, due, step)
            learner.move(step, lr)
            watch.see(curve.add(step, losses, norm, lr, accelerator))
            bar.update()
            clock.tick()
            if due and step + 1 < total:
                learner.save(curve.snapshot(step + 1, accelerator))
                saved = time.monotonic()
                if code:
                    learner.await_saved()
                    raise Stopped(code)
    if rank == 0:
        curve.write(out)
        learner.settle()
        checkpoint.save(out, learner.objective, recipe.network)
    accelerator.wait_for_everyone()
    rate, waited = clock.pace()
    return {
        **learner.facts(rate * recipe.batch_size),
        "steps": total,
        "samples": total * recipe.batch_size,
        "final_loss": curve.rows[-1]["loss"],
        "final_skill": curve.rows[-1]["skill"],
        "final_held_out_skill": curve.rows[-1]["held_out_skill"],
        "data_wait": round(waited, 4),
    }


def _pairs(frames: Path, recipe: Recipe, world: int) -> Pairs:
    if recipe.batch_size % (world * recipe.accumulate):
        parts = f" x --accumulate {recipe.accumulate}" if recipe.accumulate > 1 else ""
        raise ConfigError(f"--batch-size {recipe.batch_size} does not divide among {world} processes{parts}")
    return Pairs(opened(frames, recipe.threads), recipe.sampling, recipe.batch_size)


class _Learner:
    """Weights, optimizer and the device they are on; goes on from the newest good snapshot.

    A snapshot is written by a thread while the next steps go on; entered, it is waited for on the way out.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, snapshots: Path) -> None:
        self.recipe, self.accelerator, self.snapshots = recipe, accelerator, snapshots
        self.network = Network(**recipe.network)
        self.device, self.arithmetic = device_name(accelerator), arithmetic(accelerator)
        if accelerator.is_main_process:
            log.info("%s", sentence(self.network, cost(self.network)))
            log.info("%s", recipe.sentence())
            log.info("%s x %s, products of matrices in %s", accelerator.num_processes, self.device, self.arithmetic)
        self.objective = checkpoint.build(recipe.network)
        modules(self.objective).to(accelerator.device)
        if recipe.compile:
            compile_blocks(modules(self.objective))
        groups = _groups(self.objective, recipe.weight_decay)
        # Fused: .28 of the default's time on one CPU core, .17 of foreach's (Two-Stream base; tiny: .31 and .21).
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=BETAS, fused=True)
        self.found = checkpoint.load_snapshot(snapshots, self.objective, self.optimizer)
        self._note_arithmetic()
        self._writer = ThreadPoolExecutor(1)
        self._saving: Future[None] = self._writer.submit(lambda: None)
        self.model, self.wrapped = accelerator.prepare(modules(self.objective), self.optimizer)

    def _note_arithmetic(self) -> None:
        """All arithmetic that the run has seen: with "auto" it is the machine's, and machines change on the way."""
        before = self.found.arithmetic if self.found else ""
        known = before.split(" and ") if before else []
        self.arithmetics = " and ".join(known + [one for one in [self.arithmetic] if one not in known])
        if known and self.arithmetic not in known and self.accelerator.is_main_process:
            log.warning(
                "the run was begun in %s and goes on in %s; --precision holds it to one", before, self.arithmetic
            )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Forward and backward, part by part; the mean over the parts. Ranks exchange gradients once, at the last."""
        parts = batch.parts(self.recipe.accumulate)
        found = []
        for part in parts:
            with compiling(), nullcontext() if part is parts[-1] else self.accelerator.no_sync(self.model):
                losses = self._forward(part)
                self.accelerator.backward(losses["loss"] / len(parts))
            found.append(losses)
        return {name: torch.stack([one[name].detach() for one in found]).mean() for name in found[0]}

    def _forward(self, part: Batch) -> dict[str, Tensor]:
        """Losses of a part; the wrapped module's ``forward`` is the only loss path there is."""
        to = self.accelerator.device
        frames_BTHWC = sent(part.frames_BTHWC, to)
        if self.recipe.augment:
            frames_BTHWC = augment(frames_BTHWC, part.seed_B)
        with self.accelerator.autocast():
            found: dict[str, Tensor] = self.model(frames_BTHWC, sent(part.gap_B, to), sent(part.seed_B, to))
        return found

    def clip(self) -> Tensor:
        """Clip the gradients; returns their norm before that, the same on all ranks."""
        norm: Tensor = self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        return norm

    def move(self, step: int, lr: float) -> None:
        """Step along the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.wrapped.step()
        self.wrapped.zero_grad()
        if self.recipe.ema:
            average(self.optimizer, self.recipe.ema, step)

    def settle(self) -> None:
        """Put the weights to publish into the network, after the last step."""
        if self.recipe.ema:
            adopt(self.optimizer)

    def save(self, snapshot: Snapshot) -> None:
        """Publish a snapshot, beside the next steps; the one before it has to be there first."""
        if not self.accelerator.is_main_process:
            return
        self._saving.result()
        refused = self.found.refused if self.found else ()
        snapshot = replace(snapshot, rows=list(snapshot.rows), arithmetic=self.arithmetics, refused=refused)
        held = checkpoint.copied(self.objective, self.optimizer)
        self._saving = self._writer.submit(checkpoint.save_snapshot, self.snapshots, held, snapshot)

    def await_saved(self) -> None:
        """Wait for the last snapshot; the other ranks wait for the first."""
        self._saving.result()
        self.accelerator.wait_for_everyone()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._writer.shutdown()
        if kind is None:
            self._saving.result()  # what could not be saved is told, though the run is through

    def facts(self, rate: float) -> dict[str, Any]:
        """What ran, on what, and how fast: at so many samples a second."""
        processes = self.accelerator.num_processes
        pace = speed(self.network, rate, self.device, self.arithmetic, processes)
        if self.accelerator.is_main_process:
            log.info("%s", ", ".join(f"{name.replace('_', ' ')}: {figure}" for name, figure in pace.items()))
        return {
            **self.recipe.network,
            **cost(self.network),
            "baseline": self.objective.baseline,
            "weights": f"running mean, decay {self.recipe.ema}" if self.recipe.ema else "last step",
            "device": self.device,
            "processes": processes,
            "arithmetic": self.arithmetics,
            **pace,
        }


def _groups(objective: Objective, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only, not for biases, norms and tokens (MAE's and timm's rule)."""
    named = list(modules(objective).named_parameters())
    light = {name for name, one in named if one.ndim < 2 or name.endswith(("cls", "mask_token"))}
    return [
        {"params": [one for name, one in named if name not in light], "weight_decay": weight_decay},
        {"params": [one for name, one in named if name in light], "weight_decay": 0.0},
    ]

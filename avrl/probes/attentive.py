"""The attentive probe: one learned query looks at all patches of a pair. The second family, beside the ridge.

It is fitted by steps, so what could flatter or wrong an encoder is fixed for all alike: number of pairs seen, width,
the rates that are tried (side by side, on the same batches), the standardising of patches and targets. The rate is
chosen on validation episodes of train, and the test is looked at once. Patches are made batch by batch and kept
nowhere: what a public attempt stored took 545 GB. Heads and their optimizers are, so that a kill costs minutes.

At each place it gets what is there and what changed, as the ridge does: the patch of t and its difference to that of
t+gap, or for an encoder of pairs f(t, t+gap) and its antisymmetric part. Given both frames' patches instead, it had to
find small differences of large numbers, and did not find a planted change in 300 steps.

Source of the form: the attentive probe of V-JEPA (Bardes et al. 2024), a cross-attention with one query; places are
told to it, for without them it could not tell where something changed.

Legend: B pairs, h w places, N = h w, D dimensions (twice those of a patch), M test pairs, K targets.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from avrl.artifact import write_durably
from avrl.probes import STEP
from avrl.progress import bar
from avrl.ridge import CONSTANT, factor
from avrl.store import FrameStore

if TYPE_CHECKING:
    from pathlib import Path

    from avrl.encoders import Encoder
    from avrl.labels import Target
    from avrl.probes import Given, Task
    from avrl.splits import Split

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
WIDTH, HEADS = 256, 4
WEIGHT_DECAY, WARMUP = 0.01, 0.05
STATISTICS = 256  # pairs that patches are standardised by
VALIDATED = 2048  # pairs at most that choose the rate
KEPT = 50  # steps after which a state is kept: minutes of a large encoder on a CPU


class Head(nn.Module):
    """Tokens (B, N, D) -> targets (B, K), standardised.

    Args:
        shape: N, D of the tokens.
        k: Targets.
        mean_D: Of the tokens.
        scale_D: What standardises them.
    """

    mean_D: Tensor
    scale_D: Tensor

    def __init__(self, shape: tuple[int, int], k: int, mean_D: Tensor, scale_D: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean_D", mean_D)
        self.register_buffer("scale_D", scale_D)
        self.project = nn.Linear(shape[1], WIDTH)
        self.place = nn.Parameter(torch.randn(1, shape[0], WIDTH) * 0.02)
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.out = nn.Linear(WIDTH, k)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, K)."""
        x = self.project((tokens_BND - self.mean_D) * self.scale_D) + self.place
        found: Tensor = self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0]
        out: Tensor = self.out(found[:, 0])
        return out


class Patches:
    """Patches of pairs, made as they are asked for: (B, N, D) float32."""

    def __init__(self, encoder: Encoder, given: Given, target: Target, gap: int) -> None:
        import polars as pl

        self.encoder, self.store, self.gap, self.device = encoder, FrameStore(given.frames), gap, given.device
        first = self.store.episodes.select("episode_index", "dataset_from_index")
        rows = target.rows.with_columns(pl.col("episode_index").cast(first["episode_index"].dtype))
        joined = rows.join(first, on="episode_index", how="left", maintain_order="left")
        self.row_N = (joined["dataset_from_index"] + joined["frame_index"]).to_numpy()

    def __call__(self, index_B: np.ndarray) -> Tensor:
        """Of pairs by their numbers."""
        at = self.row_N[index_B]
        pixels = torch.from_numpy(self.store.read(np.stack([at, at + self.gap], 1).ravel())).to(self.device)
        if self.encoder.paired:
            pairs = pixels.view(len(at), 2, *pixels.shape[1:])
            here, other = self.encoder.patches(pairs), self.encoder.patches(pairs.flip(1))
        else:
            made = self.encoder.patches(pixels.unsqueeze(1))  # both frames in one pass
            here, other = made.view(len(at), 2, *made.shape[1:]).unbind(1)
        return torch.cat([here, here - other], 3).flatten(1, 2).clone()


def predict(given: Given, target: Target, parts: Split, task: Task) -> tuple[np.ndarray, float, int]:
    """Fit, choose the rate, and predict the test pairs.

    Args:
        given: With an encoder; what an interrupted call left in its `scratch` is gone on with.
        target: What is predicted.
        parts: Who fits, chooses and tests.
        task: `samples` pairs are seen in training, `STEP` at once; its seed draws them.

    Returns:
        Predictions (M, K) of the test pairs in the units of the targets, the rate, and D.
    """
    if given.encoder is None:
        raise ValueError("an attentive probe needs an encoder")
    patches = Patches(given.encoder, given, target, task.gap)
    rng = np.random.default_rng([task.seed, 3])
    fit = np.flatnonzero(parts.fit_N)
    y_mean, y_std = target.y_NK[fit].mean(0), target.y_NK[fit].std(0)
    y_std[y_std <= CONSTANT * np.abs(y_mean)] = 1  # what does not move in fit must not choose the rate where it does
    y = torch.from_numpy((target.y_NK - y_mean) / y_std).float()
    heads = _heads(patches, np.sort(rng.choice(fit, min(STATISTICS, len(fit)), replace=False)), y.shape[1], task.seed)
    name = "-".join(["attentive", *task.target.split()])
    _train(heads, patches, y, fit, rng, task.samples // STEP, given.scratch / f"{name}.pt" if given.scratch else None)
    validate = np.flatnonzero(parts.validate_N)
    validate = np.sort(rng.choice(validate, min(VALIDATED, len(validate)), replace=False))
    found = _read(patches, heads, validate, given.batch_size)
    errors = ((found - y[validate].numpy()) ** 2).mean((1, 2))
    best = int(errors.argmin())
    (predicted,) = _read(patches, [heads[best]], np.flatnonzero(parts.test_N), given.batch_size)
    return predicted * y_std + y_mean, RATES[best], len(heads[best].mean_D)


def _heads(patches: Patches, index: np.ndarray, k: int, seed: int) -> list[Head]:
    """One a rate, from the same weights, with what standardises the patches of these pairs.

    By the ridge's rule, patches and changes each for themselves: no channel is magnified much more than the others, and
    one that does not move is left out. Divided by its spread, a channel that was silent in these pairs and said .01 in
    one of test moved R2 from .9 to -8 million.
    """
    tokens = mean_D = squares_D = torch.zeros((), dtype=torch.float64)
    n = 0
    for at in range(0, len(index), STEP):
        tokens = patches(index[at : at + STEP])
        rows = tokens.flatten(0, 1).double()
        here_D, total = rows.mean(0), n + len(rows)
        away_D = here_D - mean_D
        squares_D = squares_D + (rows - here_D).square().sum(0) + away_D.square() * (n * len(rows) / total)
        mean_D, n = mean_D + away_D * (len(rows) / total), total  # Chan et al. 1983
    halves = zip((squares_D / n).sqrt().chunk(2), mean_D.abs().chunk(2), strict=True)
    scale_D = torch.cat([factor(std_D, size_D) for std_D, size_D in halves])
    found = []
    for _ in RATES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found.append(Head((tokens.shape[1], tokens.shape[2]), k, mean_D.float(), scale_D.float()).to(tokens.device))
    return found


def _train(
    heads: list[Head],
    patches: Patches,
    y: Tensor,
    fit: np.ndarray,
    rng: np.random.Generator,
    steps: int,
    kept: Path | None,
) -> None:
    """Each head at its rate, side by side on the same batches; from what was kept on, if anything was."""
    device = heads[0].query.device
    optimizers = [
        torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
        for head, rate in zip(heads, RATES, strict=True)
    ]
    learned: list[Head | torch.optim.AdamW] = [*heads, *optimizers]
    done = 0
    if kept and kept.exists():
        state = torch.load(kept, map_location=device, weights_only=True)
        done = state["done"]
        for one, known in zip(learned, state["learned"], strict=True):
            one.load_state_dict(known)
    for step in bar("attentive probe", steps, "step", iterable=range(steps)):
        index = np.sort(rng.choice(fit, STEP))
        if step < done:
            continue  # drawn all the same, so that what follows is what it would have been
        tokens, wanted = patches(index), y[index].to(device)
        share = min(1, (step + 1) / max(1, WARMUP * steps)) * 0.5 * (1 + np.cos(np.pi * step / steps))
        for head, optimizer, rate in zip(heads, optimizers, RATES, strict=True):
            optimizer.param_groups[0]["lr"] = float(rate * share)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(head(tokens), wanted)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
        if kept and not (step + 1) % KEPT:
            file = io.BytesIO()
            torch.save({"done": step + 1, "learned": [one.state_dict() for one in learned]}, file)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_durably(kept, file.getvalue())


@torch.no_grad()
def _read(patches: Patches, heads: list[Head], index: np.ndarray, batch_size: int) -> np.ndarray:
    """Predictions (heads, M, K), standardised."""
    parts = []
    for at in range(0, len(index), batch_size):
        tokens = patches(index[at : at + batch_size])
        parts.append(torch.stack([head(tokens).double().cpu() for head in heads]))
    return torch.cat(parts, 1).numpy()

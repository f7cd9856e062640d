"""Exact resume with all that has a state or a draw of its own: parts of a batch, ranks, augmentation, mean weights.

A run is stopped after every single step. If each of its snapshots is, byte for byte, that of a run which was never
stopped, then so is what follows a stop at any step.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import ranked
import torch
from accelerate import Accelerator
from made import frame_store
from safetensors.torch import load_file
from test_training import files, recipe, stop_after
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from avrl import checkpoint, curve, training
from avrl.artifact import SCRATCH, sha256_of
from avrl.averaging import decay_of
from avrl.config import as_json
from avrl.devices import accelerator_of
from avrl.errors import AvrlError, ConfigError, UnsharedError
from avrl.objectives import modules
from avrl.pairs import Pairs, Sampling
from avrl.ranks import Stop, Stopped, agree, launch
from avrl.stages import pretrain
from avrl.stages.pretrain import PretrainConfig
from avrl.store import FrameStore
from avrl.training import train

STEPS = 6
SAMPLING = Sampling(0, 4, 0.8, 3)
CASES = {
    "whole": recipe(augment=True, threads=0, sampling=SAMPLING),
    "parts": recipe(accumulate=2, augment=True, ema=0.9, threads=2, sampling=replace(SAMPLING, gaps="triangular")),
}


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return frame_store(tmp_path_factory.mktemp("frames"), [8] * 4)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def stopped(out, frames, asked, steps):
    """Train so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Stopped):
            train(out, frames, asked)


def runs(out, frames, asked):
    """Train undisturbed, with a snapshot a step, and stopped after each step; write what samples each way saw."""
    seen, real = [], Pairs.stream

    def noted(*args):
        for batch in real(*args):
            seen.append(batch.seed_B.tolist())
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pairs, "stream", noted)
        patch.setattr(checkpoint, "KEPT", STEPS)
        patch.setattr(curve, "ROWS", 3)  # windows of 2 steps, so that stops fall into one
        patch.setattr(curve, "FIRST", 1)
        for name in ("undisturbed", "saved", "stopped"):
            (out / name).mkdir(parents=True, exist_ok=True)
            seen.clear()
            for _ in range(STEPS - 1 if name == "stopped" else 0):
                stopped(out / name, frames, asked, 1)
            train(out / name, frames, replace(asked, save_minutes=0.0) if name == "saved" else asked)
            rank = Accelerator(cpu=True).process_index
            (out / f"seen-{name}-{rank}.json").write_text(json.dumps(seen))


def snapshots(out):
    root = out / SCRATCH / "snapshots"
    return {str(path.relative_to(root)): sha256_of(path) for path in sorted(root.rglob("*.*")) if path.is_file()}


def seen(out, name, ranks):
    """The seeds of the global batches, step by step."""
    shares = [json.loads((out / f"seen-{name}-{rank}.json").read_bytes()) for rank in range(ranks)]
    return [[seed for share in step for seed in share] for step in zip(*shares, strict=True)]


def check(out, frames, asked, ranks):
    for name in ("saved", "stopped"):
        assert files(out / name) == files(out / "undisturbed")
    assert len(snapshots(out / "saved")) == 4 * (STEPS - 1)
    assert snapshots(out / "saved") == snapshots(out / "stopped")
    pairs = Pairs(FrameStore(frames), asked.sampling, asked.batch_size)
    order = [pairs.draw(step)[2].tolist() for step in range(STEPS)]
    assert all(seen(out, name, ranks) == order for name in ("undisturbed", "saved", "stopped"))


@pytest.mark.parametrize("case", CASES)
def test_one_process_stopped_after_every_step_leaves_what_an_undisturbed_one_does(case, frames, tmp_path):
    runs(tmp_path, frames, CASES[case])
    check(tmp_path, frames, CASES[case], 1)


def exchanges(out, frames, asked):
    """How often two ranks exchange gradients in a step."""
    calls = []
    learner = training._Learner(asked, accelerator_of("cpu", "auto"), out / "none")
    assert not learner.model.will_sync_module_buffers()
    learner.model.register_comm_hook(None, lambda _, bucket: (calls.append(1), allreduce_hook(None, bucket))[1])
    rank = learner.accelerator.process_index
    learner.losses(Pairs(FrameStore(frames), asked.sampling, asked.batch_size).batch(0, rank, 2))
    return len(calls)


def apart(out, frames):
    """What is told if only the first rank sees a snapshot, as on nodes that do not share a disk."""
    own = out / f"own-{Accelerator(cpu=True).process_index}/.partial-x"
    own.mkdir(parents=True)
    if own.parent.name == "own-0":
        shutil.copytree(out / "moved", own, dirs_exist_ok=True)
    with pytest.raises(UnsharedError) as told:
        train(own, frames, CASES["parts"])
    return str(told.value)


def agreed():
    """What two ranks agree on: one of them was sent a signal, or finds that a snapshot is due; in one exchange each."""
    accelerator, calls, real = Accelerator(cpu=True), [], torch.distributed.all_reduce
    rank, loss = accelerator.process_index, torch.zeros(())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", lambda *args, **more: calls.append(1) or real(*args, **more))
        found = {
            "signal to 1": agree(accelerator, loss, loss, Stop(143 if rank == 1 else 0), False, 0),
            "due on 0": agree(accelerator, loss, loss, Stop(), rank == 0, 0),
            "due on 1": agree(accelerator, loss, loss, Stop(), rank == 1, 0),
        }
    return {**found, "exchanges": len(calls)}


def as_a_rank(out, frames):
    """What each of two ranks does; one start of two processes serves all the tests below. It ends with exit 9."""
    torch.set_num_threads(1)
    for name, asked in CASES.items():
        runs(out / name, frames, asked)
    (out / "moved").mkdir(exist_ok=True)
    stopped(out / "moved", frames, CASES["parts"], 3)
    told = {"agreed": agreed(), "apart": apart(out, frames)}
    told |= {name: exchanges(out, frames, asked) for name, asked in CASES.items()}
    if os.environ["RANK"] == "0":
        (out / "told.json").write_text(json.dumps(told))
    (out / "poisoned").mkdir(exist_ok=True)
    ranked.train(out / "poisoned", frames, recipe("poisoned", save_minutes=0.0))


@pytest.fixture(scope="module")
def two_ranks(frames, tmp_path_factory):
    """Folder of the runs of two gloo ranks, and what they tell."""
    out = tmp_path_factory.mktemp("two")
    words = [sys.executable, __file__, str(out), str(frames)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "told.json").read_bytes()) | {"ended": json.loads(done.stdout)}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_stopped_after_every_step_leave_what_undisturbed_ones_do(case, frames, two_ranks):
    check(two_ranks[0] / case, frames, CASES[case], 2)


def test_ranks_exchange_gradients_once_a_step_whatever_the_parts(two_ranks):
    assert two_ranks[1]["whole"] == two_ranks[1]["parts"] >= 1


def test_ranks_that_do_not_share_a_disk_are_told_so(two_ranks):
    on = os.uname().nodename
    assert two_ranks[1]["apart"] == (
        f"process 1, on {on}, would train from step 0 of .partial-x; the first, on {on}, from step 3 of .partial-x; "
        "let all nodes see one cache, and name it with --cache"
    )


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_before_they_move(two_ranks):
    out, told = two_ranks
    kind, code, line = told["ended"]
    assert (kind, code) == ("DivergedError", 9)
    assert line.startswith("the loss is not finite at step 2")
    kept = out / "poisoned" / SCRATCH / "snapshots"
    assert sorted(one.name for one in kept.iterdir()) == ["step-000000001", "step-000000002"]
    objective = checkpoint.build(recipe().network)
    found = checkpoint.load_snapshot(kept, objective, torch.optim.AdamW(modules(objective).parameters()))
    assert found.step == 2
    assert all(torch.isfinite(one).all() for one in modules(objective).parameters())


def test_ranks_stop_for_any_of_them_and_save_when_the_first_says_so(two_ranks):
    assert two_ranks[1]["agreed"] == {
        "signal to 1": [143, True],
        "due on 0": [0, True],
        "due on 1": [0, False],
        "exchanges": 3,
    }


def test_saved_at_two_ranks_and_resumed_at_one_is_the_same_run(frames, two_ranks, tmp_path):
    moved = two_ranks[0] / "moved"
    train(moved, frames, replace(CASES["parts"], accumulate=1))
    train(tmp_path, frames, CASES["parts"])
    one, other = (pl.read_parquet(out / "log.parquet") for out in (tmp_path, moved))
    assert len(one) == len(other) == STEPS
    assert ((one["loss"] - other["loss"]) / one["loss"]).abs().max() <= 1e-5


def test_the_number_of_workers_may_change_on_the_way(frames, tmp_path):
    for workers, later in ((0, 0), (1, 2), (2, 0)):
        out = tmp_path / str(workers)
        out.mkdir()
        stopped(out, frames, replace(CASES["whole"], threads=workers), 3)
        train(out, frames, replace(CASES["whole"], threads=later))
    (tmp_path / "undisturbed").mkdir()
    train(tmp_path / "undisturbed", frames, replace(CASES["whole"], threads=2))
    assert all(files(tmp_path / str(workers)) == files(tmp_path / "undisturbed") for workers in (0, 1, 2))


@pytest.mark.parametrize("objective", ["two-stream", "single-stream", "videomae"])
def test_gradients_of_parts_add_up_to_those_of_the_whole(objective, frames, tmp_path):
    found = []
    for parts in (1, 2):
        asked = recipe(objective, accumulate=parts, augment=True)
        learner = training._Learner(asked, Accelerator(cpu=True), tmp_path / "none")
        losses = learner.losses(Pairs(FrameStore(frames), asked.sampling, asked.batch_size).batch(3))
        gradients = torch.cat([one.grad.flatten() for one in modules(learner.objective).parameters()])
        found.append((losses, gradients))
    (whole, gradient), (halves, summed) = found
    torch.testing.assert_close(halves, whole, rtol=1e-6, atol=1e-9)
    assert (summed - gradient).norm() <= 1e-6 * gradient.norm()


def test_the_published_weights_are_the_running_mean_and_training_goes_as_without(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "KEPT", STEPS)
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    plain.mkdir()
    averaged.mkdir()
    assert train(plain, frames, recipe(save_minutes=0.0, sampling=SAMPLING))["weights"] == "last step"
    assert train(averaged, frames, recipe(ema=0.4, sampling=SAMPLING))["weights"] == "running mean, decay 0.4"
    assert sha256_of(plain / "log.parquet") == sha256_of(averaged / "log.parquet")
    steps = [load_file(one) for one in sorted(plain.rglob("step-*/model.safetensors"))]
    steps.append(load_file(plain / "model.safetensors"))
    assert len(steps) == STEPS
    mean = steps[0]
    for step, weights in enumerate(steps[1:], 1):
        decay = min(0.4, (1 + step) / (10 + step))
        mean = {name: decay * mean[name] + (1 - decay) * value for name, value in weights.items()}
    published = load_file(averaged / "model.safetensors")
    torch.testing.assert_close(published, mean, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(value, steps[-1][name]) for name, value in published.items())
    assert not any("mean" in name for name in load_file(next(plain.rglob("optimizer.safetensors"))))
    twins = [modules(checkpoint.load(out, init="random")).state_dict() for out in (plain, averaged)]
    assert all(torch.equal(value, twins[1][name]) for name, value in twins[0].items())


def test_the_mean_begins_short_and_ends_at_the_asked_decay():
    decays = [decay_of(step, 0.99) for step in range(2000)]
    assert decays[0] == 0.1
    assert decays == sorted(decays)
    assert decays[-1] == 0.99


def test_options_reach_the_training_and_only_accumulation_is_no_part_of_the_key():
    asked = {"gaps": "triangular", "augment": True, "ema": 0.5, "accumulate": 3}
    got = pretrain.recipe(PretrainConfig(**asked))
    assert {"gaps": got.sampling.gaps, "augment": got.augment, "ema": got.ema, "accumulate": got.accumulate} == asked
    assert set(as_json(PretrainConfig(), runtime=False)) & set(asked) == {"gaps", "augment", "ema"}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"gaps": "uniform", "sample_decay": 0.5}, "--sample-decay 0.5 has no part in --gaps uniform"),
        ({"ema": 1.0}, r"--ema 1.0 is not in \[0, 1\)"),
        ({"ema": -0.1}, r"--ema -0.1 is not in \[0, 1\)"),
        ({"accumulate": 0}, "--accumulate 0 is less than 1"),
        ({"lr": -1.0}, "--lr -1.0 is not above 0"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1 is less than 0"),
        ({"warmup_epochs": -1.0}, "--warmup-epochs -1.0 is less than 0"),
        ({"accumulate": 5}, "--batch-size 24 does not divide among 1 GPUs x --accumulate 5"),
        ({"accumulate": 3, "gpus": 16}, "--batch-size 24 does not divide among 16 GPUs x --accumulate 3"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(asked, words):
    with pytest.raises(ConfigError, match=words):
        PretrainConfig(**asked)


def test_torchruns_ranks_are_counted_too(frames, tmp_path):
    with pytest.raises(ConfigError, match="--batch-size 4 does not divide among 1 processes x --accumulate 3"):
        train(tmp_path, frames, recipe(accumulate=3))


if __name__ == "__main__":
    try:
        launch(as_a_rank, Path(sys.argv[1]), 2, Path(sys.argv[2]))
    except AvrlError as error:
        print(json.dumps([type(error).__name__, error.exit_code, str(error)]))

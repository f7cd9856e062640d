"""Training: exact resume at any step, the same curve on one process and two ranks, clean ends of every kind."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import polars as pl
import pytest
import torch
from made import frame_store
from safetensors.torch import load_file, save_file

from avrl import checkpoint, devices, training
from avrl.artifact import sha256_of
from avrl.checkpoint import Snapshot, copied
from avrl.errors import ConfigError, DivergedError, IntegrityError, MissingError
from avrl.objectives import modules
from avrl.pairs import Sampling
from avrl.ranks import Stopped
from avrl.training import Recipe, learning_rate, train

NAMES = ["two-stream", "single-stream", "videomae"]


def recipe(objective="single-stream", **changed):
    network = {
        "objective": objective,
        "size": "tiny",
        "image_size": 32,
        "loss_decay": 0.5,
        "mask_ratio": 0.5,
        "seed": 0,
    }
    plain = {
        "network": network,
        "epochs": 2,
        "batch_size": 4,
        "lr": 1e-3,
        "weight_decay": 0.05,
        "warmup_epochs": 0.5,
        "sampling": Sampling(0, 4, 0.8, 5),
        "precision": "auto",
        "device": "cpu",
        "threads": 1,
        "save_minutes": 100.0,
    }
    return Recipe(**{**plain, **changed})


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return frame_store(tmp_path_factory.mktemp("frames"), [8] * 4)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def files(out):
    return {path.name: sha256_of(path) for path in out.iterdir() if path.is_file()}


def stop_after(monkeypatch, steps):
    """A signal that arrives in the middle of the step after so many."""
    arrivals = iter(range(10_000))
    real = training.learning_rate

    def rate(*args):
        if next(arrivals) == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(training, "learning_rate", rate)


@pytest.mark.parametrize("objective", NAMES)
def test_stopped_at_every_step_and_resumed_is_bit_identical(objective, frames, tmp_path, monkeypatch):
    straight = tmp_path / "straight"
    straight.mkdir()
    facts = train(straight, frames, recipe(objective))
    assert facts["steps"] == 10
    points = range(1, 10) if objective == "single-stream" else (1, 5, 6)
    for step in points:
        out = tmp_path / f"stopped-{step}"
        out.mkdir()
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Stopped) as stopped:
                train(out, frames, recipe(objective))
        assert stopped.value.code == 143
        assert not (out / "model.safetensors").exists()
        train(out, frames, recipe(objective))
        assert files(out) == files(straight), step


def test_the_log_has_a_row_a_step_and_nothing_that_a_clock_decides(frames, tmp_path):
    train(tmp_path, frames, recipe())
    log = pl.read_parquet(tmp_path / "log.parquet")
    assert log.columns[:7] == ["step", "epoch", "samples", "loss", "skill", "lr", "grad_norm"]
    assert log["step"].to_list() == list(range(1, 11))
    assert log["samples"].to_list() == [4 * step for step in range(1, 11)]
    assert log["skill"][0] == pytest.approx(0, abs=1e-5)  # the first prediction is the copy


def test_long_runs_log_means_over_windows(frames, tmp_path, monkeypatch):
    from avrl import curve

    (tmp_path / "all").mkdir()
    (tmp_path / "few").mkdir()
    train(tmp_path / "all", frames, recipe())
    monkeypatch.setattr(curve, "ROWS", 3)
    monkeypatch.setattr(curve, "FIRST", 1)
    train(tmp_path / "few", frames, recipe())
    every, few = (pl.read_parquet(tmp_path / name / "log.parquet") for name in ("all", "few"))
    assert few["step"].to_list() == [1, 2, 4, 8, 10]  # windows of 1, 2 and 4
    assert few["loss"][3] == pytest.approx(every["loss"][4:8].mean())
    assert few["loss"][4] == pytest.approx(every["loss"][8:].mean())


def test_the_rows_of_a_run_of_weeks_begin_with_its_first_step():
    """EgoDex part 1 by the plan: 5.8 million steps."""
    from avrl.curve import FIRST, ROWS, Curve

    total = 5_800_000
    curve = Curve(total, total // 30, 24, None)
    ends = [done for done in [*range(1, 20_000), *range(20_480, total, 1024)] if done % curve.window_at(done) == 0]
    assert ends[:FIRST] == list(range(1, FIRST + 1))
    assert len([one for one in ends if one <= 10_000]) > 300
    assert len(ends) < 2 * ROWS
    assert all(window & (window - 1) == 0 for window in {curve.window_at(done) for done in ends})
    assert [Curve(n, 1, 1, None).window for n in (1, 1000, 1001, 3000)] == [1, 1, 2, 4]


def test_the_learning_rate_warms_up_and_ends_at_zero():
    rates = [learning_rate(step, 100, 10, 1.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1)
    assert rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


RANK = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_training import recipe
from avrl.ranks import launch
from avrl.training import train
if __name__ == "__main__":
    launch(train, Path({out!r}), 2, Path({frames!r}), recipe({objective!r}, **{changed!r}))
"""


def two_ranks(out, frames, objective="single-stream", **changed):
    """Train on two gloo ranks in a process of their own."""
    out.mkdir(exist_ok=True)
    script = out.with_suffix(".py")
    tests = str(Path(__file__).parent)
    script.write_text(RANK.format(tests=tests, out=str(out), frames=str(frames), objective=objective, changed=changed))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(script)], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize("objective", ["two-stream", "videomae"])
def test_two_ranks_have_the_same_curve_as_one_process(objective, frames, tmp_path):
    (tmp_path / "one").mkdir()
    train(tmp_path / "one", frames, recipe(objective))
    process = two_ranks(tmp_path / "two", frames, objective)
    words = process.communicate()[1]
    assert process.returncode == 0, words
    one, two = (pl.read_parquet(tmp_path / name / "log.parquet") for name in ("one", "two"))
    worst = ((one["loss"] - two["loss"]) / one["loss"]).abs().max()
    assert worst <= 1e-5
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4)


def fresh(objective="single-stream"):
    built = checkpoint.build(recipe(objective).network)
    return built, torch.optim.AdamW(modules(built).parameters())


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_no_weights(frames, tmp_path, monkeypatch):
    real = training.checkpoint.build

    def poisoned(network):
        objective = real(network)
        with torch.no_grad():
            next(modules(objective).parameters()).fill_(float("nan"))
        return objective

    monkeypatch.setattr(training.checkpoint, "build", poisoned)
    with pytest.raises(DivergedError, match="not finite at step 0"):
        train(tmp_path, frames, recipe())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_snapshot_is_written_beside_the_next_steps_and_is_of_its_own(frames, tmp_path, monkeypatch):
    """Saved after step 2; the disk is so slow that it has come to step 8 before the first byte is written."""
    reached, real, agree = threading.Event(), checkpoint.save_snapshot, training.agree
    monkeypatch.setattr(training, "agree", lambda *args: (agree(*args)[0], args[-1] == 1))

    def slow(*args):
        assert reached.wait(60)
        real(*args)

    def rate(step, *args):
        if step == 8:
            reached.set()
        return learning_rate(step, *args)

    monkeypatch.setattr(checkpoint, "save_snapshot", slow)
    monkeypatch.setattr(training, "learning_rate", rate)
    train(tmp_path, frames, recipe())
    monkeypatch.undo()
    whole = files(tmp_path)
    for name in whole:
        (tmp_path / name).unlink()
    assert checkpoint.load_snapshot(tmp_path / "scratch/snapshots", *fresh()).step == 2
    train(tmp_path, frames, recipe())
    assert files(tmp_path) == whole


def test_a_snapshot_that_could_not_be_written_ends_the_run(frames, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_snapshot", full)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, frames, recipe(save_minutes=0.0))
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("last", [False, True])
def test_gradients_that_are_not_finite_end_the_run_though_the_loss_is(last, frames, tmp_path, monkeypatch):
    """At the third step, or at the last, after which the weights would be published."""
    real, steps = training.checkpoint.build, iter(range(100))

    def overflowing(network):
        objective = real(network)
        next(modules(objective).parameters()).register_hook(
            lambda grad: grad * torch.inf if next(steps) == (9 if last else 2) else grad
        )
        return objective

    monkeypatch.setattr(training.checkpoint, "build", overflowing)
    with pytest.raises(DivergedError, match=f"the gradients are not finite at step {9 if last else 2}"):
        train(tmp_path, frames, recipe(save_minutes=0.0))
    assert not (tmp_path / "model.safetensors").exists()
    kept = [load_file(path) for path in tmp_path.rglob("*.safetensors")]
    assert len(kept) == 4
    assert all(torch.isfinite(one).all() for state in kept for one in state.values())


def test_a_batch_that_does_not_divide_is_refused(frames, tmp_path):
    process = two_ranks(tmp_path / "out", frames, batch_size=5)
    assert "does not divide among 2 processes" in process.communicate()[1]
    assert process.returncode != 0


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_bit_in_the_newest_snapshot_falls_back_to_the_one_before(name, tmp_path, caplog):
    objective, optimizer = fresh()
    for step in (1, 2, 3):
        checkpoint.save_snapshot(tmp_path, copied(objective, optimizer), Snapshot(step, [], []))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000002", "step-000000003"]
    damaged = tmp_path / "step-000000003" / name
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    found = checkpoint.load_snapshot(tmp_path, *fresh())
    assert found is not None
    assert found.step == 2
    assert "step-000000003" in caplog.text


def test_a_run_that_changes_its_arithmetic_on_the_way_says_so(frames, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(training, "arithmetic", lambda accelerator: "bfloat16")
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            train(tmp_path, frames, recipe())
    assert train(tmp_path, frames, recipe())["arithmetic"] == "bfloat16 and float32"
    assert "the run was begun in bfloat16 and goes on in float32" in caplog.text


def test_when_every_snapshot_is_damaged_the_run_refuses_rather_than_starts_over(tmp_path):
    checkpoint.save_snapshot(tmp_path, copied(*fresh()), Snapshot(1, [], []))
    next(tmp_path.rglob("model.safetensors")).write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"no snapshot in .* verifies"):
        checkpoint.load_snapshot(tmp_path, *fresh())


def test_a_checkpoint_loads_as_trained_or_as_its_untrained_twin(frames, tmp_path):
    train(tmp_path, frames, recipe())
    start = modules(checkpoint.build(recipe().network)).state_dict()
    twin = modules(checkpoint.load(tmp_path, init="random")).state_dict()
    trained = modules(checkpoint.load(tmp_path)).state_dict()
    assert all(torch.equal(start[name], twin[name]) for name in start)
    assert any(not torch.equal(start[name], trained[name]) for name in start)
    assert not any(p.requires_grad for p in modules(checkpoint.load(tmp_path)).parameters())


def test_weights_that_do_not_fit_are_refused(frames, tmp_path):
    train(tmp_path, frames, recipe())
    state = load_file(tmp_path / "model.safetensors")
    state.pop("network.change.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"network\.change\.weight"):
        checkpoint.load(tmp_path)


def test_bf16_on_a_device_without_it_is_refused_and_the_facts_say_what_ran(frames, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this device has bf16")
    with pytest.raises(ConfigError, match="bf16"):
        train(tmp_path, frames, recipe(precision="bf16", device="auto"))
    assert train(tmp_path, frames, recipe())["arithmetic"] == "float32"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_train_the_same_and_resume_exactly(compiler, frames, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "COMPILER", compiler)
    outs = {name: tmp_path / name for name in ("plain", "compiled", "stopped")}
    for out in outs.values():
        out.mkdir()
    asked = recipe("two-stream", compile=True)
    train(outs["plain"], frames, recipe("two-stream"))
    train(outs["compiled"], frames, asked)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            train(outs["stopped"], frames, asked)
    train(outs["stopped"], frames, asked)
    assert files(outs["stopped"]) == files(outs["compiled"])
    logs = {name: pl.read_parquet(out / "log.parquet")["loss"] for name, out in outs.items()}
    assert logs["compiled"].to_list() == pytest.approx(logs["plain"].to_list(), rel=1e-4)
    plain, compiled = (load_file(outs[name] / "model.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()


def test_a_compiler_that_fails_is_one_line_and_exit_11(frames, tmp_path, monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(devices, "COMPILER", fails)
    with pytest.raises(MissingError, match=r"--compile fails here: no C\+\+ compiler; leave --compile out") as told:
        train(tmp_path, frames, recipe(compile=True))
    assert told.value.exit_code == 11


def test_the_config_file_is_what_builds_the_network(frames, tmp_path):
    train(tmp_path, frames, recipe("videomae"))
    assert json.loads((tmp_path / "config.json").read_bytes()) == recipe("videomae").network

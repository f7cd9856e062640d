"""Ranks that die, hang, diverge or are asked to stop: the command ends in time, with its own code, and goes on."""

import os
import signal
import subprocess
import time

import pytest
import ranked
import torch
from made import frame_store
from test_training import recipe

from avrl import checkpoint, training
from avrl.errors import TemporaryError
from avrl.ranks import Stopped, lost_ranks

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
FOR_EVER = ("--epochs", "100000", "--save-minutes", "0", "--gpus", "2")


@pytest.fixture
def cache(tmp_path):
    ranked.frames_artifact(tmp_path)
    return tmp_path


def ended(process, within):
    """Exit code, the last line on stderr, and that nobody of the run is left."""
    began = time.monotonic()
    words = process.communicate(timeout=120)[1]
    assert time.monotonic() - began < within
    while time.monotonic() < began + within:  # Python's own helper process leaves a moment after the others
        left = subprocess.run(["pgrep", "-g", str(process.pid), "-r", "R,S,D,T"], capture_output=True, text=True).stdout
        if not left:
            break
        time.sleep(0.05)
    assert not left, words
    return process.returncode, words.splitlines()[-1], words


def test_a_killed_rank_is_exit_5_and_the_same_command_goes_on_till_slurm_warns(cache):
    (cache / "tmp").mkdir()
    process = ranked.pretrain(cache, *FOR_EVER, "--quiet", TMPDIR=str(cache / "tmp"))
    ranked.await_snapshot(cache, process)
    os.kill(ranked.ranks_of(process)[-1], signal.SIGKILL)
    code, line, words = ended(process, within=60)
    assert code == 5, words
    assert line.endswith("run the same command: it goes on")
    assert words.splitlines() == [line]  # whoever asked for quiet hears of no rank's settings, nor torch's warnings
    assert not [one for one in (cache / "tmp").iterdir() if "elastic" in one.name]

    process = ranked.pretrain(cache, *FOR_EVER)
    step = ranked.await_snapshot(cache, process, after=0)
    step = ranked.await_snapshot(cache, process, after=step)
    process.send_signal(signal.SIGUSR1)
    code, line, words = ended(process, within=60)  # two ranks leave torch behind: seconds on a busy machine
    assert code == 143, words
    assert line == "avrl: stopped by a signal; the same command goes on from here"
    assert "going on from step" in words


@pytest.mark.slow
@pytest.mark.parametrize("signum", CODES, ids=lambda one: one.name)
@pytest.mark.parametrize("everyone", [True, False], ids=["everyone", "one rank"])
def test_two_ranks_save_and_stop_on_a_signal_to_any_of_them(signum, everyone, cache):
    process = ranked.pretrain(cache, *FOR_EVER)
    ranked.await_snapshot(cache, process)
    if everyone:  # a terminal's and Slurm's way
        os.killpg(process.pid, signum)
    else:
        os.kill(ranked.ranks_of(process)[-1], signum)
    code, _, words = ended(process, within=60)
    assert code == CODES[signum], words
    assert "Traceback" not in words


@pytest.mark.slow
def test_the_first_rank_killed_ends_the_run_as_any_other_does(cache):
    process = ranked.pretrain(cache, *FOR_EVER)
    ranked.await_snapshot(cache, process)
    os.kill(ranked.ranks_of(process)[0], signal.SIGKILL)
    code, line, words = ended(process, within=60)
    assert code == 5, words
    assert line.endswith("run the same command: it goes on")


@pytest.mark.slow
def test_a_rank_that_hangs_is_noticed(cache):
    process = ranked.pretrain(cache, *FOR_EVER, AVRL_RANK_TIMEOUT="15")
    ranked.await_snapshot(cache, process)
    os.kill(ranked.ranks_of(process)[-1], signal.SIGSTOP)
    code, line, words = ended(process, within=60)  # the launcher gives a rank 30 s before it kills it
    assert code == 5, words
    assert "died or hangs" in line


@pytest.mark.slow
def test_ranks_do_not_outlive_the_command_that_started_them(cache):
    process = ranked.pretrain(cache, *FOR_EVER)
    ranked.await_snapshot(cache, process)
    process.kill()
    assert ended(process, within=60)[0] == -signal.SIGKILL


@pytest.mark.parametrize("signum", CODES, ids=lambda one: one.name)
def test_one_process_saves_within_the_step_and_has_the_signals_code(signum, tmp_path, monkeypatch):
    """The signal arrives in the middle of step 3."""
    frames = frame_store(tmp_path / "frames", [8] * 4)
    real, steps, before = training.learning_rate, iter(range(100)), signal.getsignal(signum)

    def rate(*args):
        if next(steps) == 3:
            os.kill(os.getpid(), signum)
        return real(*args)

    monkeypatch.setattr(training, "learning_rate", rate)
    with pytest.raises(Stopped) as stopped:
        training.train(tmp_path, frames, recipe())
    assert stopped.value.code == CODES[signum]
    assert [one.name for one in (tmp_path / "scratch/snapshots").iterdir()] == ["step-000000004"]
    assert signal.getsignal(signum) == before


@pytest.mark.parametrize("said", ["[third_party/gloo/pair.cc:537] Connection closed by peer", "Timed out waiting 3 ms"])
def test_what_is_heard_of_a_lost_rank_is_temporary_and_a_bug_stays_one(said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TemporaryError, match="died or hangs"), lost_ranks():
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="shapes"), lost_ranks():
        raise RuntimeError("shapes do not fit")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match=said[-8:]), lost_ranks():
        raise RuntimeError(said)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "state.sha256"])
def test_a_flipped_bit_in_the_only_snapshot_is_refused_by_name(name, tmp_path, caplog):
    """Wherever it is: each eighth of the file in turn."""
    objective = checkpoint.build(recipe().network)
    optimizer = torch.optim.AdamW(objective.parameters())
    for parameter in objective.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint.save_snapshot(
        tmp_path, checkpoint.copied(objective, optimizer), checkpoint.Snapshot(1, [{"loss": 1.0}], [0.5])
    )
    damaged = tmp_path / "step-000000001" / name
    whole = damaged.read_bytes()
    for eighth in range(8):
        data = bytearray(whole)
        data[eighth * (len(data) - 1) // 7] ^= 1 << eighth
        damaged.write_bytes(data)
        with pytest.raises(checkpoint.IntegrityError, match="no snapshot"):
            checkpoint.load_snapshot(tmp_path, objective, optimizer)
        assert f"{damaged} is not" in caplog.text or name == "state.sha256"
        caplog.clear()
    damaged.write_bytes(whole)
    assert checkpoint.load_snapshot(tmp_path, objective, optimizer).step == 1

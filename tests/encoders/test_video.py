"""Networks of video as encoders of pairs, small, against transformers' own loading and processors."""

import importlib
import sys

import pytest
import torch
from contracts.encoder import EncoderContract, pictures
from safetensors.torch import save_file

from avrl.encoders import ENCODERS, load, videomae_k400, vjepa2
from avrl.errors import ConfigError, IntegrityError, MissingError

transformers = importlib.import_module("transformers")
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MAE = videomae_k400.SETTINGS | SMALL | {"intermediate_size": 96, "image_size": 64}
JEPA = vjepa2.SETTINGS | SMALL | {"crop_size": 64, "pred_num_hidden_layers": 1, "pred_hidden_size": 24}
JEPA |= {"pred_num_attention_heads": 2}
SIDE = {"input_size": (3, 64, 64)}


def mae(path=None):
    return videomae_k400.assemble(path, MAE, videomae_k400.DATA | SIDE)


def jepa(path=None):
    return vjepa2.assemble(path, JEPA, vjepa2.DATA | SIDE)


class TestVideoMAE(EncoderContract):
    def make(self):
        return mae()


class TestVJEPA2(EncoderContract):
    def make(self):
        return jepa()


def shaken(network, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in network.parameters():
            one += 0.05 * torch.randn(one.shape, generator=generator)
    return network.eval()


@pytest.fixture(scope="module")
def pretraining():
    """The whole network of VideoMAE's pretraining, and its state as published in 2022."""
    torch.set_num_threads(1)
    decoder = {"decoder_hidden_size": 24, "decoder_intermediate_size": 48, "decoder_num_attention_heads": 2}
    config = transformers.VideoMAEConfig(**MAE, **decoder, decoder_num_hidden_layers=1)
    network = shaken(transformers.VideoMAEForPreTraining(config), 3)
    state = {}
    for key, one in network.state_dict().items():
        for today, then in ((".query.bias", ".q_bias"), (".value.bias", ".v_bias")):
            key = key.replace(today, then)
        state[key] = one.contiguous()
    assert "videomae.encoder.layer.1.attention.attention.v_bias" in state
    return network, state


@pytest.fixture(scope="module")
def predicting():
    """The whole network of V-JEPA 2's pretraining."""
    return shaken(transformers.VJEPA2Model(transformers.VJEPA2Config(**JEPA)), 5)


def test_videomae_shows_each_frame_eight_times_in_order(pretraining, tmp_path):
    network, state = pretraining
    save_file(state, tmp_path / "model.safetensors")
    encoder = mae(tmp_path / "model.safetensors")
    frames = pictures(2, 2, 64)
    x_NCHW = encoder.prepare(frames)
    clip = torch.stack([x_NCHW[[0, 2]]] * 8 + [x_NCHW[[1, 3]]] * 8, 1)
    with torch.no_grad():
        tokens = network.videomae(clip).last_hidden_state  # (2, 8 times of 16 places, 48)
    expected = tokens.unflatten(1, (8, 4, 4)).mean(1)
    torch.testing.assert_close(encoder.patches(frames), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.encode(frames)["patch-mean"], tokens.mean(1), rtol=1e-5, atol=1e-5)


def test_vjepa2_sees_a_pair_as_one_tubelet(predicting, tmp_path):
    save_file(predicting.state_dict(), tmp_path / "model.safetensors")
    encoder = jepa(tmp_path / "model.safetensors")
    frames = pictures(2, 2, 64)
    with torch.no_grad():
        tokens = predicting.get_vision_features(encoder.prepare(frames).unflatten(0, (2, 2)))
    assert tokens.shape == (2, 16, 48)
    torch.testing.assert_close(encoder.patches(frames).flatten(1, 2), tokens, rtol=1e-5, atol=1e-5)


def test_they_load_from_a_file_by_their_rows(pretraining, predicting, tmp_path, monkeypatch):
    published = {"videomae-k400": (videomae_k400, MAE, pretraining[1])}
    published["vjepa2"] = vjepa2, JEPA, predicting.state_dict()
    for name, (module, settings, state) in published.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        monkeypatch.setattr(module, "SETTINGS", settings)
        monkeypatch.setattr(module, "DATA", module.DATA | SIDE)
        ours = load(name, weights=tmp_path / f"{name}.safetensors")
        whole = module.assemble(tmp_path / f"{name}.safetensors", settings, module.DATA)
        frames = pictures(1, 2, 64)
        assert torch.equal(ours.encode(frames)["grid"], whole.encode(frames)["grid"])


@pytest.mark.parametrize("make", [mae, jepa])
def test_the_order_of_a_pair_is_seen(make):
    encoder, frames = make(), pictures(2, 2, 64)
    there, back = encoder.encode(frames)["patch-mean"], encoder.encode(frames.flip(1))["patch-mean"]
    assert (there - back).abs().max() > 1e-3 * there.abs().max()


@pytest.mark.parametrize("make", [mae, jepa])
def test_bfloat16_is_close(make):
    encoder, frames = make(), pictures(3, 2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        halved = encoder.encode(frames)
    for name, z in encoder.encode(frames).items():
        assert halved[name].dtype == torch.float32
        assert torch.cosine_similarity(halved[name], z).min() > 0.99


def test_videomae_prepares_frames_as_its_processor_does():
    published = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "resample": 2}
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    processor = transformers.VideoMAEImageProcessor(**published, **statistics)
    encoder = videomae_k400.assemble(None, MAE | {"image_size": 224}, videomae_k400.DATA)
    for side, tolerance in ((224, 1e-4), (300, 1.01 / 255 / 0.224)):  # one level, where it rounds in another order
        frames = pictures(1, 2, side)
        expected = processor([list(frames[0].numpy())], return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(encoder.prepare(frames), expected, rtol=0, atol=tolerance)


def test_vjepa2_prepares_frames_as_its_processor_does():
    """But for the border: the processor enlarges to 292 px and cuts 256 out; a frame store has cut already."""
    processor = transformers.VJEPA2VideoProcessor(crop_size=256)
    assert processor.size["shortest_edge"] == 292
    encoder = vjepa2.assemble(None, JEPA | {"crop_size": 256}, vjepa2.DATA)
    for side, tolerance in ((256, 1e-4), (224, 1.01 / 255 / 0.224)):
        frames = pictures(1, 2, side)
        channels_first = frames[0].permute(0, 3, 1, 2)
        expected = processor(channels_first, size={"height": 256, "width": 256}, return_tensors="pt")
        torch.testing.assert_close(encoder.prepare(frames), expected.pixel_values_videos[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"videomae.encoder.layer.1.attention.attention.q_bias": None}, "1 missing (encoder.layer.1.attention.att"),
        ({"videomae.layernorm.weight": None}, "1 missing (layernorm.weight)"),
        ({"classifier.weight": torch.ones(1)}, "1 left over (classifier.weight)"),
        ({"videomae.embeddings.patch_embeddings.projection.bias": torch.ones(1)}, "1 of another shape"),
    ],
)
def test_videomae_refuses_weights_that_do_not_fit(pretraining, tmp_path, change, words):
    state = {key: one for key, one in (pretraining[1] | change).items() if one is not None}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError) as caught:
        mae(tmp_path / "model.safetensors")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder.layernorm.bias": None}, "1 missing (layernorm.bias)"),
        ({"pooler.weight": torch.ones(1)}, "1 left over (pooler.weight)"),
    ],
)
def test_vjepa2_refuses_weights_that_do_not_fit(predicting, tmp_path, change, words):
    state = {key: one for key, one in (predicting.state_dict() | change).items() if one is not None}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError) as caught:
        jepa(tmp_path / "model.safetensors")
    assert words in str(caught.value)


def test_at_their_own_size_they_are_the_published_networks():
    """Without memory for their numbers. 325,971,328 parameters are in vjepa2-vitl-fpc64-256, with the predictor."""
    with torch.device("meta"):
        vitl = transformers.VJEPA2Model(transformers.VJEPA2Config(**vjepa2.SETTINGS))
        vitb = transformers.VideoMAEModel(transformers.VideoMAEConfig(**videomae_k400.SETTINGS))
    assert sum(one.numel() for one in vitl.parameters()) == 325_971_328
    assert len(vitl.state_dict()) == 587
    assert (vitl.config.hidden_size, vitl.config.crop_size, vitl.config.tubelet_size) == (1024, 256, 2)
    config = vitb.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_frames, config.tubelet_size) == (768, 12, 16, 2)
    assert vitb.embeddings.num_patches == 1568
    assert vitb.layernorm is not None


@pytest.mark.parametrize("name", ["videomae-k400", "vjepa2"])
def test_without_transformers_the_extra_is_told(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingError) as caught:
        load(name, init="random")
    assert str(caught.value) == f"{name} needs transformers; pip install 'avrl[video]'"
    assert caught.value.exit_code == 11


@pytest.mark.parametrize("name", ["videomae-k400", "vjepa2"])
def test_the_table_knows_that_they_see_pairs(name):
    assert ENCODERS[name].paired
    with pytest.raises(ConfigError, match="init is"):
        load(name, init="guessed")

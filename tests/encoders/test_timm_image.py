"""timm's models as encoders, against timm's own transform and network, on random weights."""

import numpy as np
import pytest
import torch
from contracts.encoder import EncoderContract, pictures
from PIL import Image
from safetensors.torch import save_file

from avrl import encoders
from avrl.encoders import timm_image
from avrl.errors import ConfigError, IntegrityError
from avrl.torchvision_ops import cure, timm

VIT, CONVNET = "vit_tiny_patch16_224", "resnet18"


class TestTransformer(EncoderContract):
    def make(self):
        return encoders.load(f"timm:{VIT}", init="random")


class TestConvnet(EncoderContract):
    def make(self):
        return encoders.load(f"timm:{CONVNET}", init="random")


@pytest.fixture(scope="module")
def vit():
    torch.set_num_threads(1)
    return encoders.load(f"timm:{VIT}", init="random")


@pytest.mark.parametrize("name", [VIT, CONVNET, "tf_efficientnet_lite0"])
def test_prepares_native_frames_as_timm_does(name):
    encoder = encoders.load(f"timm:{name}", init="random")
    frames = pictures(1, 1, 224)
    config = timm.data.resolve_model_data_config(encoder.network) | {"crop_pct": 1.0}
    transform = timm.data.create_transform(**config, is_training=False)
    expected = transform(Image.fromarray(frames[0, 0].numpy()))
    torch.testing.assert_close(encoder.prepare(frames)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [112, 256, 300])
def test_resizes_as_pillow_does(vit, size):
    frames = pictures(1, 1, size)
    resized = Image.fromarray(frames[0, 0].numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    ours = (vit.prepare(frames)[0] * 0.5 + 0.5) * 255  # this model's mean and std are 0.5
    difference = (ours.permute(1, 2, 0) - torch.from_numpy(np.array(resized).astype(np.float32))).abs()
    # A level a pass, where Pillow's fixed point lies on the other side of a half: 2% of the pixels at 8 to 7.
    assert difference.max() < 2.01
    assert (difference > 1e-3).float().mean() < (0.03 if size == 256 else 1e-3)


def test_readouts_are_the_networks_tokens(vit):
    frames = pictures(2, 1, 224)
    with torch.no_grad():
        tokens = vit.network.forward_features(vit.prepare(frames))
    z, patches = vit.encode(frames), vit.patches(frames)
    assert patches.shape == (2, 14, 14, 192)
    torch.testing.assert_close(z["cls"], tokens[:, 0])
    torch.testing.assert_close(z["patch-mean"], tokens[:, 1:].mean(1))
    torch.testing.assert_close(patches.flatten(1, 2), tokens[:, 1:])
    # Place by place: the first D numbers of the grid are the upper left corner's (5 of 14 rows and columns).
    torch.testing.assert_close(z["grid"][:, :192], patches[:, :5, :5].mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_convnet_pool_is_the_networks_own():
    encoder = encoders.load(f"timm:{CONVNET}", init="random")
    frames = pictures(2, 1, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(frames)["pool"], encoder.network(encoder.prepare(frames)))


def test_more_frames_than_a_chunk(vit, monkeypatch):
    frames = pictures(5, 1, 224)
    monkeypatch.setattr(timm_image, "CPU_CHUNK", 2)
    chunked = vit.encode(frames)["cls"], vit.patches(frames)
    monkeypatch.undo()
    torch.testing.assert_close(chunked, (vit.encode(frames)["cls"], vit.patches(frames)), rtol=1e-5, atol=1e-5)


def test_registers_are_left_out_of_the_patches():
    encoder = encoders.load("timm:vit_small_patch14_reg4_dinov2.lvd142m", init="random")
    assert encoder.image_size == 224
    assert encoder.patches(pictures(1, 1, 224)).shape == (1, 16, 16, 384)
    assert list(encoder.readouts) == ["cls", "patch-mean", "grid"]


def test_random_twins_are_equal_and_leave_the_random_state_alone(vit):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    twin = encoders.load(f"timm:{VIT}", init="random")
    assert torch.equal(torch.rand(1), expected)
    for a, b in zip(twin.parameters(), vit.parameters(), strict=True):
        assert torch.equal(a, b)


def test_clip_is_the_quickgelu_form():
    encoder = encoders.load("clip", init="random")
    x = torch.linspace(-3, 3, 13)
    torch.testing.assert_close(encoder.network.blocks[0].mlp.act(x), x * torch.sigmoid(1.702 * x))
    assert (encoder.image_size, encoder.readouts["cls"]) == (224, 768)
    mean = (0.48145466, 0.4578275, 0.40821073)
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor(mean))


def test_weights_in_timms_layout_round_trip(vit, tmp_path):
    other = timm.create_model(VIT, num_classes=10)  # with a classifier, as published
    save_file(other.state_dict(), tmp_path / "model.safetensors")
    encoder = encoders.load(f"timm:{VIT}", weights=tmp_path / "model.safetensors")
    assert torch.equal(encoder.network.blocks[3].mlp.fc1.weight, other.blocks[3].mlp.fc1.weight)
    assert not torch.equal(encoder.network.cls_token, vit.network.cls_token)


def test_dinov2s_position_embeddings_come_down_from_518_px(tmp_path):
    """From the authors' own layout (known by its mask token), with position embeddings for 37x37 patches."""
    name = "vit_small_patch14_dinov2.lvd142m"
    published = timm.create_model(name, num_classes=0)
    assert published.pos_embed.shape[1] == 1 + 37 * 37
    torch.save(published.state_dict() | {"mask_token": torch.zeros(1, 384)}, tmp_path / "pytorch_model.bin")
    encoder = encoders.load(f"timm:{name}", weights=tmp_path / "pytorch_model.bin")
    assert encoder.network.pos_embed.shape[1] == 1 + 16 * 16
    # As in their interpolate_pos_encoding: sides of 16.1 for a scale, no antialiasing, CLS as it is.
    patches = published.pos_embed.data[0, 1:].reshape(37, 37, 384).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(patches, scale_factor=16.1 / 37, mode="bicubic")
    torch.testing.assert_close(encoder.network.pos_embed.data[0, 1:], expected[0].flatten(1).T)
    assert torch.equal(encoder.network.pos_embed.data[0, 0], published.pos_embed.data[0, 0])


@pytest.mark.parametrize(("cut", "words"), [("blocks.7.", "missing"), ("norm.weight", "missing")])
def test_refuses_weights_with_a_hole(vit, tmp_path, cut, words):
    """timm's own loader takes such files without the classifier, and leaves random weights in the hole."""
    state = {key: one for key, one in vit.network.state_dict().items() if not key.startswith(cut)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError, match=words) as caught:
        encoders.load(f"timm:{VIT}", weights=tmp_path / "model.safetensors")
    assert cut in str(caught.value)


def test_refuses_another_models_weights(tmp_path):
    save_file(timm.create_model(CONVNET).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError, match=VIT):
        encoders.load(f"timm:{VIT}", weights=tmp_path / "model.safetensors")


@pytest.mark.parametrize(("name", "init"), [("timm:no_such_model", "random"), (f"timm:{VIT}", "guessed")])
def test_refuses_what_it_does_not_know(name, init):
    with pytest.raises(ConfigError):
        encoders.load(name, init=init)


def test_a_tag_that_timm_lacks_is_told_with_those_it_has():
    """As a slip of the keyboard in the tag, of which timm's own word is a RuntimeError."""
    with pytest.raises(ConfigError, match=r"vit_base_patch14_dinov2\.lvd142'; known: \S+dinov2\.lvd142m$") as caught:
        encoders.known("timm:vit_base_patch14_dinov2.lvd142")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "places"),
    [("resmlp_12_224", 14), ("gmlp_ti16_224", 14), ("hiera_tiny_224", 7), ("levit_128s", 4), ("efficientformer_l1", 7)],
)
def test_a_network_that_names_no_tokens_but_patches_is_read(name, places):
    """Every token is a patch, in rows from the upper left."""
    with torch.device("meta"):
        encoder = encoders.load(f"timm:{name}", init="random")
    assert list(encoder.readouts) == ["patch-mean", "grid"]
    tokens = torch.arange(places**2.0).reshape(1, -1, 1)
    encoder.network.forward_features = lambda _: tokens
    y, map_BhwD = encoder._forward(torch.zeros(1))
    assert torch.equal(y, tokens)
    assert torch.equal(map_BhwD[0, :, :, 0], torch.arange(places**2.0).reshape(places, places))


@pytest.mark.parametrize(
    ("name", "words"),
    [("crossvit_9_240", "2 maps at once"), ("pit_ti_224", "has a class token"), ("volo_d1_224", "has a class token")],
)
def test_a_network_whose_patches_nobody_can_tell_is_refused_with_the_reason(name, words):
    with torch.device("meta"), pytest.raises(ConfigError, match=words):
        encoders.load(f"timm:{name}", init="random")


def test_torchvision_is_left_alone_where_it_is_healthy():
    before = timm.__name__, torch.ops.torchvision.nms
    cure()
    assert (timm.__name__, torch.ops.torchvision.nms) == before

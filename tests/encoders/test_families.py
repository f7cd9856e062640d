"""Every family of image encoders on two narrow blocks: its published key layouts, and what others make of the same.

Oracles: transformers' networks and processors, torchvision's ResNet. Their weights come to ours through files in the
layout that they are published in.
"""

import importlib
import re

import pytest
import torch
from contracts.encoder import EncoderContract, pictures
from PIL import Image
from safetensors.torch import load_file, save_file

from avrl import encoders
from avrl.encoders import ENCODERS, mae, timm_image, transformers_layout, vip, weights
from avrl.errors import IntegrityError

transformers = importlib.import_module("transformers")
torchvision = importlib.import_module("torchvision")

NARROW = {"embed_dim": 48, "depth": 2, "num_heads": 4}
SIDE = 64  # px, instead of 224
WIDE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def small(name, **settings):
    """A row of the table, as narrow as this: the same code, the same key layout."""
    return timm_image.build(ENCODERS[name].argument, **(NARROW | settings))


def encoder_of(network, state=None):
    if state is not None:
        timm_image.fill(network, state, "it")
    return timm_image.ImageEncoder(network, timm_image.data_config(network))


def shaken(network):
    """Random numbers in every weight, those too that begin as 0 or 1, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for one in network.parameters():
            one.copy_(torch.randn(one.shape, generator=generator) * 0.1 + (one.ndim == 1) * 0.2)
    return network.eval()


def published(network, tmp_path):
    """The tensors of the file that transformers publishes for its network."""
    network.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors")


class Small(EncoderContract):
    other_size = 48


class TestDinov2(Small):
    def make(self):
        return encoder_of(shaken(small("dinov2", img_size=70)))


class TestDinov2WithRegisters(Small):
    def make(self):
        return encoder_of(shaken(small("dinov2-reg", img_size=70)))


class TestDinov3(Small):
    def make(self):
        return encoder_of(shaken(small("dinov3", img_size=SIDE)))


class TestClip(Small):
    def make(self):
        return encoder_of(small("clip", img_size=SIDE))


class TestSiglip(Small):
    def make(self):
        return encoder_of(small("siglip", img_size=SIDE))


class TestMae(Small):
    def make(self):
        return mae.encoder(mae.Size(48, 2, 4, SIDE))


class TestVip(Small):
    other_size = 96

    def make(self):
        return vip.encoder("resnet18")


# The rows.


def test_sides_and_readouts_of_whole_rows():
    found = {name: encoders.load(name, init="random") for name in ("dinov2-reg-s", "dinov3-s", "mvp-s")}
    assert {name: (one.image_size, one.readouts["cls"]) for name, one in found.items()} == {
        "dinov2-reg-s": (224, 384),
        "dinov3-s": (256, 384),
        "mvp-s": (224, 384),
    }
    assert found["mvp-s"].network.blocks[0].attn.num_heads == 12  # timm's vit_small has 6


@pytest.mark.parametrize("name", [name for name, one in ENCODERS.items() if one.module == timm_image.__name__])
def test_rows_of_timm_can_be_narrowed(name):
    """So each is a network that timm knows, with the readouts that its family has."""
    expected = {"map"} if "siglip" in name else {"cls"}
    assert set(encoder_of(small(name)).readouts) == expected | {"patch-mean", "grid"}


def test_every_name_of_mae_has_its_size():
    assert {one.argument for one in ENCODERS.values() if one.module == mae.__name__} == set(mae.SIZES)


# Features, against transformers.


def test_clip_is_transformers(tmp_path):
    config = transformers.CLIPVisionConfig(**WIDE, intermediate_size=192, image_size=SIDE, patch_size=16)
    assert config.hidden_act == "quick_gelu"
    theirs = shaken(transformers.CLIPVisionModel(config))
    ours = encoder_of(small("clip", img_size=SIDE), published(theirs, tmp_path))
    frames = pictures(3, 1, SIDE)
    with torch.no_grad():
        found = theirs(ours.prepare(frames))
        patches = theirs.post_layernorm(found.last_hidden_state[:, 1:])
    torch.testing.assert_close(ours.encode(frames)["cls"], found.pooler_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.patches(frames).flatten(1, 2), patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_siglip_is_transformers(tmp_path, prefix):
    config = transformers.SiglipVisionConfig(**WIDE, intermediate_size=192, image_size=SIDE, patch_size=16)
    theirs = shaken(transformers.SiglipVisionModel(config))
    state = {prefix + key: one for key, one in published(theirs, tmp_path).items()}
    if prefix:  # a whole SigLIP, as google/siglip-base-patch16-224 is
        state |= {"text_model.final_layer_norm.bias": torch.zeros(3), "logit_scale": torch.zeros(1)}
    ours = encoder_of(small("siglip", img_size=SIDE), state)
    frames = pictures(3, 1, SIDE)
    with torch.no_grad():
        found = theirs(ours.prepare(frames))
    torch.testing.assert_close(ours.encode(frames)["map"], found.pooler_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.patches(frames).flatten(1, 2), found.last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_is_transformers(tmp_path, registers):
    sizes = {**WIDE, "image_size": 70, "patch_size": 14}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        theirs = shaken(transformers.Dinov2WithRegistersModel(config))
    else:
        theirs = shaken(transformers.Dinov2Model(transformers.Dinov2Config(**sizes)))
    ours = encoder_of(small("dinov2-reg" if registers else "dinov2", img_size=70), published(theirs, tmp_path))
    frames = pictures(3, 1, 70)
    with torch.no_grad():
        tokens = theirs(ours.prepare(frames)).last_hidden_state
    torch.testing.assert_close(ours.encode(frames)["cls"], tokens[:, 0], rtol=1e-5, atol=1e-5)
    patches = ours.patches(frames).flatten(1, 2)
    torch.testing.assert_close(patches, tokens[:, 1 + registers :], rtol=1e-5, atol=1e-5)


def dinov3_of_the_authors(theirs):
    """transformers' DINOv3 in the layout of the authors' .pth: one qkv with a masked bias, registers as storage."""
    renames = [
        ("embeddings.patch_embeddings", "patch_embed.proj"),
        ("embeddings.register_tokens", "storage_tokens"),
        ("embeddings.", ""),
        ("model.layer.", "blocks."),
        ("attention.o_proj", "attn.proj"),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
        ("mlp.up_proj", "mlp.fc1"),
        ("mlp.down_proj", "mlp.fc2"),
    ]
    state, found = theirs.state_dict(), {"rope_embed.periods": torch.zeros(3)}
    for key, one in state.items():
        if "_proj" not in key or "o_proj" in key or "mlp" in key:
            for old, new in renames:
                key = key.replace(old, new)
            found[key] = one
    for block in range(2):
        parts = [state[f"model.layer.{block}.attention.{part}_proj.weight"] for part in "qkv"]
        found[f"blocks.{block}.attn.qkv.weight"] = torch.cat(parts)
        found[f"blocks.{block}.attn.qkv.bias"] = found[f"blocks.{block}.attn.qkv.bias_mask"] = torch.zeros(144)
    return found


def dinov3_of_transformers(**settings):
    config = transformers.DINOv3ViTConfig(
        **WIDE, intermediate_size=192, image_size=SIDE, patch_size=16, num_register_tokens=4, **settings
    )
    return shaken(transformers.DINOv3ViTModel(config))


@pytest.mark.parametrize("layout", ["authors", "transformers"])
def test_dinov3_is_transformers(layout, tmp_path, capsys):
    theirs = dinov3_of_transformers(query_bias=False, value_bias=False)
    state = dinov3_of_the_authors(theirs) if layout == "authors" else published(theirs, tmp_path)
    assert layout == "authors" or "layer.0.attention.q_proj.weight" in state  # as facebook/dinov3-* are published
    capsys.readouterr()
    ours = encoder_of(small("dinov3", img_size=SIDE), state)
    assert capsys.readouterr().out == ""  # timm prints what it leaves out
    frames = pictures(3, 1, SIDE)
    with torch.no_grad():
        tokens = theirs(ours.prepare(frames)).last_hidden_state
    torch.testing.assert_close(ours.encode(frames)["cls"], tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.patches(frames).flatten(1, 2), tokens[:, 5:], rtol=1e-5, atol=1e-5)


def test_dinov3_with_biases(tmp_path):
    """They find their place in the network that has one, and are not lost in the one that has not."""
    theirs = dinov3_of_transformers()
    state = published(theirs, tmp_path)
    with pytest.raises(IntegrityError, match=r"no place for blocks.0.attn.qkv.bias.*dinov3_qkvb"):
        encoder_of(small("dinov3", img_size=SIDE), state)
    network = timm_image.build("vit_base_patch16_dinov3_qkvb.lvd1689m", **NARROW, img_size=SIDE)
    ours, frames = encoder_of(network, state), pictures(3, 1, SIDE)
    with torch.no_grad():
        tokens = theirs(ours.prepare(frames)).last_hidden_state
    torch.testing.assert_close(ours.encode(frames)["cls"], tokens[:, 0], rtol=1e-5, atol=1e-5)
    zeros = {key: one * 0 if key.endswith(("q_proj.bias", "v_proj.bias")) else one for key, one in state.items()}
    assert encoder_of(small("dinov3", img_size=SIDE), zeros).readouts["cls"] == 48


def vit(tmp_path):
    """transformers' ViT with MAE's epsilon, and its weights in MAE's layout."""
    config = transformers.ViTConfig(**WIDE, intermediate_size=192, image_size=SIDE, patch_size=16, layer_norm_eps=1e-6)
    theirs = shaken(transformers.ViTModel(config, add_pooling_layer=False))
    return theirs, transformers_layout.to_timm(published(theirs, tmp_path))


LAYOUTS = {
    "MAE's encoder": ("", {}),
    "with MAE's decoder": ("", {"mask_token": torch.zeros(2), "decoder_blocks.0.norm1.bias": torch.zeros(2)}),
    "SPA": (
        mae.SPA,
        {f"{mae.SPA}upsample.0.weight": torch.zeros(2), "model.render_head.field.weight": torch.zeros(2)},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mae_is_transformers(tmp_path, layout):
    theirs, state = vit(tmp_path)
    prefix, more = LAYOUTS[layout]
    torch.save({"model": {prefix + key: one for key, one in state.items()} | more}, tmp_path / "published.pth")
    ours = mae.encoder(mae.Size(48, 2, 4, SIDE), weights.read(tmp_path / "published.pth"))
    frames = pictures(3, 1, SIDE)
    with torch.no_grad():
        tokens = theirs(ours.prepare(frames)).last_hidden_state
    torch.testing.assert_close(ours.encode(frames)["cls"], tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.patches(frames).flatten(1, 2), tokens[:, 1:], rtol=1e-5, atol=1e-5)


def vip_published(network):
    return {f"module.convnet.{key}": one for key, one in network.state_dict().items()}


def test_vip_is_its_own_formula(tmp_path):
    """Bytes / 255, ImageNet's statistics, a ResNet with 1,024 outputs; from a file with ``vip`` around it."""
    theirs = torchvision.models.resnet18()
    theirs.fc = torch.nn.Linear(512, 1024)
    torch.save({"vip": vip_published(shaken(theirs)), "global_step": 3}, tmp_path / "model.pt")
    ours = vip.encoder("resnet18", weights.read(tmp_path / "model.pt"))
    frames = pictures(2, 1, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x_BCHW = ((frames[:, 0] / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours.prepare(frames), x_BCHW, rtol=0, atol=1e-4)
    with torch.no_grad():
        expected = theirs(x_BCHW)
    z = ours.encode(frames)
    torch.testing.assert_close(z["embedding"], expected, rtol=1e-4, atol=1e-4)
    assert {name: one.shape[1] for name, one in z.items()} == {"embedding": 1024, "pool": 512, "grid": 9 * 512}


# Other layouts.


def openai(state):
    """timm's CLIP in OpenAI's own layout, half precision, with the other half of CLIP."""
    renames = [
        (r"^patch_embed\.proj", "conv1"),
        (r"^pos_embed$", "positional_embedding"),
        (r"^cls_token$", "class_embedding"),
        (r"^blocks", "transformer.resblocks"),
        (r"norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"\.norm(\d)", r".ln_\1"),
        (r"qkv\.", "in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    ]
    found = {"visual.proj": torch.zeros(48, 5), "logit_scale": torch.zeros(()), "ln_final.bias": torch.zeros(2)}
    for key, one in state.items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        found[f"visual.{key}"] = one.squeeze().half()
    return found


def test_clip_takes_openais_own_layout():
    network = shaken(small("clip", img_size=SIDE))
    ours = encoder_of(small("clip", img_size=SIDE), openai(network.state_dict()))
    expected = {key: one.half().float() for key, one in network.state_dict().items()}
    assert all(torch.equal(one, expected[key]) for key, one in ours.network.state_dict().items())


def test_a_torchscript_archive_is_told_what_to_do(tmp_path):
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-B-16.pt")
    with pytest.raises(IntegrityError, match=r"TorchScript.*state_dict\(\)"):
        weights.read(tmp_path / "ViT-B-16.pt")


# Half-fitting weights.

FAMILIES = {
    "dinov2": lambda state=None: encoder_of(small("dinov2", img_size=70), state),
    "dinov2-reg": lambda state=None: encoder_of(small("dinov2-reg", img_size=70), state),
    "dinov3": lambda state=None: encoder_of(small("dinov3", img_size=SIDE), state),
    "clip": lambda state=None: encoder_of(small("clip", img_size=SIDE), state),
    "siglip": lambda state=None: encoder_of(small("siglip", img_size=SIDE), state),
    "mae": lambda state=None: mae.encoder(mae.Size(48, 2, 4, SIDE), state),
    "vip": lambda state=None: vip.encoder("resnet18", state),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_too_few_or_too_many_are_refused_by_name(family):
    make = FAMILIES[family]
    state = dict(make().network.state_dict())
    make(dict(state))  # whole, they fit
    key = next(one for one in reversed(state) if one.endswith("bias"))
    with pytest.raises(IntegrityError, match=rf"missing \({re.escape(key)}\)"):
        make({one: value for one, value in state.items() if one != key})
    with pytest.raises(IntegrityError, match=r"left over \(adapter\.weight\)"):
        make(state | {"adapter.weight": torch.zeros(1)})


def test_a_block_without_its_key_is_refused(tmp_path):
    state = published(
        transformers.ViTModel(
            transformers.ViTConfig(**WIDE, intermediate_size=192, image_size=SIDE), add_pooling_layer=False
        ),
        tmp_path,
    )
    del state["encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(IntegrityError, match="the weights do not fit it"):
        encoder_of(timm_image.build("vit_base_patch16_224", **NARROW, img_size=SIDE), state)


# Preparation, against the upstream's.


def processor(name):
    """Their published preprocessor_config.json, by its values; frames of 224 px are neither resized nor cut."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    if name.startswith("clip"):  # openai/clip-vit-base-patch16
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        sizes = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
        return transformers.CLIPImageProcessor(**sizes, resample=3, image_mean=mean, image_std=std)
    if name.startswith("siglip"):  # google/siglip-base-patch16-224
        return transformers.SiglipImageProcessor(size={"height": 224, "width": 224}, resample=3, **half)
    # facebook/dinov2-base; it would enlarge to 256 px and cut 224 out
    return transformers.BitImageProcessor(do_resize=False, do_center_crop=False, **imagenet)


@pytest.mark.parametrize("name", ["clip", "clip-l", "siglip", "siglip2", "siglip-so400m", "dinov2", "dinov2-reg"])
def test_prepares_as_transformers_does(name):
    frames = pictures(2, 1, 224)
    expected = processor(name)([one[0].numpy() for one in frames], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder_of(small(name)).prepare(frames), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["dinov3", "dinov2", "siglip"])
@pytest.mark.parametrize("size", [224, 336])
def test_prepares_as_timm_does(name, size):
    ours = encoder_of(small(name))
    frames = pictures(1, 1, size)
    config = timm_image.data_config(ours.network) | {"crop_pct": 1.0}
    transform = timm_image.timm.data.create_transform(**config, is_training=False)
    difference = (ours.prepare(frames)[0] - transform(Image.fromarray(frames[0, 0].numpy()))).abs()
    assert (difference > 1e-4).float().mean() < 1e-3  # Pillow's fixed point, on the other side of a half
    assert difference.max() < 2.01 / 255 / min(config["std"])  # a level a pass


def test_mae_prepares_as_its_transform():
    """VC-1's vit_transforms and MVP's and SPA's without the cut: PIL -> [0, 1] -> ImageNet's statistics."""
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    frames = pictures(1, 1, 224)
    ours = mae.encoder(mae.Size(48, 2, 4)).prepare(frames)[0]
    torch.testing.assert_close(ours, transform(Image.fromarray(frames[0, 0].numpy())), rtol=0, atol=1e-4)


def test_a_row_loads_from_its_file(tmp_path):
    """The whole way of one row: a file on disk in the upstream layout, by `encoders.load`."""
    network = shaken(encoders.load("mvp-s", init="random").network)
    torch.save({"model": network.state_dict()}, tmp_path / "mvp.pth")
    ours = encoders.load("mvp-s", weights=tmp_path / "mvp.pth")
    assert torch.equal(ours.network.pos_embed, network.pos_embed)
    save_file(
        {key: one for key, one in network.state_dict().items() if key != "norm.bias"}, tmp_path / "cut.safetensors"
    )
    with pytest.raises(IntegrityError, match=r"do not fit mvp-s .*missing \(norm\.bias\)"):
        encoders.load("mvp-s", weights=tmp_path / "cut.safetensors")


def narrow(monkeypatch):
    """Networks of the table's rows as narrow as `NARROW`, or ResNet-18: what is loaded is all that is kept."""
    build = timm_image.build

    def narrowed(argument, **settings):
        return build("resnet18") if argument.startswith("resnet") else build(argument, **(NARROW | settings))

    monkeypatch.setattr(timm_image, "build", narrowed)
    monkeypatch.setattr(mae, "SIZES", dict.fromkeys(mae.SIZES, mae.Size(48, 2, 4)))


def as_published(one):
    """Random weights, and the same in the layout of a row's published file."""
    if one.module == timm_image.__name__:  # timm's own, at the side it was trained at, with its classifier
        network = shaken(timm_image.timm.create_model(one.hub.removeprefix("timm/"), **NARROW))
        return network.state_dict(), network.state_dict()
    if one.module == mae.__name__:
        state = shaken(mae.encoder(mae.Size(48, 2, 4)).network).state_dict()
        if one.argument.startswith("spa"):
            return state, {f"{mae.SPA}{key}": value for key, value in state.items()}
        return state, {"model": state | {"mask_token": torch.zeros(2)}}
    if one.module == vip.__name__:
        network = shaken(vip.encoder("resnet18").network)
        return network.state_dict(), {"vip": vip_published(network)}
    network = shaken(timm_image.build("resnet18"))
    return network.state_dict(), {"r3m": vip_published(network) | {"module.lang_rew.pred.0.bias": torch.zeros(2)}}


IMAGES = ("timm_image", "mae", "r3m", "vip")


@pytest.mark.parametrize(
    "name", [name for name, one in ENCODERS.items() if one.module.removeprefix("avrl.encoders.") in IMAGES]
)
def test_every_row_loads_from_a_file_in_its_published_layout(name, tmp_path, monkeypatch):
    """By the public door, on narrow networks; openvla, pi0 and the networks of video beside their own oracles."""
    narrow(monkeypatch)
    one = ENCODERS[name]
    state, file = as_published(one)
    path = tmp_path / (one.url or one.files[0]).rpartition("/")[2]
    (save_file if path.suffix == ".safetensors" else torch.save)(file, path)
    ours = encoders.load(name, weights=path).network.state_dict()
    positions = {"pos_embed"} if "dinov2" in name else set()  # come down from 518 px: see test_timm_image
    assert all(torch.equal(ours[key], state[key]) for key in ours.keys() - positions)
    assert len(ours.keys() - positions) > 20

"""Vision towers of robot policies, on small networks of the same kind and in the published key layouts."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contracts.encoder import EncoderContract, pictures
from loopback import Files, serving
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save, save_file

from avrl.encoders import ENCODERS, load, openvla, pi0, timm_image, towers, weights
from avrl.errors import ConfigError, IntegrityError, MissingError, NotFoundError
from avrl.torchvision_ops import timm

transforms = importlib.import_module("torchvision.transforms.functional")
transformers = importlib.import_module("transformers")
REST = {"language_model.model.norm.weight": torch.ones(4), "projector.fc1.bias": torch.ones(4)}


def halves(seed=None):
    """Small networks of OpenVLA's two kinds; with a seed, of other weights than the untrained twin's."""
    size = {"depth": 3, "embed_dim": 32, "num_heads": 2}
    networks = [timm_image.build(name, **size, **settings) for name, settings in openvla.NETWORKS.items()]
    return [shaken(network, seed) for network in networks] if seed else networks


def shaken(network, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in network.parameters():
            one += 0.05 * torch.randn(one.shape, generator=generator)
    return network.eval()


def published(networks):
    """The state of two networks as openvla-7b has it, whole, in bfloat16."""
    state = {}
    for half, network in zip(("featurizer", "fused_featurizer"), networks, strict=True):
        for key, one in network.state_dict().items():
            state[f"vision_backbone.{half}.{key.replace('.gamma', '.scale_factor')}"] = one.bfloat16()
    return state


@pytest.fixture(scope="module")
def theirs():
    torch.set_num_threads(1)
    return halves(seed=3)


@pytest.fixture(scope="module")
def file(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("openvla") / "model.safetensors"
    save_file(published(theirs) | REST, path)
    return path


def sharded(folder, state, index=towers.INDEX):
    """A checkpoint of three shards, the last of which has no tensor of the tower."""
    eyes = sorted(key for key in state if "vision" in key)
    names = {f"model-0000{n + 1}-of-00003.safetensors": eyes[n::2] for n in range(2)}
    names["model-00003-of-00003.safetensors"] = sorted(state.keys() - set(eyes))
    folder.mkdir(exist_ok=True)
    for shard, keys in names.items():
        save_file({key: state[key] for key in keys}, folder / shard)
    found = {key: shard for shard, keys in names.items() for key in keys}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": found}))
    return folder


def tokens(networks, frames):
    """prismatic's own words: timm's `get_intermediate_layers`, n={the second-last}, of uncut networks."""
    x_BCHW = frames[:, 0].permute(0, 3, 1, 2) / 255
    found = []
    for network, mean, std in zip(
        networks, (openvla.DINO_MEAN, openvla.SIGLIP_MEAN), (openvla.DINO_STD, openvla.SIGLIP_STD), strict=True
    ):
        x = transforms.normalize(x_BCHW, mean, std)
        with torch.no_grad():
            found += network.get_intermediate_layers(x, n={len(network.blocks) - 2})
    return torch.cat(found, 2)


class TestFusedTower(EncoderContract):
    def make(self):
        return openvla.assemble(None, *halves())


class TestSiglipTower(EncoderContract):
    def make(self):
        return pi0.assemble(None, siglip())


# OpenVLA.


def test_openvla_gives_the_second_last_blocks_patches_of_both(theirs, file):
    rounded = halves()
    for own, their in zip(rounded, theirs, strict=True):
        own.load_state_dict({key: one.bfloat16() for key, one in their.state_dict().items()})
    frames = pictures(2, 1, 224)
    encoder = openvla.assemble(file, *halves())
    expected = tokens([one.eval() for one in rounded], frames)
    torch.testing.assert_close(encoder.patches(frames).flatten(1, 2), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.encode(frames)["patch-mean"], expected.mean(1), rtol=1e-5, atol=1e-5)
    assert encoder.readouts == {"patch-mean": 64, "grid": 9 * 64}
    other = openvla.assemble(None, *halves()).encode(frames)["patch-mean"]
    assert (other - expected.mean(1)).abs().max() > 0.1  # else nothing was loaded


def test_openvla_loads_from_a_checkpoint_by_its_row(theirs, file, tmp_path, monkeypatch):
    folder = sharded(tmp_path, published(theirs) | REST)
    frames = pictures(1, 1, 224)
    expected = openvla.assemble(file, *halves()).encode(frames)["grid"]
    size = {"depth": 3, "embed_dim": 32, "num_heads": 2}
    monkeypatch.setattr(openvla, "NETWORKS", {name: size | more for name, more in openvla.NETWORKS.items()})
    for given in (file, folder):
        assert torch.equal(load("openvla", weights=given).encode(frames)["grid"], expected)


def test_openvla_prepares_frames_as_its_processor_does():
    """Published: bicubic to 224 px, [0, 1], each half's mean and deviation; six channels."""
    encoder = openvla.assemble(None, *halves())
    for side, tolerance in ((224, 1e-4), (300, 1.01 / 255 / min(openvla.DINO_STD))):  # PIL rounds between its passes
        frames = pictures(1, 1, side)
        picture = Image.fromarray(frames[0, 0].numpy())
        picture = transforms.resize(picture, [224, 224], transforms.InterpolationMode.BICUBIC)
        pixels = transforms.to_tensor(picture)
        tower = encoder.network
        for mean, std, own_mean, own_std in zip(
            (openvla.DINO_MEAN, openvla.SIGLIP_MEAN),
            (openvla.DINO_STD, openvla.SIGLIP_STD),
            tower.mean,
            tower.std,
            strict=True,
        ):
            ours = (encoder.prepare(frames)[0] - own_mean) / own_std
            expected = transforms.normalize(pixels, mean, std)
            torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


def test_openvlas_mean_and_deviation_are_imagenets_in_bfloat16():
    exact = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    assert torch.equal(exact.bfloat16().float(), torch.tensor([openvla.DINO_MEAN, openvla.DINO_STD]))


def test_openvlas_halves_have_the_exact_gelu():
    """prismatic overrides no activation, and timm's SigLIP of its time had the exact one."""
    x = torch.linspace(-3, 3, 13)
    for network in halves():
        assert torch.equal(network.blocks[0].mlp.act(x), torch.nn.functional.gelu(x))


def test_openvla_at_its_own_size_has_the_published_shapes():
    """Without memory for its numbers: 1,024 + 1,152 dimensions, and the keys that the checkpoint must have."""
    with torch.device("meta"):
        tower = openvla.FusedTower(*(timm.create_model(one, num_classes=0, img_size=224) for one in openvla.NETWORKS))
    state = tower.state_dict()
    assert [len(one.blocks) for one in (tower.featurizer, tower.fused_featurizer)] == [23, 26]
    assert state["featurizer.pos_embed"].shape == (1, 256, 1024)
    assert state["featurizer.reg_token"].shape == (1, 4, 1024)
    assert state["featurizer.blocks.22.ls2.gamma"].shape == (1024,)
    assert state["fused_featurizer.pos_embed"].shape == (1, 256, 1152)
    assert state["fused_featurizer.blocks.25.mlp.fc1.weight"].shape == (4304, 1152)
    assert tower.surplus[:3] == ("featurizer.blocks.23.", "featurizer.norm.", "featurizer.attn_pool.")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_backbone.featurizer.blocks.1.ls1.scale_factor": None}, "1 missing (featurizer.blocks.1.ls1.gamma)"),
        ({"vision_backbone.fused_featurizer.pos_embed": None}, "1 missing (fused_featurizer.pos_embed)"),
        ({"vision_backbone.ears.weight": torch.ones(1)}, "1 left over (ears.weight)"),
        ({"vision_backbone.featurizer.cls_token": torch.ones(1)}, "1 of another shape (featurizer.cls_token)"),
    ],
)
def test_openvla_refuses_weights_that_do_not_fit(theirs, tmp_path, change, words):
    state = {key: one for key, one in (published(theirs) | change).items() if one is not None}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError) as caught:
        openvla.assemble(tmp_path / "model.safetensors", *halves())
    assert words in str(caught.value)


# pi0.

SMALL = {"hidden_size": 32, "intermediate_size": 119, "num_hidden_layers": 3, "num_attention_heads": 2}


NARROW = {"depth": 3, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 119 / 32}


def siglip():
    return timm_image.build(pi0.NETWORK, **pi0.SETTINGS, **NARROW)


@pytest.fixture(scope="module")
def paligemma():
    """transformers' own tower of PaliGemma, small, with weights that are not the untrained twin's."""
    known = transformers.PaliGemmaConfig().vision_config
    config = transformers.SiglipVisionConfig(**known.to_dict() | SMALL | {"image_size": 224, "patch_size": 14})
    assert (config.hidden_act, config.layer_norm_eps, config.vision_use_head) == ("gelu_pytorch_tanh", 1e-6, False)
    return shaken(transformers.SiglipVisionModel(config), 7)


PREFIXES = [
    "paligemma_with_expert.paligemma.model.vision_tower.vision_model.",
    "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.",
    "paligemma_with_expert.paligemma.vision_tower.vision_model.",
    "model.paligemma_with_expert.paligemma.model.vision_tower.",
]


def policy(paligemma, prefix=PREFIXES[0]):
    # transformers 4 had a level more.
    state = {key.removeprefix("vision_model."): one for key, one in paligemma.state_dict().items()}
    return {prefix + key: one for key, one in state.items()} | {
        prefix.partition("vision_tower")[0] + "multi_modal_projector.linear.weight": torch.ones(2, 2),
        "paligemma_with_expert.gemma_expert.model.norm.weight": torch.ones(2),
    }


def test_pi0_loads_from_a_checkpoint_by_its_row(paligemma, tmp_path, monkeypatch):
    save_file(policy(paligemma), tmp_path / "model.safetensors")
    frames, expected = pictures(1, 1, 224), pi0.assemble(tmp_path / "model.safetensors", siglip())
    monkeypatch.setattr(pi0, "SETTINGS", pi0.SETTINGS | NARROW)
    ours = load("pi0", weights=tmp_path / "model.safetensors")
    assert torch.equal(ours.encode(frames)["grid"], expected.encode(frames)["grid"])


@pytest.mark.parametrize("prefix", PREFIXES)
def test_pi0_is_paligemmas_own_tower(paligemma, tmp_path, prefix):
    save_file(policy(paligemma, prefix), tmp_path / "model.safetensors")
    encoder = pi0.assemble(tmp_path / "model.safetensors", siglip())
    frames = pictures(2, 1, 224)
    x_BCHW = frames[:, 0].permute(0, 3, 1, 2) / 255 * 2 - 1  # lerobot's words
    torch.testing.assert_close(encoder.prepare(frames), x_BCHW, rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = paligemma(x_BCHW).last_hidden_state
    torch.testing.assert_close(encoder.patches(frames).flatten(1, 2), expected, rtol=1e-5, atol=1e-5)
    assert encoder.readouts == {"patch-mean": 32, "grid": 9 * 32}


def test_pi0_prepares_frames_as_transformers_does():
    processor = transformers.SiglipImageProcessor(
        size={"height": 224, "width": 224}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2
    )
    encoder = pi0.assemble(None, siglip())
    for side, tolerance in ((224, 1e-4), (300, 2.02 / 255)):  # one level, where it rounds in another order
        frames = pictures(1, 1, side)
        expected = processor(Image.fromarray(frames[0, 0].numpy()), return_tensors="pt").pixel_values
        torch.testing.assert_close(encoder.prepare(frames), expected, rtol=0, atol=tolerance)


def test_pi0_at_its_own_size_has_the_published_shapes():
    with torch.device("meta"):
        state = timm.create_model(pi0.NETWORK, num_classes=0, img_size=224, **pi0.SETTINGS).state_dict()
        config = transformers.PaliGemmaConfig().vision_config
        config.image_size, config.intermediate_size = 224, 4304  # as lerobot sets it
        model = transformers.SiglipVisionModel(config)
        found = pi0.translate(dict(model.state_dict()))
    assert {key: one.shape for key, one in found.items()} == {key: one.shape for key, one in state.items()}
    assert len({key.split(".")[1] for key in state if key.startswith("blocks.")}) == 27


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder.layers.1.self_attn.k_proj.bias": None}, "missing (blocks.1.attn.qkv.bias); 2 left over"),
        ({"post_layernorm.weight": None}, "1 missing (norm.weight)"),
        ({"head.probe": torch.ones(1)}, "1 left over (head.probe)"),
    ],
)
def test_pi0_refuses_weights_that_do_not_fit(paligemma, tmp_path, change, words):
    state = policy(paligemma) | {PREFIXES[0] + key: one for key, one in change.items()}
    save_file({key: one for key, one in state.items() if one is not None}, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError) as caught:
        pi0.assemble(tmp_path / "model.safetensors", siglip())
    assert words in str(caught.value)


@pytest.mark.parametrize("make", [lambda: openvla.assemble(None, *halves()), lambda: pi0.assemble(None, siglip())])
def test_bfloat16_is_close(make):
    encoder, frames = make(), pictures(3, 1, 224)
    with torch.autocast("cpu", torch.bfloat16):
        halved = encoder.encode(frames)
    for name, z in encoder.encode(frames).items():
        assert halved[name].dtype == torch.float32
        assert torch.cosine_similarity(halved[name], z).min() > 0.99


# Where they lie.


def test_a_folder_of_shards_is_read_and_every_needed_shard_counts(theirs, file, tmp_path):
    folder = sharded(tmp_path / "checkpoint", published(theirs) | REST)
    index = weights.find("openvla", folder)
    assert index == folder / towers.INDEX
    frames = pictures(1, 1, 224)
    whole, parts = openvla.assemble(file, *halves()), openvla.assemble(index, *halves())
    assert torch.equal(whole.encode(frames)["patch-mean"], parts.encode(frames)["patch-mean"])

    before = weights.identity("openvla", "pretrained", folder)
    (folder / "model-00003-of-00003.safetensors").unlink()  # the language model's alone
    assert weights.identity("openvla", "pretrained", folder) == before
    other = folder / "model-00002-of-00003.safetensors"
    other.write_bytes(other.read_bytes()[:-1] + b"\1")  # one number; the index is as it was
    assert weights.identity("openvla", "pretrained", folder) != before
    other.unlink()
    with pytest.raises(NotFoundError, match="no shard"):
        weights.identity("openvla", "pretrained", folder)
    with pytest.raises(IntegrityError, match="missing or damaged"):
        openvla.assemble(index, *halves())
    with pytest.raises(NotFoundError, match="no weights file"):
        weights.find("dinov2", folder)  # published in one file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"weight_map": {"vision_backbone.a": "../../secret.safetensors"}}', "no shard beside it"),
        ('{"weight_map": {"vision_backbone.a": "model.bin"}}', "no shard beside it"),
        ('{"weight_map": {"vision_backbone.a": "\\u0000.safetensors"}}', "no shard beside it"),
        ('{"weight_map": {"language_model.a": "a.safetensors"}}', "names no tensor with 'vision_backbone.'"),
        ('{"weight_map": {"vision_backbone.a": 3}}', "no index of shards"),
        ('{"weight_map": []}', "no index of shards"),
        ("[" * 10**5, "no index of shards"),
        ("<html>", "no index of shards"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, text, words):
    (tmp_path / towers.INDEX).write_text(text)
    with pytest.raises(IntegrityError, match=words):
        towers.read(weights.find("openvla", tmp_path), "vision_backbone.")


def test_an_index_that_names_what_a_shard_has_not_is_refused(theirs, tmp_path):
    folder = sharded(tmp_path / "checkpoint", published(theirs) | REST)
    told = json.loads((folder / towers.INDEX).read_text())
    told["weight_map"]["vision_backbone.ears"] = "model-00001-of-00003.safetensors"
    (folder / towers.INDEX).write_text(json.dumps(told))
    with pytest.raises(IntegrityError, match="ears"):
        towers.read(folder / towers.INDEX, "vision_backbone.")


# Fetching.


class Hub(Files):
    """As much of the hub as a tower's fetch needs: HEAD tells the commit, GET serves ranges."""

    def do_HEAD(self):  # noqa: N802
        data = self.server.files.get(self.path.lstrip("/"))
        if data is None:
            self.refuse(404, X_Error_Code="EntryNotFound", X_Repo_Commit="c" * 40)
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.path.split("/")[4])
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()


def fetch(name, home, ask="fetch", **environment):
    """Path or error line, in a process of its own: huggingface_hub reads its settings once."""
    program = (
        "import sys\nfrom avrl.encoders import weights\nfrom avrl.errors import AvrlError\n"
        f"try: print(weights.{ask}({name!r}))\n"
        "except AvrlError as error: print(error.exit_code, error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=inherited | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1"} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


def test_openvlas_tower_is_fetched_without_the_rest_and_found_offline(theirs, file, tmp_path):
    row = ENCODERS["openvla"]
    folder = sharded(tmp_path / "checkpoint", published(theirs) | {"language_model.a": torch.ones(3, 10**6)})
    prefix = f"{row.hub}/resolve/{row.revision}"
    files = {f"{prefix}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with serving(Hub, files) as server:
        path = fetch("openvla", tmp_path / "home", HF_ENDPOINT=server.url.rstrip("/"))
        eyes = sum(one.nbytes for one in published(theirs).values())
        assert server.sent < eyes + 200_000 < 12_000_000
    assert path == f"{tmp_path}/home/avrl/openvla-{row.revision[:12]}.safetensors"
    assert fetch("openvla", tmp_path / "home", HF_HUB_OFFLINE="1") == path
    assert [one.name for one in Path(path).parent.iterdir()] == [Path(path).name]
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "source": row.hub, "revision": row.revision}
    frames = pictures(1, 1, 224)
    fetched, whole = openvla.assemble(Path(path), *halves()), openvla.assemble(file, *halves())
    assert torch.equal(fetched.encode(frames)["grid"], whole.encode(frames)["grid"])


def test_pi0s_tower_is_fetched_out_of_one_file(paligemma, tmp_path):
    row = ENCODERS["pi0"]
    state = policy(paligemma) | {"paligemma_with_expert.paligemma.lm_head.weight": torch.ones(3, 10**6)}
    with serving(Hub, {f"{row.hub}/resolve/{row.revision}/model.safetensors": save(state)}) as server:
        path = fetch("pi0", tmp_path, HF_ENDPOINT=server.url.rstrip("/"))
        assert server.sent < 1_500_000
    assert pi0.assemble(Path(path), siglip()).readouts["patch-mean"] == 32


@pytest.mark.parametrize("name", ["openvla", "pi0"])
def test_offline_is_told_at_once_with_the_command(tmp_path, name):
    line = fetch(name, tmp_path, "find", HF_HUB_OFFLINE="1")
    assert line.startswith(f"11 {name}'s weights ({ENCODERS[name].hub}) are not in the cache")
    assert f"avrl fetch encoders --encoder {name}" in line
    assert "\n" not in line


# RT-2.


def test_rt_2_answers_in_one_line_whatever_is_asked(tmp_path):
    file = tmp_path / "rt-2.safetensors"
    save_file({"a": torch.ones(1)}, file)
    for ask in (
        lambda: load("rt-2"),
        lambda: load("rt-2", init="random"),
        lambda: load("rt-2", weights=file),
        lambda: weights.find("rt-2", file),
        lambda: weights.identity("rt-2", "pretrained", file),
    ):
        with pytest.raises(MissingError) as caught:
            ask()
        assert str(caught.value) == "RT-2 is not public; its open stand-ins: --encoder openvla, --encoder pi0"
    assert fetch("rt-2", tmp_path).startswith("11 RT-2 is not public")  # and loads no torch


@pytest.mark.parametrize("name", ["openvla", "pi0"])
def test_init_is_pretrained_or_random(name):
    with pytest.raises(ConfigError, match="init is"):
        load(name, init="guessed")

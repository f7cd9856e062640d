"""Exports: timm gives our tokens from our weights, and the card says what the hub and a reader need."""

import json
from dataclasses import replace

import pytest
import ranked
import torch
from contracts.objective import batch, network
from huggingface_hub import ModelCard

from avrl import checkpoint, export
from avrl.artifact import verify
from avrl.cache import Cache
from avrl.errors import IntegrityError
from avrl.objectives import OBJECTIVES, modules
from avrl.objectives.channels import magno, parvo, unit
from avrl.stage import run
from avrl.stages.pretrain import STAGE, PretrainConfig
from avrl.torchvision_ops import timm

TINY = PretrainConfig(size="tiny", image_size=32, epochs=1, pairs_per_episode=2, batch_size=4, device="cpu")
PICTURES = {
    "single-stream": lambda img_t, img_tk: torch.cat([magno(img_t, img_tk), parvo(img_t)], 1),
    "videomae": lambda img_t, img_tk: torch.cat([img_t, img_tk], 1),
    "m-only": magno,
    "p-only": lambda img_t, img_tk: parvo(img_t),
    "early-fusion": lambda img_t, img_tk: torch.cat([img_t, img_tk], 1),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A cache with frames, and what pretraining on them makes."""
    root = tmp_path_factory.mktemp("lab")
    frames = ranked.frames_artifact(root)
    torch.set_num_threads(1)
    made = {}
    for name in ("two-stream", *PICTURES):
        asked = {"objective": name} if name in OBJECTIVES else {"objective": "two-stream", "ablate": name}
        config = replace(TINY, **asked, mask_ratio=0.5 * (name == "videomae"))
        made[name] = run(STAGE, config, {"frames": frames}, Cache(root))[0]
    return frames, made


@pytest.mark.parametrize("objective", PICTURES)
def test_timm_alone_gives_the_tokens_of_our_encoder(objective, lab):
    root = lab[1][objective].root
    frames = batch()[0]
    encoder = checkpoint.load(root).encoder()
    vit = timm.create_model(f"local-dir:{root / 'timm'}", pretrained=True).eval()
    assert type(vit) is timm.models.VisionTransformer
    with torch.inference_mode():
        tokens = vit.forward_features(PICTURES[objective](*unit(frames, 32).unbind(1)))
    torch.testing.assert_close(tokens[:, 0], encoder.encode(frames)["cls"], rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, 1:], encoder.patches(frames).flatten(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", ["small", "base"])
def test_every_size_fits_timms_network_of_that_width(size):
    """Names and shapes of all weights, without reading or running them."""
    with torch.device("meta"):
        objective = checkpoint.build(network("single-stream", size=size, image_size=224))
        theirs = timm.create_model(f"vit_{size}_patch16_224", in_chans=9, num_classes=0)
        plain = objective.plain()
        ours = {name: one.shape for name, one in export.weights(plain).items()}
    assert ours == {name: one.shape for name, one in theirs.state_dict().items()}
    told = export.architecture(plain, 224)["model_args"]
    assert (told["depth"], told["num_heads"]) == (len(theirs.blocks), theirs.blocks[0].attn.num_heads)
    assert theirs.norm.eps == plain.norm.eps
    assert theirs.blocks[0].norm1.eps == plain.blocks[0].norm1.eps


def test_two_streams_that_exchange_are_not_passed_off_as_a_transformer_of_timms(lab):
    root = lab[1]["two-stream"].root
    assert modules(checkpoint.load(root)).plain() is None
    assert not (root / "timm").exists()
    assert "Not possible: timm has no such network" in (root / "README.md").read_text()


@pytest.mark.parametrize("objective", ["two-stream", *PICTURES])
def test_the_card_has_the_hubs_header_and_what_a_reader_needs(objective, lab):
    frames, made = lab
    root, facts = made[objective].root, made[objective].manifest.facts
    card = ModelCard.load(root / "README.md")
    head = card.data.to_dict()
    assert head["license"] == "other"
    assert head["library_name"] == ("avrl" if objective == "two-stream" else "timm")
    assert head["datasets"] == ["egodex"]
    text = card.text
    assert "- EgoDex: CC-BY-NC-ND 4.0" in text
    assert f"`{frames.ref}` (4 episodes, 32 frames), digest `{frames.digest}`" in text
    for name, value in json.loads((root / "config.json").read_bytes()).items():
        assert f"| {name} | {value:.4g} |" in text if isinstance(value, float) else f"| {name} | {value} |" in text
    assert f"| final_skill | {facts['final_skill']:.4g} |" in text
    for name, dims in checkpoint.load(root).encoder().readouts.items():
        assert f"| {name} | {dims} |" in text


def test_what_the_card_says_to_type_works(lab):
    root = lab[1]["videomae"].root
    text = (root / "README.md").read_text().replace("THIS FOLDER", str(root))
    ours, theirs = (block.split("```")[0] for block in text.split("```python\n")[1:])
    known = {"frames": batch()[0], "picture": torch.rand(4, 6, 32, 32)}
    exec(ours, known)
    assert known["vectors"]["cls"].shape == (4, 128)
    exec(theirs.replace("import timm\n", ""), known | {"timm": timm})


def test_one_flipped_bit_in_any_file_of_a_checkpoint_is_refused_by_name(lab):
    for artifact in lab[1].values():
        names = {one.path for one in artifact.manifest.files}
        assert {"README.md", "config.json", "log.parquet", "model.safetensors"} <= names
        for one in artifact.manifest.files:
            path = artifact.root / one.path
            whole = path.read_bytes()
            data = bytearray(whole)
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
            with pytest.raises(IntegrityError, match=one.path):
                verify(artifact)
            path.write_bytes(whole)
        verify(artifact)


def test_the_same_run_again_writes_the_same_bytes(lab, tmp_path):
    """Nothing in the card or the weights may depend on the clock."""
    frames, made = lab
    again, hit = run(STAGE, replace(TINY, objective="single-stream"), {"frames": frames}, Cache(tmp_path))
    assert not hit
    assert again.digest == made["single-stream"].digest

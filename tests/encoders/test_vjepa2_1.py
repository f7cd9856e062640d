"""V-JEPA 2.1 against its equations, written down slowly; upstream's own network was run beside it once, by hand.

The largest difference to it (github.com/facebookresearch/vjepa2 at 204698b, random weights, float32) was 2.4e-6 for
ViT-B at 384, 256 and 64 px and 3.3e-6 for ViT-L at 384 px, where values reach 5.
"""

import cmath
import math

import pytest
import torch
from contracts.encoder import EncoderContract, pictures
from torch.nn import functional as F

from avrl.encoders import ENCODERS, load, vjepa2_1
from avrl.errors import ConfigError, IntegrityError

SMALL = vjepa2_1.Size(64, 2, 2)  # heads of 32: 5 pairs a third, 2 dimensions left over
PX = 64


def shaken(state, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {key: one + 0.1 * torch.randn(one.shape, generator=generator) for key, one in state.items()}


@pytest.fixture(scope="module")
def state():
    torch.set_num_threads(1)
    return shaken(vjepa2_1.encoder(SMALL, PX).network.state_dict())


def checkpoint(state):
    """As published: every key behind two words, beside what only training needs."""
    encoder = {f"module.backbone.{key}": one for key, one in state.items()}
    return {"ema_encoder": encoder, "predictor": {"module.backbone.mask": torch.ones(2)}, "opt": None, "epoch": 3}


class TestVJEPA21(EncoderContract):
    def make(self):
        return vjepa2_1.encoder(SMALL, PX)


@pytest.mark.parametrize(("name", "tensors", "parameters"), [("base", 158, 86_833_152), ("large", 302, 304_680_960)])
def test_at_their_own_size_they_are_the_published_networks(name, tensors, parameters):
    """Without memory for their numbers; those of ``ema_encoder`` in the published files."""
    with torch.device("meta"):
        network = vjepa2_1.Network(vjepa2_1.SIZES[name])
    assert len(network.state_dict()) == tensors
    assert sum(one.numel() for one in network.parameters()) == parameters


def turned(q_D, row, column):
    """A head's dimensions as complex numbers, pair by pair, each turned by its own angle."""
    third = len(q_D) // 3 // 2
    out = q_D.clone()
    for axis, place in enumerate((0, row, column)):
        for i in range(third):
            at = 2 * (axis * third + i)
            z = complex(q_D[at], q_D[at + 1]) * cmath.exp(1j * place / 10_000 ** (i / third))
            out[at], out[at + 1] = z.real, z.imag
    return out


def block(x_ND, state, heads, places):
    y = F.layer_norm(x_ND, x_ND.shape[1:], state["norm1.weight"], state["norm1.bias"], 1e-6)
    qkv = (y @ state["attn.qkv.weight"].T + state["attn.qkv.bias"]).reshape(len(y), 3, heads, -1)
    mixed = []
    for head in range(heads):
        q, k = (
            torch.stack([turned(one, *at) for one, at in zip(qkv[:, i, head], places, strict=True)]) for i in (0, 1)
        )
        mixed.append((q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ qkv[:, 2, head])
    x_ND = x_ND + torch.cat(mixed, 1) @ state["attn.proj.weight"].T + state["attn.proj.bias"]
    y = F.layer_norm(x_ND, x_ND.shape[1:], state["norm2.weight"], state["norm2.bias"], 1e-6)
    y = F.gelu(y @ state["mlp.fc1.weight"].T + state["mlp.fc1.bias"])
    return x_ND + y @ state["mlp.fc2.weight"].T + state["mlp.fc2.bias"]


@pytest.mark.parametrize("side", [4, 6])
def test_is_its_equations(state, side):
    """Patches of both frames, the vector for videos, two blocks with places stretched to 0..15, the last norm."""
    ours = vjepa2_1.encoder(SMALL, 16 * side, state)
    frames = pictures(1, 2, 16 * side)
    patches = ours.prepare(frames).reshape(2, 3, side, 16, side, 16).permute(2, 4, 1, 0, 3, 5).reshape(side * side, -1)
    x_ND = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x_ND = x_ND + state["video_mod_embed"][0]
    places = [(15 * row / (side - 1), 15 * column / (side - 1)) for row in range(side) for column in range(side)]
    for i in range(SMALL.depth):
        prefix = f"blocks.{i}."
        own = {key.removeprefix(prefix): one for key, one in state.items() if key.startswith(prefix)}
        x_ND = block(x_ND, own, SMALL.heads, places)
    expected = F.layer_norm(x_ND, x_ND.shape[1:], state["norms_block.3.weight"], state["norms_block.3.bias"], 1e-6)
    torch.testing.assert_close(ours.patches(frames)[0].flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.encode(frames)["patch-mean"][0], expected.mean(0), rtol=1e-4, atol=1e-5)


def test_the_order_of_a_pair_is_seen():
    encoder, frames = vjepa2_1.encoder(SMALL, PX), pictures(2, 2, PX)
    there, back = encoder.encode(frames)["patch-mean"], encoder.encode(frames.flip(1))["patch-mean"]
    assert (there - back).abs().max() > 1e-3 * there.abs().max()


@pytest.mark.parametrize("name", ["vjepa2.1", "vjepa2.1-l"])
def test_a_row_loads_from_its_file(state, tmp_path, monkeypatch, name):
    monkeypatch.setitem(vjepa2_1.SIZES, ENCODERS[name].argument, SMALL)
    torch.save(checkpoint(state), tmp_path / "vjepa2_1.pt")
    ours = load(name, weights=tmp_path / "vjepa2_1.pt")
    assert (ours.image_size, ours.paired, ENCODERS[name].paired) == (384, True, True)
    assert ours.readouts == {"patch-mean": 64, "grid": 9 * 64}
    assert all(torch.equal(one, state[key]) for key, one in ours.network.state_dict().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norms_block.3.bias": None}, r"1 missing \(norms_block\.3\.bias\)"),
        ({"pos_embed": torch.ones(1)}, r"1 left over \(pos_embed\)"),
        ({"video_mod_embed": torch.ones(1)}, r"1 of another shape \(video_mod_embed\)"),
    ],
)
def test_refuses_weights_that_do_not_fit(state, change, words):
    changed = {key: one for key, one in (state | change).items() if one is not None}
    with pytest.raises(IntegrityError, match=words):
        vjepa2_1.encoder(SMALL, PX, changed)


def test_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match="no network 'giant'"):
        vjepa2_1.load("giant", "random")
    with pytest.raises(ConfigError, match="init is"):
        load("vjepa2.1", init="guessed")

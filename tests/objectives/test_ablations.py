"""Two-Stream without a part, and both decoder wirings: what each may see, and that the rest of it is the same."""

import pytest
import torch
from contracts.objective import SIZE, ObjectiveContract, PairEncoderContract, batch, network

from avrl import checkpoint
from avrl.cost import encoder_parameters
from avrl.errors import IntegrityError
from avrl.objectives import modules, vit
from avrl.objectives.channels import parvo, unit

VARIANTS = {
    "fused": ("two-stream", {"decoder": "fused"}),
    "m-only": ("two-stream", {"ablate": "m-only"}),
    "m-only-fused": ("two-stream", {"ablate": "m-only", "decoder": "fused"}),
    "p-only": ("two-stream", {"ablate": "p-only"}),
    "no-exchange": ("two-stream", {"ablate": "no-exchange", "exchanges": 0}),
    "early-fusion": ("two-stream", {"ablate": "early-fusion"}),
    "exchanges-1": ("two-stream", {"exchanges": 1}),
    "exchanges-3": ("two-stream", {"exchanges": 3}),
    "single-fused": ("single-stream", {"decoder": "fused"}),
}
PLAIN = {"two-stream": ("two-stream", {}), "single-stream": ("single-stream", {})}
EVERY = {**PLAIN, **VARIANTS}
for label, (objective, chosen) in VARIANTS.items():
    told = {"name": objective, "options": chosen}
    for contract in (ObjectiveContract, PairEncoderContract):
        called = f"Test{label.title().replace('-', '')}{contract.__name__.removesuffix('Contract')}"
        globals()[called] = type(called, (contract,), {**told, "__module__": __name__})


def built(label, seed=0):
    name, options = EVERY[label]
    return modules(checkpoint.build(network(name, seed=seed, **options))).eval()


def pair(seed=0):
    return unit(batch(seed=seed)[0], SIZE).unbind(1)


# What it sees.


def inputs_of(objective, img_t, img_tk):
    """What every patch embedding was given, by its name, in a forward pass."""
    seen = {}
    for name, part in objective.named_modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given[0], out)}))
    objective.predict(img_t, img_tk)
    return seen


@pytest.mark.parametrize("label", EVERY)
def test_no_embedding_of_p_sees_frame_tk(label):
    objective = built(label)
    img_t, img_tk = pair()
    torch.nn.init.normal_(objective.decoder.head.weight)
    img_tk.requires_grad_()
    embedded = {name: out for name, (_, out) in inputs_of(objective, img_t, img_tk).items()}
    of_p = {name: out for name, out in embedded.items() if name in ("network.p_tokens.project", "network.form")}
    others = {name: out for name, out in embedded.items() if name not in of_p}
    wants_p = {"m-only-fused", "single-fused"}  # M's patches alone, or nine channels at once: P has no embedding there
    assert bool(of_p) == (label not in wants_p)
    for out in of_p.values():
        gradient = torch.autograd.grad(out.sum(), img_tk, allow_unused=True)[0] if out.requires_grad else None
        assert gradient is None
    for out in others.values():
        assert torch.autograd.grad(out.square().sum(), img_tk)[0].abs().sum() > 0


@pytest.mark.parametrize("label", EVERY)
def test_what_a_stream_is_given(label):
    """Channels by channels: M, P, both, or both pictures, and P of frame t for the decoder."""
    img_t, img_tk = pair()
    given = {name.split(".")[1]: one for name, (one, _) in inputs_of(built(label), img_t, img_tk).items()}
    change = img_tk - img_t
    m = torch.cat([(change * torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)).sum(1, keepdim=True), change], 1)
    p, both = parvo(img_t), torch.cat([img_t, img_tk], 1)
    two = {"m_tokens": m, "p_tokens": p}
    wanted = {
        "m-only": {"m_tokens": m, "form": p},
        "m-only-fused": {"m_tokens": m},
        "p-only": {"p_tokens": p},
        "early-fusion": {"tokens": both, "form": p},
        "single-stream": {"tokens": torch.cat([m, p], 1), "form": p},
        "single-fused": {"tokens": torch.cat([m, p], 1)},
    }.get(label, two)
    assert set(given) == set(wanted)
    for name, channels in wanted.items():
        if name == "form":
            channels = img_t  # it makes P itself
        torch.testing.assert_close(given[name], channels, atol=1e-6, rtol=0)


@pytest.mark.parametrize("label", EVERY)
def test_the_change_reaches_the_decoder_by_its_patches_in_the_fused_wiring_alone(label):
    """Two-Stream's P hears of M by its CLS where they exchange: exchanges that add nothing shut that way."""
    objective = built(label)
    for block in getattr(objective.network, "exchanges", []):
        for part in (block[0].attn.proj, block[0].mlp.fc2):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)
    img_t, img_tk = pair()
    form, change = objective.network(img_t, img_tk)
    other_form, other_change = objective.network(img_t, img_tk.flip(0))
    assert torch.equal(form, other_form) == ("fused" not in label)
    assert torch.equal(change, other_change) == (label == "p-only")


def test_p_only_cannot_know_the_change_and_says_so():
    from avrl.cost import cost, sentence
    from avrl.objectives import Network

    encoder = built("p-only").encoder()
    frames = batch()[0]
    other = torch.stack([frames[:, 0], frames[:, 1].flip(0)], 1)
    for name, z in encoder.encode(frames).items():
        assert torch.equal(z, encoder.encode(other)[name])
    asked = Network(**network("two-stream", ablate="p-only"))
    assert "what changes cannot be known" in sentence(asked, cost(asked))


# What it gives.


@pytest.mark.parametrize(
    ("label", "streams"),
    [
        ("two-stream", "mp"),
        ("fused", "mp"),
        ("no-exchange", "mp"),
        ("m-only", "m"),
        ("p-only", "p"),
        ("early-fusion", ""),
    ],
)
def test_readouts_of_a_stream_that_is_not_there_are_absent(label, streams):
    dim = vit.SIZES["tiny"].embed_dim
    count = max(1, len(streams))
    wanted = {"cls": count * dim, **dict.fromkeys(streams, dim), "change": dim}
    wanted |= {"patch-mean": count * dim, "grid": 9 * count * dim}
    assert built(label).encoder().readouts == wanted


@pytest.mark.parametrize("label", EVERY)
def test_what_no_readout_needs_is_the_decoders(label):
    objective = built(label)
    rest = {name for name, _ in objective.named_parameters()} - set(encoder_parameters(objective))
    assert rest
    assert all(name.startswith(("decoder.", "network.form", "network.fuse_patches")) for name in rest)


# Matched by construction.


@pytest.mark.parametrize("label", VARIANTS)
def test_what_stays_starts_from_the_weights_of_the_whole(label):
    name, options = VARIANTS[label]
    whole, part = (one.state_dict() for one in (built(name, seed=5), built(label, seed=5)))
    same = {key for key in part if key in whole and part[key].shape == whole[key].shape}
    if options.get("ablate") == "early-fusion":  # one transformer: nothing of it is a part of the two
        assert {key.split(".")[0] for key in same} == {"decoder"}
        return
    assert all(torch.equal(part[key], whole[key]) for key in same)
    new = {key.split(".")[1] for key in set(part) - same}
    assert new <= {"exchanges", "form", "fuse", "fuse_patches"}
    if "fuse" in new:
        half = slice(128) if "m-" in label else slice(128, None)
        assert torch.equal(part["network.fuse.weight"], whole["network.fuse.weight"][:, half])


def test_no_exchange_has_two_spellings_and_is_one_network():
    one, other = (
        checkpoint.build(network("two-stream", **spelt)) for spelt in ({"exchanges": 0}, {"ablate": "no-exchange"})
    )
    states = [modules(each).state_dict() for each in (one, other)]
    assert set(states[0]) == set(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("times", range(4))
def test_streams_exchange_after_so_many_stages(times):
    """M reaches P's CLS if they exchange once, and P's patches if a stage comes after that."""
    model = modules(checkpoint.build(network("two-stream", exchanges=times))).network.eval()
    img_t, img_tk = pair()
    p, other = (model.streams(img_t, later)["p"] for later in (img_tk, img_tk.flip(0)))
    assert len(model.exchanges) == times
    assert torch.equal(p[:, 0], other[:, 0]) == (times == 0)
    assert torch.equal(p[:, 1:], other[:, 1:]) == (times == 0)


# On disk.


@pytest.mark.parametrize("label", ["fused", "m-only", "early-fusion", "exchanges-3"])
def test_it_comes_back_from_its_checkpoint(label, tmp_path):
    name, options = EVERY[label]
    objective = built(label, seed=7)
    for parameter in objective.parameters():
        parameter.data.mul_(1.1)
    checkpoint.save(tmp_path, objective, network(name, seed=7, **options))
    frames = batch()[0]
    wanted = objective.encoder().encode(frames)
    for key, z in checkpoint.load(tmp_path).encoder().encode(frames).items():
        assert torch.equal(z, wanted[key])
        assert not torch.equal(z, checkpoint.load(tmp_path, init="random").encoder().encode(frames)[key])


def test_a_config_with_a_field_of_a_later_avrl_is_refused(tmp_path):
    checkpoint.save(tmp_path, built("two-stream"), network("two-stream", streams=3))
    with pytest.raises(IntegrityError, match="'streams'"):
        checkpoint.load(tmp_path)

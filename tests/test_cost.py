import json
from types import SimpleNamespace

import pytest
import torch
from contracts.objective import network
from made import frame_store
from test_training import recipe

from avrl import checkpoint
from avrl.cost import cost, encoder_parameters, sentence
from avrl.objectives import Network, modules, vit
from avrl.pace import PEAK, Clock, speed
from avrl.training import train


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def blocks(tokens, dim, depth):
    """Products of matrices in so many transformer blocks: q k v, their two products, the way out, and the MLP."""
    return depth * 2 * tokens * dim * (3 * dim + 2 * tokens + dim + 8 * dim)


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_flops_are_those_of_the_formula(size):
    shape, n, pixels = vit.SIZES[size], 196, 256
    dim, narrow = shape.embed_dim, shape.decoder_dim
    found = cost(Network(**network("videomae", size=size, image_size=224)))
    embed = 2 * n * 6 * pixels * dim
    assert found["encoder_flops"] == embed + blocks(1 + n, dim, shape.depth)
    seen, hidden = 1 + n - 147, 147
    decoder = blocks(1 + n, narrow, shape.decoder_depth) + 2 * hidden * narrow * 6 * pixels
    assert found["flops"] == embed + blocks(seen, dim, shape.depth) + 2 * seen * dim * narrow + decoder


def test_two_streams_cost_two_transformers_and_the_exchanges():
    shape, n = vit.SIZES["base"], 196
    found = cost(Network(**network("two-stream", size="base", image_size=224)))
    embed = 2 * n * 9 * 256 * 768
    whole = embed + 2 * blocks(1 + n, 768, shape.depth) + 2 * blocks(2, 768, 1) + 2 * 2 * 768 * 768
    assert found["encoder_flops"] == whole


@pytest.mark.parametrize("options", [{}, {"ablate": "m-only"}, {"decoder": "fused"}])
def test_parameters_are_those_of_the_network(options):
    asked = network("two-stream", **options)
    objective = checkpoint.build(asked)
    found = cost(Network(**asked))
    assert found["parameters"] == sum(one.numel() for one in modules(objective).parameters())
    assert found["encoder_parameters"] == sum(one.numel() for one in encoder_parameters(objective).values())


def test_base_is_vit_b_twice():
    """ViT-B/16 has 85.8 M parameters without its head (Dosovitskiy et al. 2021 say 86 M with it)."""
    one = cost(Network(**network("two-stream", size="base", image_size=224, ablate="m-only")))
    assert one["encoder_parameters"] == pytest.approx(86.4e6, rel=0.01)


def test_utilisation_is_three_forward_passes_over_the_peak_of_all_gpus(monkeypatch):
    asked = Network(**network("videomae"))
    monkeypatch.setitem(PEAK, "a GPU", 1000 * cost(asked)["flops"])
    told = speed(asked, 200.0, "a GPU", "bfloat16", 2)
    assert told == {"samples_per_second": 200.0, "model_flop_utilisation": 0.3}


@pytest.mark.parametrize(("device", "arithmetic"), [("a GPU of tomorrow", "bfloat16"), ("NVIDIA H200", "float32")])
def test_utilisation_is_not_told_where_the_peak_is_another_or_unknown(device, arithmetic):
    assert speed(Network(**network("videomae")), 12.34, device, arithmetic, 1) == {"samples_per_second": 12.3}


def test_the_clock_leaves_the_first_step_out_and_what_comes_after_the_last(monkeypatch):
    """The first takes 100 s, of which frames come in 90; three more take 2 s each, of which half a second."""
    times = iter([0.0, 100.0, 102.0, 104.0, 106.0])
    monkeypatch.setattr("avrl.pace.time.monotonic", lambda: next(times))
    pairs = SimpleNamespace(waited_s=0.0)
    clock = Clock(pairs)
    for waited in (90.0, 90.5, 91.0, 91.5):
        pairs.waited_s = waited
        clock.tick()
    assert clock.pace() == (0.5, 0.25)


def test_a_run_of_one_step_is_timed_whole(monkeypatch):
    times = iter([0.0, 4.0])
    monkeypatch.setattr("avrl.pace.time.monotonic", lambda: next(times))
    clock = Clock(SimpleNamespace(waited_s=0.0))
    clock.tick()
    assert clock.pace() == (0.25, 0.0)


def test_counting_moves_no_random_state_and_makes_no_weights():
    before = torch.get_rng_state()
    cost.__wrapped__(Network(**network("single-stream", seed=123)))
    assert torch.equal(before, torch.get_rng_state())


def test_the_costs_are_told_when_training_begins_and_kept(tmp_path, caplog):
    frames = frame_store(tmp_path / "frames", [8] * 4)
    asked = recipe("two-stream", epochs=1)
    with caplog.at_level("INFO", logger="avrl"):
        facts = train(tmp_path, frames, asked)
    figures = cost(Network(**asked.network))
    assert {name: facts[name] for name in figures} == figures
    assert sentence(Network(**asked.network), figures) in caplog.text
    assert f"samples per second: {facts['samples_per_second']}" in caplog.text
    assert "two-stream tiny: 3." in caplog.text
    assert json.loads((tmp_path / "config.json").read_bytes()) == asked.network


def test_the_loss_of_a_run_is_the_wrapped_modules_forward(tmp_path, monkeypatch):
    """One call a step, from within `forward`: nothing else computes a loss."""
    frames, calls, real = frame_store(tmp_path / "frames", [8] * 4), [], checkpoint.build

    def watched(config):
        objective = real(config)
        module, loss = modules(objective), objective.loss
        module.register_forward_pre_hook(lambda *_: calls.append("forward"))
        module.register_forward_hook(lambda *_: calls.append("done"))
        monkeypatch.setattr(module, "loss", lambda *given: calls.append("loss") or loss(*given), raising=False)
        return objective

    monkeypatch.setattr(checkpoint, "build", watched)
    train(tmp_path, frames, recipe("two-stream", epochs=1))
    assert calls == ["forward", "loss", "done"] * 5

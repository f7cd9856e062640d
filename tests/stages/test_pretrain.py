"""The request for a checkpoint: which options go together, one spelling for one network, what it is called."""

from dataclasses import asdict, replace

import pytest

from avrl.errors import ConfigError
from avrl.objectives import Network
from avrl.stages.pretrain import PretrainConfig, network, recipe, settled


@pytest.mark.parametrize(
    ("objective", "options", "words"),
    [
        ("videomae", {"ablate": "m-only"}, "--ablate m-only has no meaning for videomae; leave it at none"),
        ("videomae", {"exchanges": 1}, "--exchanges 1 has no meaning for videomae; leave it at 2"),
        ("videomae", {"decoder": "fused"}, "--decoder fused has no meaning for videomae; leave it at bottleneck"),
        ("single-stream", {"ablate": "p-only"}, "--ablate p-only has no meaning for single-stream; leave it at none"),
        ("two-stream", {"num_frames": 16}, "--num-frames 16 has no meaning for two-stream; leave it at 2"),
        ("single-stream", {"mask_ratio": 0.5}, "--mask-ratio 0.5 has no meaning for single-stream; leave it at 0.0"),
        ("two-stream", {"ablate": "m-only", "exchanges": 1}, "--exchanges 1 has no meaning with --ablate m-only"),
        ("two-stream", {"ablate": "no-exchange", "exchanges": 3}, "--exchanges 3 has no meaning with"),
        ("two-stream", {"ablate": "p-only", "decoder": "fused"}, "there is no M to fuse"),
    ],
)
def test_options_without_a_meaning_are_refused(objective, options, words):
    with pytest.raises(ConfigError) as refused:
        settled(PretrainConfig(objective=objective, **options))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("objective", "options", "name"),
    [
        ("two-stream", {}, "two-stream"),
        ("two-stream", {"ablate": "early-fusion"}, "two-stream-early-fusion"),
        ("two-stream", {"exchanges": 0}, "two-stream-no-exchange"),
        ("two-stream", {"ablate": "no-exchange", "decoder": "fused"}, "two-stream-no-exchange-fused"),
        ("two-stream", {"exchanges": 3}, "two-stream-exchanges-3"),
        ("single-stream", {"decoder": "fused"}, "single-stream-fused"),
        ("videomae", {"num_frames": 16}, "videomae-16-frames"),
        ("videomae", {"mask_ratio": 0.5}, "videomae"),
    ],
)
def test_a_network_has_one_spelling_and_a_name(objective, options, name):
    config = settled(PretrainConfig(objective=objective, **options))
    assert settled(config) == config
    assert network(vars(config)).name == name
    assert Network(**recipe(config).network).name == name


def test_no_exchange_and_exchanges_0_are_one_request():
    assert settled(PretrainConfig(exchanges=0)) == settled(PretrainConfig(ablate="no-exchange"))


@pytest.mark.parametrize(("frames", "ratio"), [(2, 0.75), (16, 0.9)])
def test_the_mask_ratio_is_the_recipes_unless_one_is_asked_for(frames, ratio):
    config = PretrainConfig(objective="videomae", num_frames=frames)
    assert settled(config).mask_ratio == ratio
    assert settled(replace(config, mask_ratio=0.6)).mask_ratio == 0.6
    made = recipe(config)  # also of a config that nobody has settled
    assert (made.network["mask_ratio"], made.network["num_frames"], made.sampling.num_frames) == (ratio, frames, frames)


def test_a_manifest_without_the_newer_fields_means_their_defaults():
    old = {
        "objective": "two-stream",
        "size": "tiny",
        "image_size": 32,
        "loss_decay": 0.5,
        "mask_ratio": 0.75,
        "seed": 0,
    }
    assert asdict(network({**old, "epochs": 30})) == {
        **old,
        "decoder": "bottleneck",
        "ablate": "none",
        "exchanges": 2,
        "num_frames": 2,
    }

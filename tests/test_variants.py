"""`avrl pretrain MODEL --on sample` by the command line: every wiring and ablation, and the plan's settings."""

import json
import logging
import signal
import sys

import pytest
import torch

import avrl_cli.app
from avrl.stages.pretrain import PretrainConfig, recipe

TINY = ["--size", "tiny", "--image-size", "32", "--epochs", "1", "--pairs-per-episode", "1", "--batch-size", "40"]
VARIANTS = {
    "two-stream-m-only": ["two-stream", "--ablate", "m-only"],
    "two-stream-p-only": ["two-stream", "--ablate", "p-only"],
    "two-stream-no-exchange": ["two-stream", "--exchanges", "0"],
    "two-stream-early-fusion": ["two-stream", "--ablate", "early-fusion"],
    "two-stream-exchanges-1": ["two-stream", "--exchanges", "1"],
    "two-stream-exchanges-3": ["two-stream", "--exchanges", "3"],
    "two-stream-fused": ["two-stream", "--decoder", "fused"],
    "single-stream-fused": ["single-stream", "--decoder", "fused"],
    "videomae-16-frames": ["videomae", "--num-frames", "16"],
    "videomae": ["videomae"],
}


@pytest.fixture(scope="module")
def avrl(tmp_path_factory):
    """The command in this process, on a cache that holds the sample's frames: exit code and what `--json` says."""
    root = tmp_path_factory.mktemp("sample")
    torch.set_num_threads(1)
    level, kept = logging.getLogger("avrl").level, logging.root.handlers[:]
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)}

    def call(capsys, *words):
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["avrl", *words, "--cache", str(root), "--json"])
            with pytest.raises(SystemExit) as caught:
                avrl_cli.app.main()
        said = capsys.readouterr()
        assert not caught.value.code, said.err
        return json.loads(said.out), said.err

    yield call
    logging.root.handlers[:] = kept
    logging.getLogger("avrl").setLevel(level)
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.fixture
def frames(avrl, capsys):
    avrl(capsys, "fetch", "sample")
    avrl(capsys, "prep", "sample", "--image-size", "32")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_on_the_sample_and_bears_its_name(name, avrl, frames, capsys):
    document, said = avrl(capsys, "pretrain", *VARIANTS[name], "--on", "sample", *TINY)
    (made,) = [one for one in document["artifacts"] if one["ref"].startswith(name)]
    assert made["ref"].startswith(f"{name}-tiny-egodex")
    assert f"{name} tiny: " in said  # its parameters and operations
    assert "1 x cpu, products of matrices in float32" in said
    assert ("what changes cannot be known" in said) == (name == "two-stream-p-only")


def test_the_plans_settings_are_the_defaults_and_are_told():
    config = PretrainConfig()
    assert (config.size, config.image_size, config.decoder, config.ablate) == ("base", 224, "bottleneck", "none")
    assert recipe(config).sentence() == (
        "30 epochs of 100 pairs an episode, global batch 24; AdamW, lr 0.0001, warm-up 1 epoch, weight decay 0.05; "
        "gaps 1 to 10, p ~ 0.8^(gap-1), weighted 0.5^(gap-1) in the loss; seed 0"
    )
    assert recipe(PretrainConfig(objective="videomae")).network["mask_ratio"] == 0.75
    assert recipe(PretrainConfig(objective="videomae", num_frames=16)).network["mask_ratio"] == 0.9

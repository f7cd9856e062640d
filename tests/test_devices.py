"""Devices: what a machine cannot do is told in a line, before or instead of the work."""

import pytest
import torch

from avrl.devices import accelerator_of, fitting, require_gpus
from avrl.errors import ConfigError
from avrl.ranks import lost_ranks
from avrl.stages import pretrain
from avrl.stages.pretrain import PretrainConfig


@pytest.fixture(params=[0, 1, 3])
def gpus(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


def test_a_process_that_has_no_gpu_of_its_own_does_not_train_alone_or_beside_another(gpus, monkeypatch):
    """Accelerate gives it the GPU of another one or, where there is none, a run of its own in the same folder."""
    for name, value in {"WORLD_SIZE": "8", "RANK": "7", "LOCAL_RANK": str(gpus)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{gpus + 1} processes need a GPU each, and torch sees {gpus} here; nvidia"):
        accelerator_of("auto", "fp32")


def test_more_gpus_than_there_are_is_told_before_any_process_starts(gpus, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=f"4 processes need a GPU each, and torch sees {gpus} here"):
        pretrain._trained(PretrainConfig(gpus=4), {}, tmp_path)
    require_gpus("cpu", 4)
    require_gpus("auto", gpus)


def test_a_gpu_that_is_too_small_is_told_with_its_cure():
    words = r"too small: CUDA out of memory. Tried .*; raise --accumulate"
    with pytest.raises(ConfigError, match=words), lost_ranks(), fitting():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_what_nccl_cannot_do_is_not_tried_again(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = f"NCCL error in: {'x' * 300} ncclInvalidUsage: Last error: Duplicate GPU detected"
    with pytest.raises(ConfigError, match="Duplicate GPU detected"), lost_ranks():
        raise torch.distributed.DistBackendError(said)

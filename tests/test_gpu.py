"""What only a GPU can show (pytest -m gpu): its arithmetic beside a CPU's, and a run that is stopped and goes on."""

import polars as pl
import pytest
import torch
from accelerate.state import AcceleratorState
from made import frame_store
from test_training import recipe, stop_after

from avrl import encoders, features
from avrl.objectives.channels import parvo
from avrl.ranks import Stopped
from avrl.training import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return frame_store(tmp_path_factory.mktemp("frames"), [8] * 4)


@pytest.fixture(autouse=True)
def forgetful():
    """Accelerate keeps one device and one arithmetic a process: a test is as a process of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def losses(out, frames, asked):
    AcceleratorState._reset_state(reset_partial_state=True)
    out.mkdir(exist_ok=True)
    facts = train(out, frames, asked)
    return facts, pl.read_parquet(out / "log.parquet")["loss"].to_list()


@pytest.mark.parametrize("objective", ["two-stream", "single-stream", "videomae"])
def test_bf16_is_on_and_near_what_a_cpu_finds(objective, frames, tmp_path):
    far, found = losses(tmp_path / "gpu", frames, recipe(objective, device="auto"))
    near, wanted = losses(tmp_path / "cpu", frames, recipe(objective))
    assert (far["arithmetic"], near["arithmetic"]) == ("bfloat16", "float32")
    assert found == pytest.approx(wanted, rel=0.05)


def test_stopped_there_it_goes_on_as_it_would_have(frames, tmp_path, monkeypatch):
    asked = recipe("two-stream", device="auto", precision="fp32", ema=0.9)
    _, wanted = losses(tmp_path / "straight", frames, asked)
    (tmp_path / "stopped").mkdir()
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            train(tmp_path / "stopped", frames, asked)
    _, found = losses(tmp_path / "stopped", frames, asked)
    assert found == pytest.approx(wanted, rel=1e-3)


def test_compiled_blocks_find_the_same(frames, tmp_path):
    asked = {"device": "auto", "precision": "fp32"}
    _, wanted = losses(tmp_path / "eager", frames, recipe("two-stream", **asked))
    _, found = losses(tmp_path / "compiled", frames, recipe("two-stream", **asked, compile=True))
    assert found == pytest.approx(wanted, rel=1e-2)


def test_p_stays_in_float32_under_autocast():
    smooth = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    with torch.autocast("cuda", torch.bfloat16):
        found = parvo(smooth.cuda())
    torch.testing.assert_close(found.cpu(), parvo(smooth), rtol=0, atol=1e-5)


def test_features_are_those_of_a_cpu(frames, tmp_path):
    import zarr

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = {}
    for device in ("cpu", "cuda"):
        encoder = encoders.load("dinov2-s", init="random").to(device)
        (tmp_path / device).mkdir()
        features.extract(encoder, frames, tmp_path / device, gap=0, batch_size=5, device=device)
        found[device] = zarr.open_array(str(tmp_path / device / "features.zarr/cls"), mode="r")[:]
    torch.testing.assert_close(torch.from_numpy(found["cuda"]), torch.from_numpy(found["cpu"]), rtol=1e-3, atol=1e-3)

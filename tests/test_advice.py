"""What a message says to type next works when it is typed, and what cannot work is refused before anything is made."""

import re
import shlex
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from made import frame_store
from typer.testing import CliRunner

from avrl.cache import Cache
from avrl.errors import ConfigError, IntegrityError, NotFoundError
from avrl.sources import SOURCES, UNPUBLISHED
from avrl.stage import Built, run
from avrl.stages import fetch, prep, pretrain
from avrl_cli import advice
from avrl_cli.app import app
from avrl_cli.fetch import SAMPLE

LIGHT = ["probe", "bridge", "--on", "sample", "--encoder", "efficientnet-lite0"]


def inside(cache, *words):
    return CliRunner().invoke(app, [*map(str, words), "--cache", str(cache)])


def typed(error):
    """The words of the command that an error says to type, without the program's name."""
    command = re.search(r"\bavrl (.*)", error.next_step)[1]
    return shlex.split(command)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Frames of the sample, but for their pictures, which are small."""
    root = tmp_path_factory.mktemp("advice")

    def build(config, inputs, out):
        source = inputs["raw"].manifest.config["source"]
        frame_store(out, [9] * 9, ["train"] * 6 + ["val"] * 3)
        return Built({"source": source, "frames": 81, "fps": [5.0]})

    for config in SAMPLE:
        raw, _ = run(fetch.STAGE, fetch.settled(config), {}, Cache(root))
        run(replace(prep.STAGE, build=build), prep.PrepConfig(), {"raw": raw}, Cache(root))
    return root


@pytest.mark.parametrize(
    "words",
    [
        "probe bridge --on sample --encoder two-stream",
        "probe bridge --encoder videomae",  # there is nothing but the sample
        "probe flow --on sample --encoder random,pixels",
        "probe order --on sample --encoder ''",
        "report",
    ],
)
def test_on_the_sample_the_next_command_is_for_the_sample_and_a_cpu_and_works(cache, words):
    error = inside(cache, *shlex.split(words)).exception
    command = typed(error)
    assert command[2:4] == ["--on", "sample"]
    assert "(: " not in str(error)
    done = inside(cache, *command, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "dinov2" not in command
    assert ("tiny" in command) == (command[0] == "pretrain")


def test_elsewhere_it_is_for_the_frames_that_were_named(tmp_path):
    assert typed(inside(tmp_path, "probe", "flow", "--on", "bridge", "--encoder", "random").exception) == [
        *("probe", "flow", "--on", "bridge", "--encoder", "dinov2")
    ]
    assert typed(inside(tmp_path, "report").exception) == ["probe", "bridge", "--encoder", "dinov2"]
    asked = ["probe", "flow", "--on", "bridge", "--encoder", "two-stream"]  # pretrained on EgoDex all the same
    assert typed(inside(tmp_path, *asked).exception) == ["pretrain", "two-stream"]


def test_what_a_cpu_can_train_is_what_the_demo_trains():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    train = " ".join(re.search(r"^TRAIN +:= ((?:.*\\\n)*.*)", makefile, re.MULTILINE)[1].replace("\\\n", " ").split())
    (epochs,) = re.findall(r"pretrain two-stream \$\(TRAIN\) (.*)", makefile)
    assert f"{train} {epochs}" == advice.TRAIN


def test_which_sources_have_no_publisher():
    assert tuple(name for name, module in SOURCES.items() if not import_module(module).BASE_URL) == UNPUBLISHED


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("prep lerobot", "fetch lerobot --from DIR"),
        ("fetch lerobot", "fetch lerobot --from DIR"),
        ("fetch lerobot --from https://example.org/set --dry-run", "fetch lerobot --from DIR"),
        ("pretrain two-stream --on lerobot", "prep lerobot --from DIR"),
        ("probe lerobot --encoder r3m-18", "prep lerobot --from DIR"),
        ("probe lerobot --on sample --encoder two-stream", "probe lerobot --from DIR --encoder NAME"),
    ],
)
def test_a_lerobot_set_comes_from_a_folder_and_nothing_is_begun_without(tmp_path, words, command):
    error = inside(tmp_path / "cache", *words.split()).exception
    assert isinstance(error, ConfigError | NotFoundError)
    assert typed(error) == command.split()
    assert not (tmp_path / "cache").exists()


def test_labels_of_the_sample_whose_raw_files_are_gone_need_the_sample_and_not_124_gb(cache, tmp_path):
    (tmp_path / "frames").symlink_to(cache / "frames")
    assert typed(inside(tmp_path, *LIGHT).exception) == ["fetch", "sample"]


@pytest.mark.parametrize(
    "words",
    [
        "probe bridge --teacher raft",
        "probe bridge --pairs 5",
        "probe bridge --samples 20000",
        "probe bridge --teacher raft --teacher-weights FILE",
        "probe order --target commanded",
        "probe egodex --target commanded",
        "prep sample --raw foo",
        "fetch encoders --part 1",
        "fetch encoders --from DIR",
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_an_option_without_a_part_is_refused(cache, words, dry):
    """It was ignored, and the answer was 'nothing to do'."""
    verb, what, *options = words.split()
    encoder = [] if verb == "prep" else ["--encoder", "efficientnet-lite0"]
    error = inside(cache, verb, what, *encoder, *options, *dry).exception
    assert isinstance(error, ConfigError)
    assert str(error).endswith(f"; leave out {options[0]}")


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_slip_in_a_readout_is_told_once_and_nothing_is_begun(cache, dry):
    error = inside(cache, *LIGHT, "--readout", "pool,foo", *dry).exception
    assert str(error) == "no encoder here has a readout 'foo'; there are: grid, pool"
    assert isinstance(error, ConfigError)
    assert not any((cache / noun).exists() for noun in ("labels", "features", "scores"))


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_damaged_checkpoint_is_told_once_before_any_feature_and_need_not_be_lost(cache, tmp_path, dry):
    (tmp_path / "frames").symlink_to(cache / "frames")
    frames = Cache(cache).artifacts("frames")[0]

    def build(config, inputs, out):
        (out / "model.safetensors").write_bytes(b"days of training")
        return Built({})

    config = pretrain.settled(replace(pretrain.PretrainConfig(), objective="two-stream"))
    made, _ = run(replace(pretrain.STAGE, build=build), config, {"frames": frames}, Cache(tmp_path))
    (made.root / "model.safetensors").write_bytes(b"days of draining")
    error = inside(tmp_path, "probe", "order", "--on", "sample", "--encoder", "two-stream", *dry).exception
    assert isinstance(error, IntegrityError)
    assert error.cause == f"{made.root / 'model.safetensors'} is not what its manifest says"
    assert error.next_step.startswith("copy it again from where it was mirrored; or rm -r")
    assert not any((tmp_path / noun).exists() for noun in ("labels", "features", "scores"))
    (made.root / "manifest.json").write_text("{")
    error = inside(tmp_path, "probe", "order", "--on", "sample", "--encoder", "two-stream", *dry).exception
    assert "copy it again from where it was mirrored" in error.next_step


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("passwd", b"root:x:0:0:root:/root:/bin/bash\n", "it begins with b'root:x:0:0:root:'"),
        ("page.pth", b"<!DOCTYPE html>\n<html>", "it begins with b'<!DOCTYPE html>"),
        ("page.safetensors", b"<!DOCTYPE html>\n<html>", "it is cut short or damaged, and begins with b'<!DOCTYPE"),
        ("empty.pth", b"", "it is empty"),
    ],
)
def test_a_junk_file_of_weights_is_refused_before_anything_is_looked_for(tmp_path, name, content, reason):
    """It was a bug of IndexError, or torch's page cut in mid-sentence, after the floors and before the twin."""
    (tmp_path / name).write_bytes(content)
    words = ["probe", "bridge", "--on", "sample", "--encoder", "dinov2", "--weights", tmp_path / name]
    error = inside(tmp_path / "cache", *words).exception
    assert isinstance(error, IntegrityError)
    assert str(error).startswith(f"{tmp_path / name} is no weights file: {reason}")

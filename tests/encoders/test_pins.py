"""Outside weights are what was published, or what was first fetched; and a wrong pin locks nobody out."""

import dataclasses
import hashlib
import json
import re

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

import avrl_cli.app
from avrl.encoders import ENCODERS, licence, pins, weights
from avrl.errors import IntegrityError, MissingError

ROWS = {name: one for name, one in ENCODERS.items() if one.licence}
GOOD, BAD = b"as published", b"another"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_which_rows_nobody_has_pinned():
    """By name, so that a new row says where its pin is. A wheel's version is in constraints.txt."""
    loose = {name for name, one in ROWS.items() if not (one.wheel or one.revision or pins.published(one))}
    assert loose == {"r3m", "r3m-18", "r3m-34", "vip", "vc-1", "mvp", "mvp-s", "mvp-l", "spa", "spa-l"}
    assert all(pins.told(ROWS[name]).startswith("not pinned: the newest when first fetched") for name in loose)


def test_which_rows_have_a_published_sum():
    """None for a tower, of whose bytes nobody publishes one; else a missing one here is one that nobody vendors."""
    summed = {name for name, one in ROWS.items() if pins.published(one)}
    dinov3 = {"dinov3", "dinov3-s", "dinov3-l"}
    assert summed == {"dinov2", "dinov2-s", "dinov2-l", "dinov2-reg", "dinov2-reg-l", "vjepa2.1", "vjepa2.1-l"} | dinov3


def test_every_pin_is_a_rows_and_well_formed():
    places = {f"{one.hub}/{file}" for one in ROWS.values() for file in one.files} | {one.url for one in ROWS.values()}
    assert pins.SHA256.keys() <= places
    assert pins.REVISIONS.keys() <= {one.hub for one in ROWS.values()}
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in pins.SHA256.values())
    assert all(re.fullmatch("[0-9a-f]{40}", one) for one in pins.REVISIONS.values())
    assert len(set(pins.SHA256.values())) == len(pins.SHA256)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dinov2", "held to commit and SHA-256"),
        ("clip", "held to commit"),
        ("vjepa2.1", "held to SHA-256"),
        ("efficientnet-lite0", "held to the version of its wheel"),
    ],
)
def test_tells_what_a_row_is_held_to(name, words):
    assert pins.told(ENCODERS[name]) == words


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache of the hub, of this process."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "avrl").mkdir()
    return tmp_path / "avrl"


def test_a_file_of_the_hub_that_is_not_the_published_one_is_refused_by_name(tmp_path, monkeypatch):
    blob, path = tmp_path / "blob", tmp_path / "model.safetensors"
    path.symlink_to(blob)
    monkeypatch.setitem(pins.SHA256, "timm/vit_base_patch14_dinov2.lvd142m/model.safetensors", sha256(GOOD))
    blob.write_bytes(GOOD)
    pins.hold("dinov2", ENCODERS["dinov2"], path)
    blob.write_bytes(BAD)
    with pytest.raises(IntegrityError) as caught:
        pins.hold("dinov2", ENCODERS["dinov2"], path)
    assert caught.value.exit_code == 8
    assert str(caught.value) == (
        f"dinov2's weights {path} have SHA-256 {sha256(BAD)}, published is {sha256(GOOD)}; rm {blob} and type: "
        f"avrl fetch encoders --encoder dinov2; or, where you trust them: --encoder dinov2 --weights {path}"
    )
    path.rename(tmp_path / "pytorch_model.bin")  # of another of its files nobody's sum is known
    pins.hold("dinov2", ENCODERS["dinov2"], tmp_path / "pytorch_model.bin")


def test_a_file_from_an_address_is_held_to_its_published_sum_on_every_way_to_it(home, monkeypatch):
    (home / "vjepa2.1.pt").write_bytes(BAD)
    for asked in (weights.fetch, weights.find, weights.origin, lambda name: weights.identity(name, "pretrained")):
        with pytest.raises(IntegrityError, match=r"vjepa2\.1's weights .* published is 848a77c33cc9"):
            asked("vjepa2.1")
    assert weights.identity("vjepa2.1", "pretrained", home / "vjepa2.1.pt") == sha256(BAD)  # the user's own word
    monkeypatch.setitem(pins.SHA256, ENCODERS["vjepa2.1"].url, sha256(BAD))
    assert weights.identity("vjepa2.1", "pretrained") == sha256(BAD)
    assert [one.name for one in home.iterdir()] == ["vjepa2.1.pt"]  # what is published needs no record


def test_a_file_without_a_published_sum_is_held_to_its_first_fetch(home):
    path, record = home / "vip.pt", home / "vip.pt.sha256"
    path.write_bytes(GOOD)
    assert weights.find("vip") == path
    assert record.read_text() == f"{sha256(GOOD)}\n"
    assert weights.find("vip") == path
    path.write_bytes(BAD)
    with pytest.raises(IntegrityError) as caught:
        weights.find("vip")
    assert f"vip's weights {path} have SHA-256 {sha256(BAD)}, first fetched was {sha256(GOOD)}" in str(caught.value)
    assert f"where you trust them: rm {record}" in str(caught.value)
    record.unlink()
    assert weights.find("vip") == path
    assert record.read_text() == f"{sha256(BAD)}\n"


def test_fetch_says_what_the_weights_are_held_to(home, tmp_path):
    path = home / "vip.pt"
    path.write_bytes(GOOD)
    arguments = ["fetch", "encoders", "--encoder", "vip", "--cache", str(tmp_path / "cache")]
    said = CliRunner().invoke(avrl_cli.app.app, arguments)
    assert (said.exit_code, said.stdout) == (0, f"vip: {path}\n")
    assert said.stderr.rstrip().endswith("; not pinned: the newest when first fetched, that one ever after")
    told = json.loads(CliRunner().invoke(avrl_cli.app.app, [*arguments, "--json"]).stdout)["weights"]["vip"]
    assert told["pinned"] == "not pinned: the newest when first fetched, that one ever after"


@pytest.mark.parametrize("name", ["vip", "dinov2", "pi0", "raft"])
def test_a_fetch_without_network_does_not_advise_itself(home, name):
    done = CliRunner().invoke(avrl_cli.app.app, ["fetch", "encoders", "--encoder", name])
    assert isinstance(done.exception, MissingError)
    assert " are not in the cache and could not be fetched: " in done.exception.cause
    assert done.exception.next_step.startswith("run it where there is network")


def test_a_process_hashes_a_file_once(home, monkeypatch):
    (home / "mvp.pth").write_bytes(GOOD)
    hashed = []
    monkeypatch.setattr(pins, "sha256_of", lambda path: hashed.append(path) or sha256(path.read_bytes()))
    for _ in range(2):
        weights.find("mvp")
        weights.identity("mvp", "pretrained")
        weights.origin("mvp")
    assert hashed == [home / "mvp.pth"]


def test_the_origin_of_a_file_of_ones_own_says_whether_it_is_the_published_one(tmp_path, monkeypatch):
    file = tmp_path / "mine.bin"
    file.write_bytes(BAD)
    assert weights.origin("dinov2", file) == "mine.bin, not the published file"
    assert weights.origin("clip", file) == "mine.bin"  # nobody's sum is known
    monkeypatch.setitem(pins.SHA256, "timm/vit_base_patch14_dinov2.lvd142m/model.safetensors", sha256(BAD))
    assert weights.origin("dinov2", file) == "mine.bin, as published"


def test_rows_say_whose_weights_are_used_and_whoever_brings_the_published_file_has_the_published_ones(monkeypatch):
    """A file by hand can only be known by a sum; a commit is known of what was fetched."""
    row, digest = ENCODERS["dinov2"], sha256(BAD)
    assert pins.whose(row, digest, own=True) == f"file {digest[:8]}"
    assert pins.whose(row, digest, own=False) == f"published {digest[:8]}"
    assert pins.whose(ENCODERS["clip"], digest, own=True) == f"file {digest[:8]}"
    assert pins.whose(row, "", own=True) == ""
    monkeypatch.setitem(pins.SHA256, "timm/vit_base_patch14_dinov2.lvd142m/model.safetensors", digest)
    assert pins.whose(row, digest, own=True) == f"published {digest[:8]}"


def test_an_encoder_with_other_weights_has_another_name_and_another_licence():
    assert pins.named("dinov2", "file 1a2b3c4d") == "dinov2 (weights 1a2b3c4d)"
    assert {pins.named("dinov2", one) for one in ("published 1a2b3c4d", "")} == {"dinov2"}
    assert pins.network("dinov2 (weights 1a2b3c4d)") == pins.network("dinov2") == "dinov2"
    assert licence("dinov2", "published 1a2b3c4d") == licence("dinov2") == ["dinov2: Apache-2.0"]
    assert licence("dinov2", "file 1a2b3c4d") == ["dinov2: not known: a file of one's own"]


def test_any_name_of_timm_is_held_as_the_row_with_its_repository():
    from avrl.encoders import known

    row, other = ENCODERS["dinov2"], known("timm:vit_base_patch14_dinov2.lvd142m")
    assert dataclasses.replace(other, licence=row.licence, files=row.files) == row
    assert (other.revision, pins.published(other)) == (row.revision, pins.published(row))

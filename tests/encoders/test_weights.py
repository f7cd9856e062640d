"""Where weights come from, what a file of them may hold, and that they fit wholly or not at all."""

import dataclasses
import hashlib
import http.server
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from loopback import Files, serving
from safetensors.torch import save_file
from torch import nn

from avrl.encoders import ENCODERS, known, licence, weights
from avrl.errors import ConfigError, IntegrityError, MissingError, NotFoundError
from avrl.torchvision_ops import timm

CLIP, UNKNOWN = ENCODERS["clip"], "e" * 40
CONTENT = b"not really weights " * 1000


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as one download needs. It has no `model.safetensors`, but the .bin at all commits but one."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        if self.answer():
            self.wfile.write(CONTENT)

    def answer(self):
        revision, _, file = self.path.partition("/resolve/")[2].partition("/")
        there = file == "pytorch_model.bin" and revision != UNKNOWN
        self.send_response(200 if there else 404)
        self.send_header("X-Repo-Commit", "c" * 40 if revision == "main" else revision)
        if not there:
            self.send_header("X-Error-Code", "RevisionNotFound" if revision == UNKNOWN else "EntryNotFound")
        self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
        self.send_header("Content-Length", str(len(CONTENT) if there else 0))
        self.end_headers()
        return there

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetch(name, home, before="", ask="fetch", **environment):
    """(path or error line, seconds) of `weights.fetch`, or of `find` as a probe asks.

    In a process of its own: huggingface_hub reads its settings once.
    """
    program = (
        f"import sys\nfrom avrl.encoders import weights\nfrom avrl.errors import AvrlError\n{before}\n"
        f"try: print(weights.{ask}({name!r}), '<-', weights.origin({name!r}))\n"
        "except AvrlError as error: print(error.exit_code, error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=inherited | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1"} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip(), time.monotonic() - started


@pytest.mark.parametrize(("name", "commit"), [("clip", CLIP.revision), ("vc-1", "c" * 40)])
def test_downloads_what_the_hub_has_and_then_finds_it_offline(hub, tmp_path, name, commit):
    """Of a pinned row its commit, of another the newest."""
    hub_name = ENCODERS[name].hub
    told, _ = fetch(name, tmp_path, HF_ENDPOINT=hub)
    path, origin = told.split(" <- ")
    folder = f"models--{hub_name.replace('/', '--')}"
    assert path == f"{tmp_path}/hub/{folder}/snapshots/{commit}/pytorch_model.bin"
    assert origin == f"{hub_name}/pytorch_model.bin at {commit}"
    again, _ = fetch(name, tmp_path, HF_HUB_OFFLINE="1")
    assert again == told
    assert Path(path).read_bytes() == CONTENT


def test_a_wrong_commit_is_told_with_the_way_around_it(hub, tmp_path):
    line, _ = fetch(
        "clip", tmp_path, f"from avrl.encoders import pins; pins.REVISIONS[{CLIP.hub!r}] = {UNKNOWN!r}", HF_ENDPOINT=hub
    )
    assert line == (
        f"11 {CLIP.hub} has no commit {UNKNOWN}, to which clip is pinned; get the file you trust from "
        f"huggingface.co/{CLIP.hub}, and pass it: --encoder clip --weights FILE"
    )


def test_a_download_that_is_not_the_published_file_can_be_removed_and_fetched_again(hub, tmp_path):
    def pinned(content):
        where, digest = f"{CLIP.hub}/pytorch_model.bin", hashlib.sha256(content).hexdigest()
        return f"from avrl.encoders import pins; pins.SHA256[{where!r}] = {digest!r}"

    line, _ = fetch("clip", tmp_path, pinned(b"others"), HF_ENDPOINT=hub)
    assert re.match(r"8 clip's weights .* have SHA-256 [0-9a-f]{64}, published is [0-9a-f]{64}; rm ", line)
    path = Path(line.partition("; rm ")[2].partition(" and type: avrl fetch encoders --encoder clip;")[0])
    path.write_bytes(b"flipped" * 100)
    assert fetch("clip", tmp_path, pinned(CONTENT), HF_HUB_OFFLINE="1")[0].startswith("8 clip's weights")
    path.unlink()
    told, _ = fetch("clip", tmp_path, pinned(CONTENT), HF_ENDPOINT=hub)
    assert Path(told.split(" <- ")[0]).read_bytes() == CONTENT


def at(url):
    """The row of VIP, which is on no hub, with another address."""
    change = f"dataclasses.replace(encoders.ENCODERS['vip'], url={url!r})"
    return f"import dataclasses; from avrl import encoders; encoders.ENCODERS['vip'] = {change}"


def test_downloads_from_a_plain_address_and_then_finds_it_offline(tmp_path):
    with serving(Files, {"vip/model.pt": CONTENT}) as server:
        url = server.url + "vip/model.pt"
        told, _ = fetch("vip", tmp_path, at(url), no_proxy="127.0.0.1")
    assert told == f"{tmp_path}/avrl/vip.pt <- {url}"
    assert (tmp_path / "avrl" / "vip.pt").read_bytes() == CONTENT
    again, _ = fetch("vip", tmp_path, at(url), HF_HUB_OFFLINE="1")
    assert again == told


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_an_address_out_of_reach_is_told_at_once_with_the_command(tmp_path, environment):
    line, seconds = fetch("vip", tmp_path, at("http://127.0.0.1:1/model.pt"), "find", **environment)
    assert line.startswith("11 vip's weights (http://127.0.0.1:1/model.pt) are not in the cache")
    assert "avrl fetch encoders --encoder vip" in line
    assert "\n" not in line
    assert seconds < 10


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:1"}, {"HF_HUB_OFFLINE": "1"}])
def test_offline_is_told_at_once_with_the_command(tmp_path, environment):
    line, seconds = fetch("dinov2", tmp_path, ask="find", **environment)
    assert line.startswith("11 dinov2's weights (timm/vit_base_patch14_dinov2.lvd142m) are not in the cache")
    assert "avrl fetch encoders --encoder dinov2" in line
    assert "--weights FILE" in line
    assert "\n" not in line
    assert seconds < 10


def test_the_table_of_repositories_is_timms():
    rows = [one for one in ENCODERS.values() if one.module.endswith(".timm_image")]
    assert len(rows) >= 14
    for one in rows:
        assert timm.get_pretrained_cfg(one.argument).hf_hub_id == one.hub


@pytest.mark.parametrize("name", [name for name, one in ENCODERS.items() if not any(one.closed)])
def test_every_encoder_of_the_table_says_where_its_weights_are_and_their_licence(name):
    one = known(name)
    assert sum(map(bool, (one.hub, one.wheel, one.url))) == bool(one.licence)
    assert licence(name) == ([f"{name}: {one.licence}"] if one.licence else [])


def test_timm_tells_the_licence_of_its_models():
    assert licence("timm:resnet18.a1_in1k") == ["timm:resnet18.a1_in1k: apache-2.0"]


def test_a_file_of_ones_own_comes_first(tmp_path):
    file = tmp_path / "mine.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    assert weights.find("clip", file) == file
    with pytest.raises(NotFoundError, match="no weights file"):
        weights.find("clip", tmp_path / "typo.safetensors")


@pytest.mark.parametrize("name", ["pixels-8", "no-such", "timm:no_such"])
def test_there_is_nothing_to_fetch(name):
    with pytest.raises(ConfigError):
        weights.fetch(name)


def test_a_missing_wheel_is_told_with_the_command(monkeypatch):
    absent = dataclasses.replace(ENCODERS["efficientnet-lite0"], wheel="no_such_wheel")
    monkeypatch.setitem(ENCODERS, "efficientnet-lite0", absent)
    with pytest.raises(MissingError) as caught:
        weights.find("efficientnet-lite0")
    assert caught.value.exit_code == 11
    assert caught.value.next_step == "pip install 'avrl[imagenet]'"


def test_identity_follows_the_file(tmp_path):
    file = tmp_path / "mine.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    first = weights.identity("clip", "pretrained", file)
    assert first == hashlib.sha256(file.read_bytes()).hexdigest()
    save_file({"a": torch.ones(2)}, file)
    assert weights.identity("clip", "pretrained", file) != first
    assert weights.identity("clip", "random") == ""
    assert weights.identity("pixels-8", "pretrained") == ""


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "r3m", "ema_encoder"])
def test_reads_plain_and_wrapped_states(tmp_path, wrapper):
    state = {"a": torch.arange(3.0)}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "file.pth")
    assert torch.equal(weights.read(tmp_path / "file.pth")["a"], state["a"])


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pickle.bin", pickle.dumps({"a": Bomb()}, protocol=2)),
        ("noise.pth", b"noise" * 100),
        ("stumble.pth", b"\x80\x02t."),  # an IndexError of the unpickler's
        ("cut.pth", b"PK\x03\x04" + b"noise" * 100),
        ("empty.pth", b""),
        ("noise.safetensors", b"noise" * 100),
        ("short.safetensors", b"\x40\0\0\0\0\0\0\0{"),
    ],
)
def test_refuses_files_that_are_not_plain_tensors(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{name} is no weights file: it (begins|is|holds)") as caught:
        weights.read(tmp_path / name)
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 240
    assert not (tmp_path / "bomb").exists()


def test_refuses_a_dictionary_of_other_things(tmp_path):
    torch.save({"a": torch.zeros(1), "epoch": 3}, tmp_path / "file.pth")
    with pytest.raises(IntegrityError, match="not a dictionary of tensors"):
        weights.read(tmp_path / "file.pth")


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def test_fit_loads_all_and_drops_only_what_it_is_told():
    state = small().state_dict()
    module = small()
    weights.fit(module, state | {"head.weight": torch.zeros(1)}, "small", surplus=("head.",))
    assert all(torch.equal(one, state[key]) for key, one in module.state_dict().items())


def test_fit_does_without_batch_counters():
    state = small().state_dict()
    del state["1.num_batches_tracked"]
    weights.fit(small(), dict(state), "small")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0.bias": None}, "1 missing (0.bias)"),
        ({"head.weight": torch.zeros(1)}, "1 left over (head.weight)"),
        ({"0.bias": torch.zeros(5)}, "1 of another shape (0.bias)"),
    ],
)
def test_fit_names_what_does_not_fit_and_touches_nothing(change, words):
    module = small()
    before = {key: one.clone() for key, one in module.state_dict().items()}
    state = {key: one for key, one in (small().state_dict() | change).items() if one is not None}
    with pytest.raises(IntegrityError) as caught:
        weights.fit(module, state, "small")
    assert words in str(caught.value)
    assert all(torch.equal(one, before[key]) for key, one in module.state_dict().items())

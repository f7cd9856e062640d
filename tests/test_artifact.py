"""Keys, digests, and directories that are whole or not there."""

import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avrl.artifact import (
    FORMAT,
    LOOKS,
    MANIFEST,
    SCRATCH,
    File,
    Input,
    Manifest,
    digest_of,
    hash_files,
    key_of,
    load,
    publish,
    seal,
    sweep,
    verify,
    write_durably,
)
from avrl.errors import IntegrityError

FILES = {"a.txt": b"first", "deep/er/b.bin": bytes(range(256)), "deep/empty": b"", "deep/manifest.json": b"{}"}


def fill(folder, files=FILES):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def manifest_of(folder, **other):
    files, config, inputs = hash_files(folder), {"size": 3}, [Input("raw", "some-raw", "d" * 64)]
    values = {"runtime": {}, "facts": {"n": 1}, "licence": ["CC0"], "packages": {}, "seconds": 0.1} | other
    key = key_of("tiny", 1, config, {"raw": "d" * 64})
    return Manifest("tiny", 1, key, digest_of(files), config=config, inputs=inputs, files=files, **values)


@pytest.fixture
def artifact(tmp_path):
    partial = fill(tmp_path / "tiny" / ".partial-x")
    seal(partial, manifest_of(partial))
    return publish(partial, tmp_path / "tiny" / "x")


# Key and digest.

ASKED = ("tiny", 1, {"size": 3, "names": ["a"]}, {"raw": "1" * 64, "frames": "2" * 64})


@pytest.mark.parametrize(
    "other",
    [
        ("tine", *ASKED[1:]),
        ("tiny", 2, *ASKED[2:]),
        ("tiny", 1, {"size": 4, "names": ["a"]}, ASKED[3]),
        ("tiny", 1, {"size": 3, "names": ["a", "b"]}, ASKED[3]),
        ("tiny", 1, {"size": 3, "names": "a"}, ASKED[3]),
        ("tiny", 1, {"size": 3, "names": ["a"], "new": None}, ASKED[3]),
        (*ASKED[:3], {"raw": "1" * 64, "frames": "3" * 64}),
        (*ASKED[:3], {"raw": "2" * 64, "frames": "1" * 64}),
        (*ASKED[:3], {"raw": "1" * 64}),
    ],
)
def test_the_key_is_of_everything_that_was_asked(other):
    assert key_of(*other) != key_of(*ASKED)


def test_the_key_does_not_hang_on_order_and_never_moves():
    turned = (*ASKED[:2], dict(reversed(ASKED[2].items())), dict(reversed(ASKED[3].items())))
    assert key_of(*turned) == key_of(*ASKED)
    # Spelt out by hand: every cache there is is named by this function, and another spelling would orphan all of it.
    inputs = f'{{"frames": "{"2" * 64}", "raw": "{"1" * 64}"}}'
    text = f'{{"config": {{"names": ["a"], "size": 3}}, "inputs": {inputs}, "stage": "tiny", "version": 1}}'
    assert key_of(*ASKED) == hashlib.sha256(text.encode()).hexdigest()


paths = st.text(st.characters(categories=("L", "N")), min_size=1)
files = st.builds(File, paths, st.integers(0, 9), st.text("0123456789abcdef", min_size=64, max_size=64))


@given(st.lists(files, max_size=5, unique_by=lambda one: one.path), st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_digest_is_of_a_set_of_files(listed, chance):
    turned = listed[:]
    chance.shuffle(turned)
    assert digest_of(turned) == digest_of(listed)
    for index, one in enumerate(listed):
        rest = listed[:index] + listed[index + 1 :]
        assert digest_of(rest) != digest_of(listed)
        assert digest_of([*rest, dataclasses.replace(one, path=one.path + "x")]) != digest_of(listed)
        assert digest_of([*rest, dataclasses.replace(one, sha256=one.sha256[::-1] + "0")]) != digest_of(listed)


def test_the_digest_is_what_sha256sum_would_give(tmp_path):
    """`cd ARTIFACT; find . -type f ! -name manifest.json -printf '%P\\n' | xargs sha256sum | sort | sha256sum`."""
    fill(tmp_path)
    lines = sorted(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in FILES.items())
    assert digest_of(hash_files(tmp_path)) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_looks_are_listed_and_verified_but_no_part_of_the_digest(tmp_path):
    partial = fill(tmp_path / "plain")
    digest = digest_of(hash_files(partial))
    fill(partial, {f"{LOOKS}/a.png": b"1"})
    seal(partial, manifest_of(partial))
    published = publish(partial, tmp_path / "x")
    assert published.digest == digest
    assert f"{LOOKS}/a.png" in {file.path for file in published.manifest.files}
    (published.root / LOOKS / "a.png").write_bytes(b"2")
    with pytest.raises(IntegrityError, match=r"a\.png is not what its manifest says"):
        verify(published)


@pytest.mark.parametrize("name", [f"deep/{LOOKS}/a", f"{LOOKS}.parquet", f"{LOOKS}2/a"])
def test_nothing_that_only_resembles_looks_is_left_out_of_the_digest(name, tmp_path):
    digest = digest_of(hash_files(fill(tmp_path)))
    assert digest_of(hash_files(fill(tmp_path, {name: b"1"}))) != digest


def test_files_may_be_written_in_any_order(tmp_path):
    order = list(FILES.items())
    random.Random(1).shuffle(order)
    one, other = fill(tmp_path / "one"), fill(tmp_path / "other", dict(order))
    assert hash_files(one) == hash_files(other)
    assert [file.path for file in hash_files(one)] == sorted(FILES)
    assert [file.bytes for file in hash_files(one)] == [len(FILES[name]) for name in sorted(FILES)]


def test_manifest_and_scratch_are_not_content(tmp_path):
    before = hash_files(fill(tmp_path))
    fill(tmp_path, {MANIFEST: b"{}", f"{SCRATCH}/x/y": b"1", f"{SCRATCH}/z": b"2"})
    assert hash_files(tmp_path) == before


def test_a_linked_folder_counts_by_its_content(tmp_path):
    copy = fill(tmp_path / "copy", {"deep/c": b"c"})
    root = fill(tmp_path / "root", {"a": b"a"})
    (root / "part").symlink_to(copy)
    assert [file.path for file in hash_files(root)] == ["a", "part/deep/c"]


# Publishing.


def test_a_published_artifact_reads_back(artifact):
    again = load(artifact.root)
    assert again == artifact
    assert (again.ref, again.bytes, again.digest) == ("x", 5 + 256 + 2, again.manifest.digest)
    assert again.manifest.input("raw").ref == "some-raw"
    with pytest.raises(KeyError):
        again.manifest.input("frames")
    verify(again)
    assert not list(artifact.root.parent.glob(".partial*"))


def test_everything_is_synced_before_the_manifest_and_the_name_last(tmp_path, monkeypatch):
    partial = fill(tmp_path / ".partial-x", {"a": b"a", "b/c": b"c"})
    manifest = manifest_of(partial)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink()))
    seal(partial, manifest)
    names = [path.relative_to(tmp_path).as_posix() for path in synced]
    assert set(names[:4]) == {".partial-x/a", ".partial-x/b/c", ".partial-x", ".partial-x/b"}
    assert names[4:] == [f".partial-x/.{MANIFEST}.{os.getpid()}.tmp", ".partial-x"]
    publish(partial, tmp_path / "x")
    assert synced[6:] == [tmp_path]


def test_scratch_stays_until_the_manifest_is_written_and_is_never_published(tmp_path):
    partial = fill(tmp_path / ".partial-x", {"a": b"a", f"{SCRATCH}/state": b"s"})
    seal(partial, manifest_of(partial))
    assert (partial / SCRATCH / "state").exists()
    done = publish(partial, tmp_path / "x")
    assert sorted(path.name for path in done.root.iterdir()) == ["a", MANIFEST]


def test_the_manifest_is_sorted_json_for_people(artifact):
    text = (artifact.root / MANIFEST).read_text()
    values = json.loads(text)
    assert text == json.dumps(values, indent=1, sort_keys=True)
    assert values["format"] == FORMAT
    assert values["inputs"] == [{"role": "raw", "ref": "some-raw", "digest": "d" * 64}]


def test_a_written_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_durably(path, b"old")
    seen = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(path.read_bytes()), real(fd)))
    write_durably(path, b"new")
    assert seen == [b"old", b"new"]  # synced under its temporary name; renamed; then the folder
    assert [one.name for one in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize(("number", "told"), [(errno.EINVAL, False), (errno.EIO, True), (errno.ENOSPC, True)])
def test_a_refused_sync_is_borne_unless_bytes_are_lost(tmp_path, monkeypatch, number, told):
    def refuse(fd):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if told:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_durably(tmp_path / "a", b"a")
    else:
        write_durably(tmp_path / "a", b"a")


def test_litter_of_killed_processes_is_swept(tmp_path):
    copy = fill(tmp_path / "copy", {".theirs.1.tmp": b""})
    ours = {".manifest.json.4711.tmp": b"{", "z.zarr/zarr." + "0a" * 16 + ".partial": b"", "deep/.c.1.tmp": b""}
    kept = {"a.tmp": b"", ".hidden": b"", "b.partial": b"", "z.zarr/zarr.json": b"{}", "deep/c": b""}
    fill(tmp_path / "root", ours | kept)
    (tmp_path / "root" / "link").symlink_to(copy)
    sweep(tmp_path / "root")
    left = {path.relative_to(tmp_path / "root").as_posix() for path in (tmp_path / "root").rglob("*")}
    assert left == {*kept, "deep", "z.zarr", "link"}
    assert (copy / ".theirs.1.tmp").exists()


# Damage.


def rewritten(artifact, **changes):
    path = artifact.root / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"3", b'"x"', b"{}", b"\xff\xfe", b'{"format": 1}'])
def test_a_damaged_manifest_is_named_with_the_cure(artifact, text):
    (artifact.root / MANIFEST).write_bytes(text)
    with pytest.raises(IntegrityError) as caught:
        load(artifact.root)
    assert str(artifact.root / MANIFEST) in caught.value.cause
    assert caught.value.next_step == f"remove it with: rm -r {artifact.root}"
    assert caught.value.exit_code == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"format": FORMAT + 1},
        {"surprise": 1},
        {"files": [{"path": "a"}]},
        {"files": []},
        {"inputs": []},
        {"inputs": None},
        {"config": {"size": 4}},
        {"version": 2},
        {"stage": "tine"},
        {"key": "0" * 64},
        {"digest": "0" * 64},
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_itself_is_damaged(artifact, changes):
    rewritten(artifact, **changes)
    with pytest.raises(IntegrityError, match=r"rm -r "):
        load(artifact.root)


def test_a_foreign_format_says_which(artifact):
    rewritten(artifact, format=FORMAT + 1)
    with pytest.raises(IntegrityError, match=f"has format {FORMAT + 1}, this avrl reads {FORMAT}"):
        load(artifact.root)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["a.txt", "deep/er/b.bin", "deep/manifest.json"])
@pytest.mark.parametrize(
    "harm",
    [
        flip,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["flipped", "shorter", "longer", "emptied", "missing", "a folder"],
)
def test_a_changed_file_is_named_with_the_cure(artifact, name, harm):
    verify(artifact)
    harm(artifact.root / name)
    with pytest.raises(IntegrityError) as caught:
        verify(artifact)
    assert str(artifact.root / name) in caught.value.cause
    assert f"rm -r {artifact.root}" in caught.value.next_step
    assert load(artifact.root).digest == artifact.digest  # the manifest itself is well


def test_a_dangling_link_is_a_missing_file(tmp_path):
    copy = fill(tmp_path / "copy", {"part1.zip": b"zip"})
    partial = tmp_path / ".partial-x"
    partial.mkdir()
    (partial / "part1.zip").symlink_to(copy / "part1.zip")
    seal(partial, manifest_of(partial))
    done = publish(partial, tmp_path / "x")
    verify(done)
    shutil.rmtree(copy)
    with pytest.raises(IntegrityError, match=r"part1.zip is not what its manifest says"):
        verify(done)

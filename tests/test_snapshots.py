"""Snapshots on a disk that fills up, is killed over, or rots: what stays is good, what does not takes no room."""

import ctypes
import errno
import os
import struct
import subprocess
from pathlib import Path

import pytest
import ranked
import torch
from safetensors.torch import save_file
from test_training import recipe

from avrl import checkpoint
from avrl.artifact import sweep
from avrl.cache import Cache
from avrl.checkpoint import Snapshot, copied, load_snapshot, save_snapshot
from avrl.stage import _is_full

CREATED = 0x100  # IN_CREATE of <sys/inotify.h>


@pytest.fixture
def learner():
    objective = checkpoint.build(recipe().network)
    return objective, torch.optim.AdamW(objective.parameters())


def save(folder, learner, *steps):
    for step in steps:
        save_snapshot(folder, copied(*learner), Snapshot(step, [], []))


def names(folder):
    return sorted(one.name for one in folder.iterdir())


def name_of(*steps):
    return [f"step-{step:09d}" for step in steps]


def test_what_killed_saves_have_left_goes_with_the_next_one(tmp_path, learner):
    for left in (".step-000000007.tmp", ".step-000000004.arriving"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").write_bytes(b"half")
    save(tmp_path, learner, 9)
    assert names(tmp_path) == name_of(9)


def test_a_save_that_finds_no_room_leaves_the_earlier_ones_and_takes_none_itself(tmp_path, learner, monkeypatch):
    save(tmp_path, learner, 1, 2)

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, learner, 3)
    assert names(tmp_path) == name_of(1, 2)
    assert load_snapshot(tmp_path, *learner).step == 2


def test_a_damaged_newest_one_does_not_take_the_place_of_a_good_one(tmp_path, learner):
    """The run went on from step 1, as 5 is damaged; soon there are two good ones again."""
    save(tmp_path, learner, 1, 5)
    (tmp_path / name_of(5)[0] / "model.safetensors").write_bytes(b"?")
    assert load_snapshot(tmp_path, *learner).step == 1
    save(tmp_path, learner, 3)
    assert names(tmp_path) == name_of(1, 3)
    save(tmp_path, learner, 4)
    assert names(tmp_path) == name_of(3, 4)


def test_a_damaged_one_is_not_counted_among_those_that_stay(tmp_path, learner):
    save(tmp_path, learner, 2, 3)
    (tmp_path / name_of(3)[0] / "model.safetensors").write_bytes(b"?")
    found = load_snapshot(tmp_path, *learner)
    assert (found.step, list(found.refused)) == (2, name_of(3))
    for step, stay in ((5, (2, 5)), (6, (5, 6))):
        save_snapshot(tmp_path, copied(*learner), Snapshot(step, [], [], refused=found.refused))
        assert names(tmp_path) == name_of(*stay)


def test_a_damaged_one_that_is_made_again_is_good(tmp_path, learner):
    save(tmp_path, learner, 2, 3)
    (tmp_path / name_of(3)[0] / "model.safetensors").write_bytes(b"?")
    refused = load_snapshot(tmp_path, *learner).refused
    save_snapshot(tmp_path, copied(*learner), Snapshot(3, [], [], refused=refused))
    assert load_snapshot(tmp_path, *learner).step == 3


def test_all_of_a_snapshot_is_on_the_disk_before_it_has_its_name(tmp_path, learner, monkeypatch):
    synced, real = [], (os.fsync, Path.rename)

    def fsync(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real[0](descriptor)

    def rename(path, target):
        synced.append(f"-> {Path(target).name}")
        return real[1](path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    save(tmp_path, learner, 1)
    named = synced.index(f"-> {name_of(1)[0]}")
    assert {"model.safetensors", "optimizer.safetensors"} <= set(synced[:named])
    assert tmp_path.name in synced[named:]


@pytest.mark.parametrize("words", ["Disk quota exceeded (os error 122)", "No space left on device (os error 28)"])
def test_a_full_disk_or_quota_is_known_by_the_words_of_safetensors(words, tmp_path):
    assert _is_full(RuntimeError(f"Error while serializing: I/O error: {words}"), Cache(tmp_path))
    assert not _is_full(RuntimeError("shapes do not fit"), Cache(tmp_path))


@pytest.mark.slow
def test_two_ranks_on_a_full_disk_end_with_the_code_of_a_full_disk(tmp_path):
    """A real one, with room for two snapshots: the first rank's save fails, and it must still find room to say so."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", place], capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        ranked.frames_artifact(place)
        process = ranked.pretrain(place, "--epochs", "100000", "--save-minutes", "0", "--gpus", "2")
        words = process.communicate(timeout=120)[1]
        assert process.returncode == 6, words
        assert "no space left while making" in words.splitlines()[-1]
        assert len(list(place.glob("checkpoints/.partial-*/scratch/snapshots/step-*"))) == 2
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_what_safetensors_leaves_when_it_is_killed_is_swept_away(tmp_path):
    """Its name until it is whole is told by the system (inotify); such a file was once published with a checkpoint."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode(tmp_path), CREATED) > 0
    save_file({"x": torch.zeros(8)}, tmp_path / "model.safetensors")
    events, seen = os.read(watch, 2**16), set()
    os.close(watch)
    while events:
        n_bytes = struct.unpack_from("iIII", events)[-1]
        seen.add(os.fsdecode(events[16 : 16 + n_bytes].rstrip(b"\0")))
        events = events[16 + n_bytes :]
    left = seen - {"model.safetensors"}
    assert left  # else this test has nothing to say of safetensors' way any more
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    sweep(tmp_path)
    assert names(tmp_path) == ["model.safetensors"]

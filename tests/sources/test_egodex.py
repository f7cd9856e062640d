"""`avrl.sources.egodex`: zips and unpacked parts, their pairs of files, and what does not pair."""

from __future__ import annotations

import zipfile

import clips
import numpy as np
import pytest
from contracts.source import SourceContract

from avrl.episodes import View
from avrl.errors import IntegrityError
from avrl.sources import egodex


@pytest.fixture(scope="module")
def episodes():
    """Ten episodes of a task, so that 10 comes after 9, and one of another."""
    clip, pose = clips.episode(6)
    return {**{f"fold/{n}": (clip, pose) for n in (10, 2, 9)}, "add/0": (clip, pose)}


class TestEgodex(SourceContract):
    module = egodex
    parts = ("part1", "test")

    def make(self, folder):
        clips.egodex(folder, {"fold/0": clips.episode(6), "fold/1": clips.episode(7, seed=1)})
        return clips.egodex(folder, {"pour/0": clips.episode(5, seed=2)}, part="test")

    def damage(self, raw):
        clips.damage(raw / "part1.zip", "part1/fold/0.mp4", 500)


class TestUnpacked(TestEgodex):
    def make(self, folder):
        super().make(folder)
        for part in self.parts:
            with zipfile.ZipFile(folder / f"{part}.zip") as archive:
                archive.extractall(folder)
            (folder / f"{part}.zip").unlink()
        return folder

    def damage(self, raw):
        """Without the zip's checksum a flip must hit what the decoder needs."""
        path = raw / "part1" / "fold" / "0.mp4"
        path.write_bytes(path.read_bytes()[:-600])

    def test_a_flipped_bit_is_refused_by_name(self, raw, tmp_path):
        self.damage(raw)
        episodes, _ = egodex.survey(raw)
        with pytest.raises(IntegrityError, match=str(raw / "part1" / "fold" / "0.mp4")):
            self.opened(raw, tmp_path, episodes[0])


def test_episodes_are_sorted_by_part_task_and_number(episodes, tmp_path):
    raw = clips.egodex(tmp_path, episodes)
    clips.egodex(raw, {"add/3": episodes["add/0"]}, part="extra")
    found, _ = egodex.survey(raw)
    names = ["extra/add/3", "part1/add/0", "part1/fold/2", "part1/fold/9", "part1/fold/10"]
    assert [one.episode_id for one in found] == names
    assert [one.task for one in found] == ["add", "add", "fold", "fold", "fold"]
    assert found[3].file == "part1.zip"
    assert found[3].member == "part1/fold/9.mp4"


def test_only_the_test_part_is_test(episodes, tmp_path):
    for part in ("part1", "part5", "extra", "sample", "test"):
        clips.egodex(tmp_path, {"add/0": episodes["add/0"]}, part=part)
    found, _ = egodex.survey(tmp_path)
    assert {one.episode_id.split("/")[0]: one.split for one in found} == {
        "part1": "train",
        "part5": "train",
        "extra": "train",
        "sample": "train",
        "test": "test",
    }


def test_files_without_a_partner_are_named(episodes, tmp_path):
    clip, pose = episodes["add/0"]
    raw = clips.egodex(
        tmp_path, {"add/0": (clip, pose), "add/1": (clip, None), "add/2": (None, pose), "add/x": (clip, pose)}
    )
    found, dropped = egodex.survey(raw)
    assert [one.episode_id for one in found] == ["part1/add/0"]
    assert [(one.episode_id, one.reason) for one in dropped] == [
        ("part1/add/1", "has no .hdf5 beside it"),
        ("part1/add/2", "has no .mp4 beside it"),
        ("part1/add/x", "is not <part>/<task>/<n>"),
    ]


def test_other_files_in_a_zip_are_no_episodes(episodes, tmp_path):
    raw = clips.egodex(tmp_path, {"add/0": episodes["add/0"]})
    with zipfile.ZipFile(raw / "part1.zip", "a") as archive:
        for name in ("part1/", "part1/LICENSE.txt", "part1/add/thumb.png"):
            archive.writestr(name, b"")
    found, dropped = egodex.survey(raw)
    assert len(found) == 1
    assert dropped == []


def test_two_spellings_of_a_number_are_two_episodes(episodes, tmp_path):
    raw = clips.egodex(tmp_path, {"add/1": episodes["add/0"], "add/01": episodes["add/0"]})
    found, _ = egodex.survey(raw)
    assert len({one.episode_id for one in found}) == 2


@pytest.mark.parametrize("number", ["\u00b2", "\u0663", "-1", "1e3", "9" * 5000, "x"])
def test_a_name_that_is_no_number(number, episodes, tmp_path):
    raw = clips.egodex(tmp_path, {"add/0": episodes["add/0"], f"add/{number}": episodes["add/0"]})
    found, dropped = egodex.survey(raw)
    assert [one.episode_id for one in found] == ["part1/add/0"]
    assert [one.reason for one in dropped] == ["is not <part>/<task>/<n>"]


@pytest.mark.parametrize(
    ("attributes", "want"),
    [
        ({}, "Do it."),
        ({"which_llm_description": "2", "llm_description2": "Undo it."}, "Undo it."),
        ({"which_llm_description": 2, "llm_description2": "Undo it."}, "Undo it."),
        ({"which_llm_description": "1", "llm_description2": "Undo it."}, "Do it."),
        ({"which_llm_description": "2"}, "ramp"),  # the task where the sentence is missing
        ({"llm_description": "caf\u00e9"}, "caf\u00e9"),
    ],
)
def test_the_instruction_is_the_one_that_was_done(attributes, want, tmp_path):
    clip, _ = clips.episode(6)
    raw = clips.egodex(tmp_path / "raw", {"add/0": (clip, clips.poses(6, **attributes))})
    assert egodex.frames(raw, egodex.survey(raw)[0][0], View(16), tmp_path)[0].language == want


def test_poses_of_the_sample_and_of_other_libraries_are_read(tmp_path):
    raw = clips.egodex(tmp_path / "raw", clips.sample_egodex(1, 1), part="sample")
    one, frames = egodex.frames(raw, egodex.survey(raw)[0][0], View(56), tmp_path)
    pictures = np.stack(list(frames))
    assert one.fps == 30
    assert len(pictures) == one.length >= 30
    assert pictures.std() > 10

"""`avrl.lerobot` and the source of that name: v2.x and v3.x as they are found, and all that can be wrong in them."""

from __future__ import annotations

import json

import clips
import forms
import numpy as np
import polars as pl
import pytest
from contracts.source import SourceContract

from avrl import lerobot
from avrl.episodes import View
from avrl.errors import DecodeError, IntegrityError, MismatchError, NotFoundError
from avrl.sources import lerobot as source
from avrl.sources import source as named

ALL = ("all",)
CLIP2 = f"videos/chunk-000/{forms.CAMERA}/episode_000000.mp4"
CLIP3 = f"videos/{forms.CAMERA}/chunk-000/file-000.mp4"
ROWS2, ROWS3 = "data/chunk-000/episode_000000.parquet", "data/chunk-000/file-000.parquet"
LIST3 = "meta/episodes/chunk-000/file-000.parquet"
WRITERS = {"v2.1": forms.lerobot2, "v3.0": forms.lerobot3}


@pytest.fixture(scope="module")
def those():
    return forms.trajectories()


def artifact(copy, root):
    return forms.linked(source, copy, root, ALL)


def all_frames(raw, episode, scratch, view=None):
    one, pictures = source.frames(raw, episode, view or View(48), scratch)
    found = list(pictures)
    assert len(found) == one.length
    return found


class TestLerobot2(SourceContract):
    module, parts = source, ALL

    def make(self, folder):
        return forms.lerobot2(folder, forms.trajectories())

    def damage(self, raw):
        clips.broken(raw / "lerobot/all" / CLIP2)


class TestLerobot3(SourceContract):
    module, parts = source, ALL

    def make(self, folder):
        return forms.lerobot3(folder, forms.trajectories())

    def damage(self, raw):
        clips.broken(raw / "lerobot/all" / CLIP3)


class TestImages(SourceContract):
    module, parts = source, ALL

    def make(self, folder):
        return forms.lerobot3(folder, forms.trajectories(), kind="image")

    def damage(self, raw):
        """In the picture's checksummed bytes: parquet's own checksums are optional, and few write them."""
        path = raw / "lerobot/all" / ROWS3
        table = pl.read_parquet(path)
        cells = table[forms.CAMERA].to_list()
        cells[3]["bytes"] = clips.flipped(cells[3]["bytes"], 60)
        table.with_columns(pl.Series(forms.CAMERA, cells)).write_parquet(path)


def test_it_is_a_source_by_name():
    assert named("lerobot") is source


# What is there.


@pytest.mark.parametrize("options", ["", forms.AV1], ids=["h264", "av1"])
@pytest.mark.parametrize("version", WRITERS)
def test_pictures_are_those_of_their_episode_to_the_frame(tmp_path, those, version, options):
    raw = artifact(WRITERS[version](tmp_path / "copy", those, options=options), tmp_path / "raw")
    for episode, one in zip(source.survey(raw)[0], those, strict=True):
        found = all_frames(raw, episode, tmp_path)
        for n, frame in enumerate(found):
            errors = [np.abs(clips.rgb(frame).astype(float) - other).mean() for other in one.frames]
            assert int(np.argmin(errors)) == n
        third = all_frames(raw, episode, tmp_path, View(48, fps=5 / 3))
        assert np.array_equal(third, found[::3])


def test_png_pictures_come_out_as_they_went_in(tmp_path, those):
    for name, writer in WRITERS.items():
        raw = artifact(writer(tmp_path / name, those, kind="image"), tmp_path / f"raw-{name}")
        for episode, one in zip(source.survey(raw)[0], those, strict=True):
            assert np.array_equal(all_frames(raw, episode, tmp_path), one.frames)


@pytest.mark.parametrize("version", WRITERS)
def test_paths_are_those_of_the_templates(tmp_path, those, version):
    """One publisher writes ``file_000``, the usual name is ``file-000``."""
    if version == "v3.0":
        paths = {key: path.replace("file-", "file_") for key, path in forms.V3.items()}
        copy = forms.lerobot3(tmp_path / "copy", those, stem="file_000", **paths)
    else:
        copy = forms.lerobot2(tmp_path / "copy", those)
        for kind in ("data", "videos"):
            (copy / kind).rename(copy / f"{kind}2")
        info = json.loads((copy / lerobot.INFO).read_text())
        info |= {"data_path": "data2/chunk-000/episode_{episode_index:06d}.parquet"}
        info |= {"video_path": "videos2/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"}
        forms.write(copy / lerobot.INFO, info)
    raw = artifact(copy, tmp_path / "raw")
    episodes, dropped = source.survey(raw)
    assert (len(episodes), dropped) == (len(those), [])
    all_frames(raw, episodes[1], tmp_path)


@pytest.mark.parametrize("n_black", [1, 2])
def test_dummy_cameras_are_told_by_their_pictures(tmp_path, those, n_black):
    raw = artifact(forms.lerobot2(tmp_path / "copy", those, black=n_black), tmp_path / "raw")
    assert {one.member for one in source.survey(raw)[0]} == {forms.CAMERA}


def test_a_damaged_first_clip_does_not_make_another_camera_the_main_one(tmp_path, those):
    copy = forms.lerobot2(tmp_path / "copy", those, black=1)
    for k in range(len(those)):
        (copy / f"videos/chunk-000/observation.images.black_0/episode_{k:06d}.mp4").write_bytes(b"no clip")
    raw = artifact(copy, tmp_path / "raw")
    episodes = source.survey(raw)[0]
    assert {one.member for one in episodes} == {"observation.images.black_0"}
    with pytest.raises(DecodeError, match="black_0"):
        all_frames(raw, episodes[0], tmp_path)


@pytest.mark.parametrize("n_readable", [1, 2])
def test_a_damaged_clip_of_a_dummy_does_not_make_it_the_main_one(tmp_path, those, n_readable):
    copy = forms.lerobot2(tmp_path / "copy", those, black=1)
    for k in range(3 - n_readable):
        path = copy / f"videos/chunk-000/observation.images.black_0/episode_{k:06d}.mp4"
        path.write_bytes(path.read_bytes()[:400])
    raw = artifact(copy, tmp_path / "raw")
    assert {one.member for one in source.survey(raw)[0]} == {forms.CAMERA}


def test_the_camera_of_a_partial_download_is_told_by_the_episodes_that_are_there(tmp_path, those):
    copy = forms.lerobot2(tmp_path / "copy", those, black=1)
    for k in range(3):  # all that an even sample of the list would look at
        for name in ("observation.images.black_0", forms.CAMERA):
            (copy / f"videos/chunk-000/{name}/episode_{k:06d}.mp4").unlink()
    episodes, dropped = source.survey(artifact(copy, tmp_path / "raw"))
    assert [(one.offset, one.member) for one in episodes] == [(3, forms.CAMERA)]
    assert len(dropped) == 3


def test_a_data_set_that_was_moved_is_named(tmp_path, those):
    raw = artifact(forms.lerobot2(tmp_path / "copy", those[:1]), tmp_path / "raw")
    (tmp_path / "copy").rename(tmp_path / "elsewhere")
    lerobot.load.cache_clear()
    with pytest.raises(NotFoundError, match=r"copy has no meta/info.json: its folder is gone.*fetch --from DIR again"):
        source.survey(raw)


@pytest.mark.parametrize("version", WRITERS)
def test_a_parquet_that_claims_more_rows_than_are_promised_is_not_read(tmp_path, those, version):
    copy = WRITERS[version](tmp_path / "copy", those)
    path = copy / (ROWS3 if version == "v3.0" else ROWS2)
    table = pl.read_parquet(path)
    pl.concat([table] * 9).write_parquet(path)
    raw = artifact(copy, tmp_path / "raw")
    with pytest.raises(IntegrityError, match=r"claims \d+ rows, where 46 are many"):
        source.frames(raw, source.survey(raw)[0][0], View(16), tmp_path)


TASKS = [
    ({"note": ["a", "b"], "task": ["task 0", "task 1"], "zzz": ["c", "d"]}, ""),
    ({"note": ["a", "b"], "__index_level_0__": ["task 0", "task 1"]}, ""),
    ({"instruction": ["task 0", "task 1"], "length": [1, 2]}, ""),
    ({"a": ["x", "y"], "b": ["task 0", "task 1"]}, "does not say which column is the task: task_index, a, b"),
    ({"number": [1, 2]}, "does not say which column is the task"),
]


@pytest.mark.parametrize(("columns", "words"), TASKS)
def test_the_column_of_tasks_is_the_named_one_or_the_only_one(tmp_path, those, columns, words):
    copy = forms.lerobot3(tmp_path / "copy", those, meta={"tasks": [[0], [1], [0], [1]]})
    forms.write(copy / "meta/tasks.parquet", pl.DataFrame({"task_index": [0, 1], **columns}))
    raw = artifact(copy, tmp_path / "raw")
    first = source.survey(raw)[0][0]
    if words:
        with pytest.raises(IntegrityError, match=words):
            source.frames(raw, first, View(16), tmp_path)
    else:
        assert source.frames(raw, first, View(16), tmp_path)[0].language == "task 0"


def test_a_data_set_of_dummies_only_is_refused(tmp_path, those):
    black = [forms.Trajectory(t.state, t.action, np.zeros_like(t.frames)) for t in those]
    raw = artifact(forms.lerobot2(tmp_path / "copy", black), tmp_path / "raw")
    with pytest.raises(IntegrityError, match="lists no camera whose clips are there and show anything"):
        source.survey(raw)


def test_depth_maps_are_no_cameras(tmp_path, those):
    copy = forms.lerobot2(tmp_path / "copy", those)
    info = json.loads((copy / lerobot.INFO).read_text())
    depth = {"observation.depth": {"dtype": "video", "shape": [48, 48, 3], "info": {"video.is_depth_map": True}}}
    forms.write(copy / lerobot.INFO, info | {"features": depth | info["features"]})
    assert lerobot.load(copy).cameras() == [forms.CAMERA]


@pytest.mark.parametrize(
    ("splits", "want"),
    [
        ({"train": "0:2", "val": "2:3", "test": "3:4"}, ["train", "train", "val", "test"]),
        ({"train": "0:4", "val": "3:4"}, ["train", "train", "train", "val"]),  # claimed by two: held out
        ({"train": "0:2"}, ["train"] * 4),
        ({"all": "0:4"}, ["train"] * 4),
        ({"val": "0:4"}, ["val"] * 4),
        ({"train": "0:2", "validation": "2:4"}, ["train", "train", "val", "val"]),  # by whatever name: held out
        ({"train": "0:1", "Eval": "1:2", "test_unseen": "2:3", "held-out": "3:4"}, ["train", "val", "test", "val"]),
        ({"training": "0:4", "dev": "0:1", "testing": "0:2"}, ["test", "test", "train", "train"]),
    ],
)
def test_splits_are_those_of_the_data_set(tmp_path, those, splits, want):
    raw = artifact(forms.lerobot2(tmp_path / "copy", those, splits=splits), tmp_path / "raw")
    assert [one.split for one in source.survey(raw)[0]] == want


@pytest.mark.parametrize("version", WRITERS)
def test_the_instruction_comes_from_the_list_or_from_the_tasks(tmp_path, those, version):
    copy = WRITERS[version](tmp_path / "copy", those)
    want = [one.language for one in those]
    for k, listed in enumerate(("names", "numbers", "nothing")):
        lerobot.load.cache_clear()
        if listed != "names":
            numbers = [0, 1, 0, 1]
            tasks = [[one] for one in numbers] if listed == "numbers" else [[] for _ in numbers]
            if version == "v3.0":
                table = pl.read_parquet(copy / LIST3)
                table = table.with_columns(pl.Series("tasks", tasks, dtype=pl.List(pl.Int64)))
                table.write_parquet(copy / LIST3)
            else:
                lengths = [len(one.state) for one in those]
                rows = zip(tasks, lengths, strict=True)
                forms.write(
                    copy / "meta/episodes.jsonl",
                    [{"episode_index": i, "tasks": t, "length": n} for i, (t, n) in enumerate(rows)],
                )
        raw = artifact(copy, tmp_path / f"raw{k}")
        found = [source.frames(raw, one, View(16), tmp_path)[0] for one in source.survey(raw)[0]]
        assert [one.language for one in found] == want
        assert [one.task for one in found] == want


# What is wrong as a whole.


@pytest.mark.parametrize("version", ["v1.6", "v4.0", "v2", "2.1", None, ["v2.1"], "v3.0-rc1\n"])
def test_other_versions_are_refused_by_name(tmp_path, those, version):
    copy = forms.lerobot2(tmp_path, those[:1], codebase_version=version)
    with pytest.raises(IntegrityError, match=r"info.json is of version .*; v2.x and v3.x are read"):
        source.local_files(copy, ALL)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is no JSON"),
        (b"[]", "is no JSON object"),
        (b'{"codebase_version": "v2.1\xff"}', "is no JSON"),
        (b"[" * 10**5, "is no JSON"),
        (b'{"codebase_version": "v2.1", "fps": 0, "features": {}}', "fps is 0"),
        (b'{"codebase_version": "v2.1", "fps": NaN, "features": {}}', "fps is nan"),
        (b'{"codebase_version": "v2.1", "fps": 5, "features": []}', "features is no table"),
        (b'{"codebase_version": "v2.1", "fps": 5, "features": {"a": 1}}', "features is no table"),
        (b'{"codebase_version": "v2.1", "fps": 5, "features": {}}', "episodes.jsonl is not there"),
        (b'{"codebase_version": "v3.0", "fps": 5, "features": {}}', "meta/episodes has no parquet"),
    ],
)
def test_an_info_that_is_none(tmp_path, text, words):
    forms.write(tmp_path / lerobot.INFO, text)
    with pytest.raises(IntegrityError, match=words):
        source.local_files(tmp_path, ALL)


TEMPLATES = [
    "../{episode_index:06d}.parquet",
    "/etc/{episode_index:06d}.parquet",
    "data/../../{episode_index}.parquet",
    "data\\{episode_index}.parquet",
    "{episode_index.__class__}",
    "{episode_index:999999999d}",
    "{episode_index!r}",
    "{nothing}",
    "data/{{}}",
    "data/\x00",
    "",
    None,
    7,
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("key", ["data_path", "video_path"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, those, key, template):
    copy = forms.lerobot2(tmp_path / "copy", those[:2], **{key: template})
    raw = tmp_path / "raw"
    (raw / "lerobot").mkdir(parents=True)
    (raw / "lerobot/all").symlink_to(copy)
    if key == "video_path":
        with pytest.raises(IntegrityError):
            lerobot.load(copy).file(0, forms.CAMERA)
    episodes, dropped = source.survey(raw)
    assert episodes == []
    assert [one.episode_id for one in dropped] == ["episode 0", "episode 1"]
    assert all(key in one.reason for one in dropped)


def test_a_camera_whose_name_leaves_the_folder_is_refused(tmp_path, those):
    copy = forms.lerobot2(tmp_path / "copy", those[:1])
    info = json.loads((copy / lerobot.INFO).read_text())
    info["features"] = {"../../up": {"dtype": "video"}}
    forms.write(copy / lerobot.INFO, info)
    with pytest.raises(IntegrityError, match="leaves its folder"):
        lerobot.load(copy).file(0, "../../up")


@pytest.mark.parametrize("name", ["train", "validation"])
@pytest.mark.parametrize("said", ["0:1:2", "a:b", "-1:3", 3, ["0:3"], None])
def test_a_split_that_is_no_range_is_refused(tmp_path, those, said, name):
    copy = forms.lerobot2(tmp_path, those[:2], splits={name: said})
    with pytest.raises(IntegrityError, match=rf"split {name} is .*, no range"):
        source.local_files(copy, ALL)


# One bad item: it is named, and the others are read.


def others_are_good(raw, scratch, bad, n):
    """Survey and read everything; returns what was said of the bad ones."""
    episodes, dropped = source.survey(raw)
    said = [one.reason for one in dropped]
    for episode in episodes:
        if episode.offset == bad:
            with pytest.raises(IntegrityError) as caught:
                all_frames(raw, episode, scratch)
            said.append(caught.value.cause)
        else:
            all_frames(raw, episode, scratch)
    assert sum(one.offset != bad for one in episodes) == n
    return said


BAD_LINES = [
    (b'{"episode_index": 0, "tasks": ["caf\xe9"], "length": 12}', "is no JSON"),
    (b"{", "is no JSON"),
    (b"7", "is no JSON object"),
    (b'{"episode_index": -1, "tasks": ["a"], "length": 12}', "episode_index is -1"),
    (b'{"episode_index": "0", "tasks": ["a"], "length": 12}', "episode_index is '0'"),
    (b'{"episode_index": true, "tasks": ["a"], "length": 12}', "episode_index is True"),
    (b'{"episode_index": 0, "tasks": ["a"], "length": -12}', "length is -12"),
    (b'{"episode_index": 0, "tasks": ["a"], "length": 0}', "length is 0"),
    (b'{"episode_index": 0, "tasks": ["a"]}', "length is None"),
    (b'{"episode_index": 0, "tasks": ["a"], "length": 11}', "has 12 rows"),
    (b'{"episode_index": 0, "tasks": ["a"], "length": 999999999}', "has 12 rows"),
    (b'{"episode_index": 1, "tasks": ["a"], "length": 9}', "episode 1 is there twice"),
    (b'{"episode_index": 9, "tasks": ["a"], "length": 9}', "has no data/chunk-000/episode_000009.parquet"),
    (b'{"episode_index": 0, "tasks": [5], "length": 12}', "has task 5, which meta/tasks does not list"),
    (b'{"episode_index": 0, "tasks": {}, "length": 12}', ""),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_a_bad_line_of_the_list(tmp_path, those, line, words):
    copy = forms.lerobot2(tmp_path / "copy", those)
    lines = (copy / "meta/episodes.jsonl").read_bytes().splitlines()
    forms.write(copy / "meta/episodes.jsonl", b"\n".join([*lines[1:], line]) + b"\n")
    bad = 9 if b": 9, " in line else 0
    said = others_are_good(artifact(copy, tmp_path / "raw"), tmp_path, bad, len(those) - 1) if words else ["", ""]
    assert [one for one in said if words in one]


def test_a_list_that_is_cut_short_is_told(tmp_path, those):
    copy = forms.lerobot2(tmp_path / "copy", those)
    path = copy / "meta/episodes.jsonl"
    path.write_bytes(b"\n".join(path.read_bytes().splitlines()[:3]))
    said = others_are_good(artifact(copy, tmp_path / "raw"), tmp_path, None, 3)
    assert said == ["3 episodes are listed, info.json counts 4"]


@pytest.mark.parametrize("version", WRITERS)
def test_tasks_that_are_missing_are_named(tmp_path, those, version):
    copy = WRITERS[version](tmp_path / "copy", those)
    if version == "v3.0":
        table = pl.read_parquet(copy / LIST3).drop("tasks")
        table.write_parquet(copy / LIST3)
        (copy / "meta/tasks.parquet").unlink()
    else:
        rows = [{"episode_index": k, "length": len(t.state)} for k, t in enumerate(those)]
        forms.write(copy / "meta/episodes.jsonl", rows)
        (copy / "meta/tasks.jsonl").unlink()
    raw = artifact(copy, tmp_path / "raw")
    with pytest.raises(IntegrityError, match=r"meta/tasks.* is not there"):
        source.frames(raw, source.survey(raw)[0][0], View(16), tmp_path)


RANGES = [
    ("from_timestamp", -1.0, "from_timestamp is -1.0"),
    ("from_timestamp", float("nan"), "from_timestamp is nan"),
    ("from_timestamp", float("inf"), "from_timestamp is inf"),
    ("to_timestamp", -1.0, "to_timestamp is -1.0"),
    ("to_timestamp", 0.0, "has 12 frames in 0 s"),
    ("to_timestamp", 1e9, "has 12 frames in 1e+09 s"),
    ("chunk_index", -1, "chunk_index is -1"),
    ("chunk_index", None, "chunk_index is None"),
    ("file_index", 7, "has no videos/"),
]


@pytest.mark.parametrize(("column", "value", "words"), RANGES)
def test_a_bad_place_in_the_shared_files(tmp_path, those, column, value, words):
    copy = forms.lerobot3(tmp_path / "copy", those)
    name = f"videos/{forms.CAMERA}/{column}"
    table = pl.read_parquet(copy / LIST3)
    values = [value, *table[name].to_list()[1:]]
    table.with_columns(pl.Series(name, values)).write_parquet(copy / LIST3)
    said = others_are_good(artifact(copy, tmp_path / "raw"), tmp_path, 0, len(those) - 1)
    assert len(said) == 1
    assert words in said[0]


def test_an_episode_beyond_its_file(tmp_path, those):
    n = sum(len(t.state) for t in those)
    for k, (first, words) in enumerate(
        ((n, "0 frames decode"), (n - 3, "3 frames decode"), (10**6, "0 frames decode"))
    ):
        copy = forms.lerobot3(tmp_path / f"copy{k}", those)
        table = pl.read_parquet(copy / LIST3)
        for side, at in (("from", first), ("to", first + 12)):
            name = f"videos/{forms.CAMERA}/{side}_timestamp"
            table = table.with_columns(pl.Series(name, [at / 5, *table[name].to_list()[1:]]))
        table.write_parquet(copy / LIST3)
        said = others_are_good(artifact(copy, tmp_path / f"raw{k}"), tmp_path, 0, len(those) - 1)
        assert len(said) == 1
        assert words in said[0]


def test_times_that_lie_between_frames_are_refused(tmp_path, those):
    """A rate that is not the clip's would give other frames than those that were labelled."""
    copy = forms.lerobot3(tmp_path / "copy", those)
    table = pl.read_parquet(copy / LIST3)
    starts = np.cumsum([0, *(len(t.state) for t in those)]) / 10
    for side, times in (("from", starts[:-1]), ("to", starts[1:])):
        table = table.with_columns(pl.Series(f"videos/{forms.CAMERA}/{side}_timestamp", times))
    table.write_parquet(copy / LIST3)
    info = json.loads((copy / lerobot.INFO).read_text())
    forms.write(copy / lerobot.INFO, info | {"fps": 10})
    raw = artifact(copy, tmp_path / "raw")
    with pytest.raises(DecodeError, match="frames late"):
        all_frames(raw, source.survey(raw)[0][0], tmp_path)


def test_a_clip_that_is_longer_or_shorter_than_its_rows(tmp_path, those):
    for k, change in enumerate((those[1], those[2])):
        copy = forms.lerobot2(tmp_path / f"copy{k}", those)
        (copy / CLIP2).write_bytes(clips.encode(change.frames, fps=5))
        said = others_are_good(artifact(copy, tmp_path / f"raw{k}"), tmp_path, 0, len(those) - 1)
        assert ("9 frames decode, the data set promises 12", "14 frames decode, the data set promises 12")[k] in said[0]


@pytest.mark.parametrize("version", WRITERS)
def test_rows_that_are_not_the_frames_each_once(tmp_path, those, version):
    copy = WRITERS[version](tmp_path / "copy", those)
    path = copy / (ROWS3 if version == "v3.0" else ROWS2)
    clean = pl.read_parquet(path)
    first = pl.col("episode_index") == 0
    changes = {
        "short": clean.filter(~first | (pl.col("frame_index") != 5)),
        "twice": clean.with_columns(
            pl.when(first & (pl.col("frame_index") == 5)).then(4).otherwise("frame_index").alias("frame_index")
        ),
        "another": clean.with_columns(pl.when(first).then(77).otherwise("episode_index").alias("episode_index")),
    }
    for name, table in changes.items():
        lerobot._numbers.cache_clear()
        table.write_parquet(path)
        raw = artifact(copy, tmp_path / f"raw-{name}")
        with pytest.raises(MismatchError, match="not its 12 frames, each once"):
            source.frames(raw, source.survey(raw)[0][0], View(16), tmp_path)
        all_frames(raw, source.survey(raw)[0][1], tmp_path)


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "no parquet", "a column less", "words for numbers"])
def test_a_damaged_parquet(tmp_path, those, how):
    copy = forms.lerobot2(tmp_path / "copy", those)
    path = copy / ROWS2
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how in ("a column less", "words for numbers"):
        table = pl.read_parquet(path)
        words = table.with_columns(pl.lit("x").alias("frame_index"))
        (words if how.startswith("words") else table.drop("frame_index")).write_parquet(path)
    else:
        path.write_bytes(
            {"cut": data[: len(data) // 2], "empty": b"", "no parquet": b"PAR1" + bytes(90) + b"PAR1"}[how]
        )
    said = others_are_good(artifact(copy, tmp_path / "raw"), tmp_path, 0, len(those) - 1)
    assert len(said) == 1
    assert ROWS2 in said[0]


def test_flipped_bits_of_a_parquet_are_read_or_refused(tmp_path, those, capfd):
    copy = forms.lerobot2(tmp_path / "copy", those[:1])
    raw = artifact(copy, tmp_path / "raw")
    episode = source.survey(raw)[0][0]
    clean = (copy / ROWS2).read_bytes()
    n_refused = 0
    for at in [*range(0, len(clean), len(clean) // 60), *range(len(clean) - 60, len(clean))]:
        lerobot._numbers.cache_clear()
        (copy / ROWS2).write_bytes(clips.flipped(clean, at, at % 8))
        try:
            source.frames(raw, episode, View(16), tmp_path)
        except IntegrityError as error:
            n_refused += ROWS2 in error.cause
    assert n_refused > 10
    capfd.readouterr()  # polars tells its panics on stderr


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("options", ["", forms.AV1], ids=["h264", "av1"])
def test_a_truncated_clip(tmp_path, those, version, options):
    copy = WRITERS[version](tmp_path / "copy", those, options=f"{options} -movflags +faststart")
    path = copy / (CLIP3 if version == "v3.0" else CLIP2)
    data = path.read_bytes()
    start, end = clips.payload(data)
    for k, size in enumerate((0, 40, start + 10, (start + end) // 2, end - 20)):
        path.write_bytes(data[:size])
        raw = artifact(copy, tmp_path / f"raw{k}")
        episodes = source.survey(raw)[0]
        bad = episodes[-1] if version == "v3.0" else episodes[0]
        with pytest.raises(DecodeError):
            all_frames(raw, bad, tmp_path)
        if version == "v2.1":
            all_frames(raw, episodes[1], tmp_path)


@pytest.mark.parametrize("options", ["", forms.AV1], ids=["h264", "av1"])
def test_flipped_bits_of_a_shared_clip_stay_in_their_episode(tmp_path, those, options):
    """Wherever a bit is flipped in a shared file, all but one of its episodes are read to the bit."""
    copy = forms.lerobot3(tmp_path / "copy", those, options=options)
    raw = artifact(copy, tmp_path / "raw")
    episodes = source.survey(raw)[0]
    want = [all_frames(raw, one, tmp_path) for one in episodes]
    data = (copy / CLIP3).read_bytes()
    start, end = clips.payload(data)
    n_refused = 0
    for at in range(start, end, (end - start) // 25):
        (copy / CLIP3).write_bytes(clips.flipped(data, at, 3))
        good = 0
        for one, clean in zip(episodes, want, strict=True):
            try:
                good += np.array_equal(all_frames(raw, one, tmp_path), clean)
            except DecodeError:
                n_refused += 1
        assert good >= len(episodes) - 1
    assert n_refused > 8


@pytest.mark.parametrize("bad", [None, b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_a_picture_that_is_none(tmp_path, those, bad):
    copy = forms.lerobot3(tmp_path / "copy", those, kind="image")
    table = pl.read_parquet(copy / ROWS3)
    cells = table[forms.CAMERA].to_list()
    cells[5] = {"bytes": bad, "path": "5.png"}
    table.with_columns(pl.Series(forms.CAMERA, cells)).write_parquet(copy / ROWS3)
    said = others_are_good(artifact(copy, tmp_path / "raw"), tmp_path, 0, len(those) - 1)
    assert len(said) == 1
    assert ("rows without a picture" if bad is None else "frame 5 does not decode") in said[0]

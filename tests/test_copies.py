"""`avrl.copies`: a linked folder that changes is another raw artifact, and nothing is made of one that has changed."""

from __future__ import annotations

import os
import shutil
import time

import forms
import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from avrl import copies
from avrl.artifact import verify
from avrl.cache import Cache
from avrl.errors import IntegrityError, NotFoundError
from avrl.stage import run, why
from avrl.stages import fetch
from avrl.stages.prep import STAGE as FRAMES
from avrl.stages.prep import PrepConfig
from avrl.stages.probe import LABELS, LabelsConfig
from avrl_cli import prep as verb

ROWS = "data/chunk-000/file-000.parquet"


@pytest.fixture
def copy(tmp_path):
    return forms.lerobot3(tmp_path / "copy", forms.trajectories((6, 5)), kind="image")


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def asked(copy, source="lerobot"):
    return fetch.settled(fetch.FetchConfig(source=source, origin=str(copy)))


def link(cache, copy, source="lerobot"):
    return run(fetch.STAGE, asked(copy, source), {}, cache)


def turned(copy):
    """Every state the other way round: the file keeps its name and its size, or nearly."""
    table = pl.read_parquet(copy / ROWS)
    table.with_columns(pl.col("observation.state").list.eval(-pl.element())).write_parquet(copy / ROWS)
    later(copy / ROWS)


def later(path):
    """The kernel's clock ticks every few ms, and a test makes and changes a file within one of them."""
    at = time.time_ns() + 10**9
    os.utime(path, ns=(at, at))


def test_a_folder_that_changes_in_place_is_linked_anew_with_a_word(cache, copy, caplog):
    first, _ = link(cache, copy)
    assert link(cache, copy) == (first, True)
    turned(copy)
    (reason,) = why(fetch.STAGE, asked(copy), {}, cache)
    assert reason.startswith("folder: 4 files, ")
    second, hit = link(cache, copy)
    assert not hit
    assert second.digest != first.digest
    assert caplog.messages == [
        f"{copy} has changed since {first.ref} was linked to it: lerobot/all/{ROWS}: it is linked anew"
    ]
    verify(second)
    assert link(cache, copy) == (second, True)


def test_a_file_more_or_less_is_a_change_and_a_hidden_one_is_none(cache, copy, caplog):
    link(cache, copy)
    (copy / ".cache").mkdir()
    (copy / ".cache/lock").touch()
    assert link(cache, copy)[1]
    (copy / "data/chunk-000/file-001.parquet").touch()
    assert not link(cache, copy)[1]
    (copy / "data/chunk-000/file-001.parquet").unlink()
    assert link(cache, copy)[1]  # as it was
    assert "file-001.parquet: it is linked anew" in caplog.text


def test_what_was_only_touched_is_linked_anew_and_is_the_same_to_all_that_follows(cache, copy):
    first, _ = link(cache, copy)
    os.utime(copy / ROWS, ns=(1, 1))
    copies.require_same(first)  # by its content
    second, hit = link(cache, copy)
    assert not hit
    assert second.digest == first.digest


def test_nothing_is_made_of_a_copy_that_has_changed(cache, copy):
    raw, _ = link(cache, copy)
    copies.require_same(raw)
    turned(copy)
    words = rf"{ROWS}; link it as it is now: avrl fetch lerobot --part all --from {copy}"
    with pytest.raises(IntegrityError, match=words):
        run(FRAMES, PrepConfig(image_size=16), {"raw": raw}, cache)
    with pytest.raises(IntegrityError, match=words):
        run(LABELS, LabelsConfig(), {"raw": raw, "frames": raw}, cache)
    shutil.rmtree(copy)  # that is for the source to tell
    copies.require_same(raw)
    with pytest.raises(NotFoundError):
        link(cache, copy)


def test_a_link_of_before_states_were_kept_is_judged_by_what_its_manifest_has(cache, copy):
    raw, _ = run(fetch.STAGE, fetch.FetchConfig(source="lerobot", part=("all",), origin=str(copy)), {}, cache)
    assert copies.STATE not in raw.manifest.config
    copies.require_same(raw)
    assert not link(cache, copy)[1]
    assert copies.outdated(raw, cache)
    turned(copy)
    with pytest.raises(IntegrityError, match=ROWS):
        copies.require_same(raw)


def test_prep_takes_the_one_that_is_not_outdated(cache, copy, monkeypatch):
    app, taken = typer.Typer(), []
    app.command("prep")(verb.command)
    app.callback()(lambda: None)
    monkeypatch.setattr(verb, "_prepare", lambda session, config, raw: taken.append(raw))
    first, _ = link(cache, copy)
    turned(copy)

    def prep(*arguments):
        return CliRunner().invoke(app, ["prep", "lerobot", *arguments, "--cache", str(cache.root)]).exit_code

    assert prep() == 0  # it is the only one: the build refuses it
    second, _ = link(cache, copy)
    assert (copies.outdated(first, cache), copies.outdated(second, cache)) == (True, False)
    assert prep() == prep("--raw", first.ref) == 0
    assert taken == [first, second, first]


def test_a_folder_of_pictures_counts_by_its_own_time_and_is_not_entered(tmp_path, cache):
    copy = forms.raw(tmp_path / "copy", forms.trajectories((6, 5)), name="")
    inside = copy / f"raw/{forms.TASK}/{forms.DATE}/raw/traj_group0/traj0"
    found = copies.listing({"raw/train": copy})
    assert sum(name.endswith(".pkl") for name in found) == 4
    assert [name for name in found if "images" in name] == [
        f"raw/train/{inside.parent.relative_to(copy)}/traj{k}/images0/" for k in (0, 1)
    ]
    raw, _ = link(cache, copy, "bridge")
    (inside / "images0/im_2.jpg").unlink()
    later(inside / "images0")
    assert not link(cache, copy, "bridge")[1]
    with pytest.raises(IntegrityError, match=r"traj0/images0/im_2\.jpg; link it as it is now"):
        copies.require_same(raw)
    np.testing.assert_equal(copies.listing({"x": tmp_path / "nothing"}), {})

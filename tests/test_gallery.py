"""Pictures with frames in them: each dot leads to its own frame, arrows point where places move, nothing is fetched."""

import re
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import polars as pl
import pytest
from PIL import Image
from scored import Training, train

from avrl import drawing, gallery
from avrl.cache import Cache
from avrl.comparison import comparable, read
from avrl.config import Opt
from avrl.errors import IntegrityError
from avrl.stage import Built, Stage, run
from avrl.stills import thumbnail

HOSTILE = '</style><script>alert(1)</script>"'


@pytest.fixture
def points():
    """A map of four vectors, two with pictures."""
    pictures = [thumbnail(np.full((64, 64, 3), level, np.uint8), 16) if level else None for level in (0, 80, 0, 160)]
    table = pl.DataFrame({"episode_index": [0, 0, 1, 1], "frame_index": [0, 5, 0, 7], "task": [HOSTILE, "b"] * 2})
    table = table.with_columns(x=pl.Series([0.0, 1, 2, 3]), y=0.5, readout=pl.lit("cls"))
    return {name: table.with_columns(picture=pl.Series(pictures, dtype=pl.Binary)) for name in ("one", "two")}


def test_each_dot_leads_to_its_frame_and_frames_are_held_once(points):
    shown = gallery.frames(points, "clusters-gap1")
    assert [one.id for one in shown] == ["at-clusters-gap1-0-5", "at-clusters-gap1-1-7"]
    assert all(one.source.startswith("data:image/jpeg;base64,") for one in shown)
    svg = drawing.svg(gallery.draw_maps(points, "clusters-gap1"))
    assert sorted(set(re.findall(r'href="#([^"]+)"', svg))) == [one.id for one in shown]
    assert len(re.findall(r"<a ", svg)) == 2 * 2
    rules = str(gallery.pointing(shown))
    assert all(f'[*|href="#{one.id}"]:hover) #{one.id}' in rules for one in shown)
    assert "<" not in rules


def test_maps_of_before_pictures_were_kept_have_plain_dots(points):
    plain = {name: one.drop("picture") for name, one in points.items()}
    assert gallery.frames(plain, "s") == []
    assert "href" not in drawing.svg(gallery.draw_maps(plain, "s"))


def test_maps_of_before_borrow_the_frames_that_others_kept(points):
    mixed = {"one": points["one"].drop("picture"), "two": points["two"]}
    svg = drawing.svg(gallery.draw_maps(mixed, "s"))
    assert len(re.findall(r"<a ", svg)) == 2 * 2
    assert {one.id for one in gallery.frames(mixed, "s")} == set(re.findall(r'href="#([^"]+)"', svg))


@dataclass(frozen=True, kw_only=True)
class Flow:
    """A scores artifact of flow."""

    encoder: Annotated[str, Opt("Encoder")]
    fingerprint: Annotated[str, Opt("Protocol")] = "f" * 12
    right: Annotated[float, Opt("Predicted motion to the right, px")] = 1.0


def _flow(config, inputs, folder):
    row = {"probe": "flow", "encoder": config.encoder, "checkpoint": "", "init": "pretrained", "readout": "patches"}
    row |= {"pairing": "concat", "target": "dis", "fingerprint": config.fingerprint, "gap": 1, "note": ""}
    row |= {"group": "flow", "dimension": "all", "split": "val", "metric": "epe", "value": 1.0, "low": 0.9, "high": 1.1}
    row |= {"dims": 4, "gap_s": 0.1, "alpha": 1.0, **dict.fromkeys(["n_train", "n_test"], 9)}
    row |= dict.fromkeys(["episodes_train", "episodes_test"], 3)
    motion = {"group": "motion", "dimension": "mean", "metric": "r2"}
    pl.DataFrame([row, row | motion]).write_parquet(folder / "scores.parquet")
    sums = {name: row[name] for name in ("encoder", "checkpoint", "init", "readout", "pairing", "target", "gap")}
    sums |= {"fingerprint": config.fingerprint, "dimension": "all", "episode_index": 0, "seen": True}
    sums |= dict.fromkeys(["n", "sse", "sum_y", "sum_yy"], 1.0)
    pl.DataFrame([sums]).write_parquet(folder / "episodes.parquet")
    truth = np.zeros((14, 14, 2))
    truth[..., 1] = -2  # all of it up
    found = pl.DataFrame({"episode_index": [3], "frame_index": [4], "task": ["t"]}).with_columns(
        picture=pl.Series([thumbnail(np.zeros((64, 64, 3), np.uint8), 16)], dtype=pl.Binary),
        truth=pl.Series([truth.ravel().tolist()]),
        predicted=pl.Series([np.tile([config.right, 0.0], 196).tolist()]),
    )
    found.write_parquet(folder / "examples.parquet")
    return Built({})


FLOW = Stage("scores", 4, Flow, lambda c, _: f"flow-{c.encoder}", _flow)


def test_arrows_point_where_places_move(tmp_path):
    made = [run(FLOW, Flow(encoder=name), {}, Cache(tmp_path))[0] for name in ("dinov2", "clip")]
    (protocol,) = comparable(*read(made))
    rows = gallery.flows(protocol, made)
    arrows = pl.DataFrame([one for one in rows if "label" in one])
    assert arrows["label"].unique(maintain_order=True).to_list() == ["truth", "clip", "dinov2"]
    assert arrows.group_by("label").len()["len"].to_list() == [49] * 3
    assert arrows.filter(label="truth").select("angle", "length").unique().row(0) == (0, 2.0)  # up
    assert arrows.filter(pl.col("label") != "truth").select("angle", "length").unique().row(0) == (90, 1.0)  # right
    for width, columns in ((640, 3), (200, 2)):
        svg = drawing.svg(gallery.draw_flows(rows, width))
        assert svg.count("<image") == 1
        assert svg.count('transform="translate') > 49 * columns
    (made[0].root / "examples.parquet").write_bytes(b"no")
    with pytest.raises(IntegrityError, match="examples"):
        gallery.flows(protocol, made)
    for one in made:
        (one.root / "examples.parquet").unlink()
    assert gallery.flows(protocol, made) == []


def test_the_last_look_of_each_checkpoint_is_shown(tmp_path):
    (one,) = train(Cache(tmp_path), Training())
    assert gallery.looks([one]) == []
    for step, level in ((20, 10), (100, 200)):
        Image.new("RGB", (40, 30), (level, level, level)).save(one.root / f"looks/step-{step:09d}.png")
    ((name, step, source),) = gallery.looks([one])
    assert (name, step) == (one.ref, 100)
    assert source.startswith("data:image/webp;base64,")
    (one.root / "looks/step-000000200.png").write_bytes(b"half")
    with pytest.raises(IntegrityError, match="step-000000200"):
        gallery.looks([one])

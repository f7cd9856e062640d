"""The report of probes that predict no motion: a table, verdicts in words, a map; and motion stays first."""

import re
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import polars as pl
import pytest
from made import features_of, frame_store
from scored import FLOORS, Row
from scored import score as scored

from avrl import clusters, gallery, order, report
from avrl.cache import Cache
from avrl.comparison import comparable, mapped, read
from avrl.config import Opt
from avrl.features import rows_of
from avrl.probes import Given, Task, Who
from avrl.stage import Built, Stage, run
from avrl.store import FrameStore


@dataclass(frozen=True, kw_only=True)
class Probed:
    """One scores artifact of a made encoder."""

    probe: Annotated[str, Opt("Probe")]
    encoder: Annotated[str, Opt("Encoder")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Scores of both probes, of an encoder that knows time and tasks and of one that knows nothing, and of motion."""
    root = tmp_path_factory.mktemp("untargeted")
    frames = frame_store(root / "frames", [7] * 15, splits=["train"] * 10 + ["val"] * 5, seed=6)
    table, _ = rows_of(FrameStore(frames).episodes, 0)
    z = {"knowing": np.eye(5)[table["episode_index"].to_numpy() % 3] * 9}
    z["knowing"][:, 4] = table["frame_index"].to_numpy()
    z["blind"] = np.random.default_rng(0).normal(size=(len(table), 5))

    def build(config, inputs, folder):
        (root / config.probe / config.encoder).mkdir(parents=True)
        features = features_of(root / config.probe / config.encoder, table, {"cls": z[config.encoder]}, paired=False)
        task = Task(probe=config.probe, gap=1, target="", readouts=(), seed=0, resamples=100, data_digests=("f",))
        module = {"order": order, "clusters": clusters}[config.probe]
        return Built(
            module.score(folder, Who(config.encoder, "", "pretrained"), task, Given(frames, features=features))
        )

    stage, cache = Stage("scores", 3, Probed, lambda c, _: f"{c.probe}-{c.encoder}", build), Cache(root / "cache")
    artifacts = [run(stage, Probed(probe=p, encoder=e), {}, cache)[0] for p in ("order", "clusters") for e in z]
    return artifacts, scored(cache, Row(), *FLOORS)


def test_motion_comes_first_and_each_probe_has_its_table_and_its_words(made, tmp_path):
    own, motion = made
    facts = report.write(tmp_path, [*own, *motion], [], 100)
    assert list(facts["protocols"]) == ["bridge-reached-gap3", "order-gap1", "clusters-gap1"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Order told right in at least 90% of pairs, pass: knowing · cls, diff (1.00 [1.00, 1.00])." in page
    assert re.search(r"of pairs, (undecided|fail): blind · cls, diff", page)
    assert "Neighbours tell the task best for knowing · cls: " in page
    assert "are static" in page
    assert "shuffled labels accuracy" in (tmp_path / "main-order-gap1.md").read_text(encoding="utf-8")
    assert (tmp_path / "maps-clusters-gap1.svg").exists()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_a_report_of_these_alone_needs_no_motion(made, tmp_path):
    facts = report.write(tmp_path, made[0], [], 100)
    assert sorted(facts["protocols"]) == ["clusters-gap1", "order-gap1"]
    assert facts["verdicts"] == {"above": 0, "below": 0, "undecided": 0, "not measured": 0}


def test_a_map_is_drawn_of_the_artifact_that_made_it_and_told_apart_without_colour(made):
    protocol = next(one for one in comparable(*read(made[0])) if one.slug == "clusters-gap1")
    points = mapped(protocol, made[0])
    assert list(points) == ["blind · cls", "knowing · cls"]
    assert all(len(one) == 15 * 6 for one in points.values())
    spec = gallery.draw_maps(points, "s")
    shapes = spec["spec"]["encoding"]["shape"]["scale"]
    assert shapes["domain"] == ["task 0", "task 1", "task 2"]
    assert len(set(shapes["range"])) == 3
    one = points["blind · cls"]
    many = {"a": one.with_columns(task=pl.Series([str(n) for n in range(len(one))]))}
    shapes = gallery.draw_maps(many, "s")["spec"]["encoding"]["shape"]["scale"]
    assert shapes["domain"][-1] == gallery.REST
    assert len(set(shapes["range"])) == len(shapes["range"]) == len(gallery.MARKS) + 1

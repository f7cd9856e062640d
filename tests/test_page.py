"""The page: self-contained and escaped; tests/test_browser.py looks at it."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import polars as pl
import pytest
from scored import FLOORS, Row, Training, demo, score, train

from avrl import drawing, pictures, report, tables
from avrl.cache import Cache
from avrl.comparison import comparable, read
from avrl.errors import NotFoundError

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>|a_b%c{로봇}"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of the demo's scores, with a hostile encoder and a second protocol beside them."""
    cache, out = Cache(tmp_path_factory.mktemp("cache")), tmp_path_factory.mktemp("report")
    scores, checkpoints = demo(cache)
    scores += score(cache, Row(encoder=HOSTILE, checkpoint=HOSTILE), Row(fingerprint="b" * 12, gap=5, constant="z"))
    report.write(out, scores, checkpoints, 200)
    return out / "report.html"


class Tags(HTMLParser):
    """What a browser would take for markup."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes = set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs


def test_no_request_and_no_script_even_from_a_hostile_name(page):
    html = page.read_text(encoding="utf-8")
    found = Tags(html)
    assert not found.tags & {"script", "img", "iframe", "object", "embed", "image", "use", "base", "form"}
    names = {name for name, _ in found.attributes}
    assert not names & {"src", "srcset", "data", "poster", "action", "xlink:href", "background"}
    assert not [name for name in names if name.startswith("on")]
    assert all(re.match(r"#|data:,$", value) for name, value in found.attributes if name == "href")
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert "default-src 'none'" in html
    assert "&lt;script&gt;alert(1)" in html
    assert "로봇" in html


def test_ids_are_unique(page):
    ids = re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8"))
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"', page.read_text(encoding="utf-8"))
    assert set(targets) <= set(ids)


def test_answer_first_then_figures_tables_and_provenance(page):
    html = page.read_text(encoding="utf-8")
    order = [
        'class="answer"',
        "<svg",
        'id="main-',
        'id="differences-',
        'id="dimensions-',
        'id="training"',
        'id="protocol"',
        'id="provenance"',
        'id="glossary"',
    ]
    places = [html.index(mark) for mark in order]
    assert places == sorted(places)
    assert "Scores of different protocols never share a table" in html
    assert "z (val, val-seen, val-unseen): the target is constant" in html
    assert "CC BY 4.0 (synthetic)" in html
    assert page.stat().st_size < 5_000_000


def test_every_table_is_there_in_every_format(page):
    names = {one.name for one in page.parent.iterdir()}
    for slug in ("bridge-reached-gap3", "bridge-reached-gap5"):
        for kind in ("main", "differences", "dimensions"):
            assert {f"{kind}-{slug}.{end}" for end in ("md", "csv", "tex")} <= names
        assert {f"forest-{slug}.svg", f"forest-{slug}.png"} <= names
    assert {
        "training.md",
        "training.csv",
        "training.png",
        "meters.png",
        "meters.svg",
        "scores.csv",
        "summary.txt",
    } <= names
    assert (page.parent / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_without_checkpoints_or_trained_rows(tmp_path, out):
    report.write(out, score(Cache(tmp_path), *FLOORS), [], 200)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "No checkpoint in the cache" in html
    assert "No encoder pretrained here has been scored." in html


def test_scores_without_a_protocol_are_refused(tmp_path, out):
    with pytest.raises(NotFoundError, match="protocol"):
        report.write(out, score(Cache(tmp_path), Row(fingerprint="")), [], 200)


def test_a_short_log_draws(tmp_path, out):
    cache = Cache(tmp_path)
    report.write(out, score(cache, Row()), train(cache, Training(steps=1)), 200)


def test_held_out_skill_stands_beside_training_skill_and_ranks_below(tmp_path, out):
    plain, looked = train(Cache(tmp_path), Training(looks=0), Training(objective="videomae"))
    logs = {one.ref: tables.log(one) for one in (plain, looked)}
    assert logs[looked.ref]["step"].to_list() == list(range(1, 501))
    rows = pl.DataFrame(pictures._rows(logs, ("skill", "held_out_skill", "rank_cls")))
    points = rows.filter(quantity="held_out_skill")
    assert points.select("checkpoint", "samples").rows() == [(looked.ref, 24 * step) for step in range(100, 501, 100)]
    end = rows.filter(checkpoint=looked.ref, samples=24 * 500)
    assert end.filter(quantity="skill")["value"].to_list() == end.filter(quantity="held_out_skill")["value"].to_list()
    words = drawing.svg(pictures.meters(logs))
    assert all(title in words for title in pictures.METERS.values())
    report.write(out, score(Cache(tmp_path), Row()), [plain], 200)
    assert not (out / "meters.png").exists()
    assert "Collapse meters of the code" not in (out / "report.html").read_text(encoding="utf-8")


def test_a_forest_of_many_rows_shows_one_readout_an_encoder_and_says_so(tmp_path):
    many = ("cls", "patch-mean", "grid", "m", "p")
    rows = [Row(encoder=f"e{i:02d}", readouts=many, noise=0.4 + i / 50) for i in range(12)]
    rows += [Row(encoder="mean", init="none", readouts=("mean",), pairing="none", noise=1.5)]
    (protocol,) = comparable(*read(score(Cache(tmp_path), *rows)))
    spec = pictures.forest(protocol)
    labels = [one["label"] for one in spec["datasets"]["rows"]]
    assert labels == [f"e{i:02d} · cls" for i in range(12)] + ["mean"]
    assert "13 of 61 rows, one readout an encoder" in drawing.svg(spec)
    shown = pictures.forest(replace(protocol, scores=protocol.scores.filter(pl.col("encoder") < "e06")))
    assert len(shown["datasets"]["rows"]) == 30
    assert "title" not in shown

"""Where a number is from: down to the raw files, with what is gone said by name."""

import json
import shutil
from dataclasses import asdict

import pytest
from descent import Made, family, stage

from avrl.artifact import MANIFEST, digest_of, key_of, load
from avrl.cache import Cache
from avrl.errors import IntegrityError
from avrl.lineage import SAMPLE, Stock, ancestry, chain, document, held, properties, upstream
from avrl.stage import run


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def line(steps):
    return [(step.depth, step.input.role, step.input.ref.split("-")[0], step.above) for step in steps]


def stock(cache):
    return Stock(held(cache)[0])


def forge(root, **changes):
    """Another manifest whose key and digest are right."""
    values = json.loads((root / MANIFEST).read_bytes()) | changes
    inputs = {one["role"]: one["digest"] for one in values["inputs"]}
    values["key"] = key_of(values["stage"], values["version"], values["config"], inputs)
    (root / MANIFEST).write_text(json.dumps(values))


def test_a_number_goes_down_to_raw_and_each_ancestor_stands_in_full_once(cache):
    made = family(cache)
    assert line(chain(made["scores"], stock(cache))) == [
        (0, "", "bridge", False),
        (1, "features", "features", False),
        (2, "checkpoint", "checkpoints", False),
        (3, "frames", "frames", False),
        (4, "raw", "raw", False),
        (2, "frames", "frames", True),
        (1, "frames", "frames", True),
    ]


def test_what_is_gone_is_named_and_never_left_out(cache):
    made = family(cache)
    shutil.rmtree(made["checkpoint"].root)
    steps = chain(made["scores"], stock(cache))
    lost = steps[2]
    assert (lost.input.role, lost.input.ref, lost.input.digest) == (
        "checkpoint",
        made["checkpoint"].ref,
        made["checkpoint"].digest,
    )
    assert lost.artifact is None
    assert lost.again is None
    assert not document(lost)["in_cache"]
    assert [step.input.role for step in steps] == ["", "features", "checkpoint", "frames", "raw", "frames"]


def test_what_was_made_again_with_another_result_is_no_parent(cache):
    old = family(cache)
    shutil.rmtree(old["checkpoint"].root)
    new = family(cache, luck="!")
    assert new["checkpoint"].ref == old["checkpoint"].ref
    found = stock(cache)
    lost = chain(old["scores"], found)[2]
    assert (lost.artifact, lost.again) == (None, new["checkpoint"])
    assert document(lost)["made_again"] == new["checkpoint"].digest
    assert found.children(new["checkpoint"]) == [new["features"]]
    assert {one.ref for one in found.children(new["frames"])} == {
        one.ref for two in (old, new) for name, one in two.items() if name in ("checkpoint", "features", "scores")
    }


def test_same_content_under_another_name_counts(cache):
    made = family(cache)
    shutil.rmtree(made["raw"].root)
    other, _ = run(stage("raw"), Made(text="a.zip b.zip", origin="/elsewhere"), {}, cache)
    assert other.ref != made["raw"].ref
    assert chain(made["scores"], stock(cache))[4].artifact == other


def test_ancestry_lists_each_once_nearest_first(cache):
    made = family(cache)
    found = ancestry([made["scores"], made["checkpoint"]], stock(cache))
    near = [one.manifest.stage for one in found[made["scores"].ref]]
    assert near == ["features", "checkpoints", "frames", "raw"]
    assert [one.manifest.stage for one in found[made["checkpoint"].ref]] == ["frames", "raw"]


def test_a_forged_circle_ends(cache):
    made = family(cache)
    frames = made["frames"]
    back = {"role": "raw", "ref": made["checkpoint"].ref, "digest": made["checkpoint"].digest}
    forge(frames.root, inputs=[back])
    steps = chain(load(frames.root), stock(cache))
    assert [step.above for step in steps] == [False, False, True]


@pytest.mark.parametrize(
    "changes",
    [
        {"facts": []},
        {"packages": None},
        {"seconds": "1"},
        {"licence": {}},
        {"runtime": 3},
        {"inputs": [{"role": "raw", "ref": "x", "digest": ["y"]}]},
        {"files": [{"path": 5, "bytes": 1, "sha256": "x"}]},
    ],
    ids=lambda one: next(iter(one)),
)
def test_a_manifest_of_other_kinds_is_damaged_and_the_rest_is_told(cache, changes):
    made = family(cache)
    root = made["features"].root
    if "files" not in changes:
        forge(root, **changes)
    else:
        (root / MANIFEST).write_text(json.dumps(asdict(made["features"].manifest) | changes))
    with pytest.raises(IntegrityError, match="damaged"):
        load(root)
    found, damaged = held(cache)
    assert list(damaged) == [root.name]
    assert str(root) in damaged[root.name].cause
    assert chain(made["scores"], Stock(found))[1].artifact is None


def test_a_file_of_a_size_in_words_is_damaged(cache):
    made = family(cache)
    files = [asdict(one) | {"bytes": "12"} for one in made["raw"].manifest.files]
    assert digest_of(made["raw"].manifest.files) == made["raw"].digest
    forge(made["raw"].root, files=files)
    with pytest.raises(IntegrityError, match="files is of another kind"):
        load(made["raw"].root)


def test_properties_say_what_the_config_does_not(cache):
    made = family(cache)
    told = properties(made["raw"])
    assert told["config"] == "source=egodex, text=a.zip b.zip"
    assert told["found"] == "files=2"
    assert (told["device"], told["licence"]) == ("cpu", "CC0")
    assert "torch" in told["made with"]
    assert told["from"].startswith("https://")
    assert "from" not in properties(made["frames"])


@pytest.mark.parametrize(
    ("origin", "source", "told"),
    [
        ("sample", "egodex", SAMPLE),
        ("s3://bucket/x/", "egodex", "s3://bucket/x/"),
        ("", "nobody", ""),
        ("", "lerobot", ""),
    ],
)
def test_upstream_is_what_was_asked_or_the_publisher(cache, origin, source, told):
    assert upstream(run(stage("raw"), Made(origin=origin, source=source), {}, cache)[0]) == told


def test_a_store_in_a_bucket_is_found_among_its_copies(cache):
    """`avrl pretrain --frames s3://...` keeps it below ``frames/.s3-...``."""
    made = family(cache)
    away = cache.root / "frames" / ".s3-123456789abc" / made["frames"].ref
    away.parent.mkdir()
    made["frames"].root.rename(away)
    assert chain(made["checkpoint"], stock(cache))[1].artifact.root == away

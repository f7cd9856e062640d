"""References resolve to exactly one artifact, or the candidates are listed."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, Tiny

from avrl.artifact import MANIFEST
from avrl.cache import KEY_LENGTH, Cache, size
from avrl.errors import DiskFullError, IntegrityError, NotFoundError
from avrl.stage import run


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def three(cache):
    """Two artifacts that are called alike and a third."""
    return [run(TINY, config, {}, cache)[0] for config in (Tiny(lines=1), Tiny(lines=2), Tiny(case="upper"))]


def test_the_only_one_needs_no_name(cache):
    only, _ = run(TINY, Tiny(), {}, cache)
    assert cache.resolve("tiny") == only


def test_none_says_how_to_make_it(cache):
    with pytest.raises(NotFoundError) as caught:
        cache.resolve("tiny", what="tiny things", make="avrl tiny", option="--tiny")
    assert str(caught.value) == f"no tiny things in {cache.root}; make it with: avrl tiny"
    assert caught.value.exit_code == 3
    with pytest.raises(NotFoundError, match=f"^no tiny in {cache.root}$"):
        cache.resolve("tiny")


def test_several_are_listed_not_guessed(cache, three):
    with pytest.raises(NotFoundError) as caught:
        cache.resolve("tiny", option="--tiny")
    listed = sorted(one.ref for one in three)
    assert str(caught.value) == f"tiny: 3 fit in {cache.root}: {', '.join(listed)}; name one with: --tiny {listed[0]}"
    with pytest.raises(NotFoundError, match=r"tiny: 2 fit .*; name one of them"):
        cache.resolve("tiny", "tiny-lower")


def test_by_name_beginning_key_and_path(cache, three, monkeypatch):
    one, _, upper = three
    assert cache.resolve("tiny", one.ref) == one
    assert cache.resolve("tiny", one.ref[:-3]) == one
    assert cache.resolve("tiny", "tiny-u") == upper
    assert cache.resolve("tiny", f"tiny-lower@{one.ref[-6:]}") == cache.resolve("tiny", f"tiny@{one.ref[-6:]}") == one
    with pytest.raises(NotFoundError, match="no tiny named 'tiny-upper@"):
        cache.resolve("tiny", f"tiny-upper@{one.ref[-6:]}")
    assert cache.resolve("tiny", one.manifest.key) == one
    assert cache.resolve("tiny", one.manifest.key[:8]) == one
    assert cache.resolve("tiny", str(one.root)) == one
    assert cache.resolve("tiny", f"{one.root}/") == one
    monkeypatch.chdir(cache.root / "tiny")
    assert cache.resolve("tiny", f"./{one.ref}/") == one
    assert cache.resolve("tiny", os.path.relpath(one.root)) == one
    assert Cache(Path("..")).resolve("tiny", str(one.root)).manifest == one.manifest


def test_a_name_that_begins_another_is_itself(cache):
    """Only a whole name wins over what it begins."""
    ones = [run(TINY, Tiny(lines=n), {}, cache)[0] for n in (1, 2)]
    longer = ones[1].root.with_name(ones[0].ref + "-more")
    ones[1].root.rename(longer)
    assert cache.resolve("tiny", ones[0].ref) == ones[0]
    assert cache.resolve("tiny", longer.name).root == longer


def test_a_path_elsewhere_is_not_taken_for_a_name_here(cache, three, tmp_path):
    """The same request in another cache has the same name, but maybe another digest."""
    there, _ = run(TINY, Tiny(lines=1), {}, Cache(tmp_path / "other"))
    assert there.ref == three[0].ref
    for path in (there.root, f"/somewhere/{three[0].ref}"):
        with pytest.raises(NotFoundError, match="no tiny named"):
            cache.resolve("tiny", str(path))


def test_the_condition_narrows(cache, three):
    fits = cache.resolve("tiny", where=lambda one: one.manifest.config["case"] == "upper")
    assert fits == three[2]
    with pytest.raises(NotFoundError, match="no tiny named 'tiny-u'"):
        cache.resolve("tiny", "tiny-u", where=lambda one: one.manifest.config["case"] == "lower")


def test_only_finished_directories_are_artifacts(cache, three):
    (cache.root / "tiny" / ".partial-tiny-lower-0123").mkdir()
    (cache.root / "tiny" / "by-hand").mkdir()
    (cache.root / "tiny" / "notes.txt").write_text("")
    (three[0].root / MANIFEST).unlink()
    assert cache.artifacts("tiny") == sorted(three[1:], key=lambda one: one.ref)
    assert cache.artifacts("nothing") == []
    assert cache.find("tiny", three[0].manifest.key) is None


def test_the_key_finds_whatever_the_directory_is_called(cache, three):
    moved = three[0].root.rename(three[0].root.with_name("my-favourite"))
    assert cache.find("tiny", three[0].manifest.key).root == moved


def test_a_damaged_neighbour_is_named_with_the_cure(cache, three):
    (three[2].root / MANIFEST).write_text("{")
    with pytest.raises(IntegrityError, match=f"rm -r {three[2].root}"):
        cache.artifacts("tiny")


def test_names_in_the_cache(cache):
    key = "0123456789abcdef" * 4
    assert cache.path("tiny", "slug", key) == cache.root / "tiny" / "slug-0123456789ab"
    assert cache.partial("tiny", "slug", key) == cache.root / "tiny" / ".partial-slug-0123456789ab"
    assert KEY_LENGTH == 12


def test_too_small_a_disk_is_refused_early(cache):
    cache.require_space(1, "a byte")
    assert not cache.root.exists()
    with pytest.raises(DiskFullError) as caught:
        cache.require_space(10**18, "an exabyte")
    assert "an exabyte needs 1000000.00 TB, " in str(caught.value)
    assert "--cache DIR" in str(caught.value)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (321_588_941_964, "321.6 GB"), (1.24e13, "12.40 TB")],
)
def test_sizes_are_decimal(n_bytes, text):
    assert size(n_bytes) == text


@settings(deadline=None)
@given(st.integers(0, 10**16))
def test_a_size_is_right_to_its_last_digit(n_bytes):
    number, unit = size(n_bytes).split()
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert abs(float(number) * factor - n_bytes) <= factor * {"B": 0.5, "TB": 0.006}.get(unit, 0.051)

"""Build once, find ever after: killed, crowded, out of space."""

import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from typing import Annotated

import numpy as np
import polars as pl
import pytest
import safetensors.numpy
import tiny
from tiny import FEW, LONG, TINY, Tiny

from avrl.artifact import MANIFEST, SCRATCH, verify
from avrl.cache import Cache
from avrl.config import Opt
from avrl.errors import BusyError, ConfigError, DiskFullError, IntegrityError
from avrl.stage import Built, Stage, run, why


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def script(verb, place, **options):
    command = [sys.executable, tiny.__file__, verb, str(place)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def never(config, inputs, folder):
    raise AssertionError("nothing was to be built")


def works(cache):
    """Names of the files that were written to the end, in order."""
    return (cache.root / "work.log").read_text().split()


def partials(cache):
    return [one for one in (cache.root / "tiny").glob(".partial-*") if one.is_dir()]


# The key.

OTHER = {
    "lines": 4,
    "scale": 1.5,
    "case": "upper",
    "names": ("a",),
    "sizes": (1,),
    "ends": False,
    "limit": 0,
    "workers": 2,
    "device": "cuda",
}


@pytest.mark.parametrize("field", dataclasses.fields(Tiny), ids=lambda one: one.name)
def test_the_key_moves_with_identity_and_not_with_runtime(field):
    other = dataclasses.replace(Tiny(), **{field.name: OTHER[field.name]})
    runtime = field.name in ("workers", "device")
    assert (TINY.key(other, {}) == TINY.key(Tiny(), {})) == runtime


def test_the_key_moves_with_version_name_and_inputs(cache):
    one, _ = run(TINY, Tiny(), {}, cache)
    other, _ = run(TINY, Tiny(lines=1), {}, cache)
    keys = [
        TINY.key(Tiny(), {}),
        dataclasses.replace(TINY, version=2).key(Tiny(), {}),
        dataclasses.replace(TINY, name="tine").key(Tiny(), {}),
        TINY.key(Tiny(), {"raw": one}),
        TINY.key(Tiny(), {"raw": other}),
        TINY.key(Tiny(), {"frames": one}),
        TINY.key(Tiny(), {"frames": one, "raw": other}),
        TINY.key(Tiny(), {"frames": other, "raw": one}),
    ]
    assert len(set(keys)) == len(keys)
    assert TINY.key(Tiny(), {"raw": other, "frames": one}) == keys[6]
    slug = dataclasses.replace(TINY, slug=lambda config, inputs: "other")
    assert slug.key(Tiny(), {}) == keys[0]


def test_the_key_is_of_what_an_input_holds_not_of_what_made_it(cache):
    """A re-trained checkpoint has the same key and another digest: its children are others."""
    words = iter(["first", "second"])

    def chance(config, inputs, folder):
        (folder / "weights").write_text(next(words))
        return Built()

    stage = dataclasses.replace(TINY, build=chance)
    first, _ = run(stage, Tiny(), {}, cache)
    shutil.rmtree(first.root)
    second, _ = run(stage, Tiny(), {}, cache)
    assert (first.manifest.key, first.ref) == (second.manifest.key, second.ref)
    assert TINY.key(Tiny(), {"checkpoint": first}) != TINY.key(Tiny(), {"checkpoint": second})


@pytest.mark.parametrize("names", [("a", "b/c", "d"), ("d", "b/c", "a"), ("b/c", "a", "d")])
def test_the_digest_does_not_hang_on_the_order_of_writing(cache, tmp_path, names):
    straight, _ = run(TINY, Tiny(), {}, cache)
    turned, _ = run(TINY, Tiny(names=names), {}, Cache(tmp_path / "other"))
    assert turned.digest == straight.digest


# Hits.


def test_the_second_run_builds_nothing(cache):
    one, hit = run(TINY, Tiny(), {}, cache)
    assert not hit
    idle = dataclasses.replace(TINY, build=never)
    assert run(idle, Tiny(), {}, cache) == (one, True)
    assert run(idle, Tiny(workers=8, device="cuda"), {}, cache) == (one, True)
    assert works(cache) == ["a", "b/c", "d"]
    assert sorted(path.name for path in (cache.root / "tiny").iterdir()) == [one.ref]


def test_the_manifest_tells_where_it_is_from(cache):
    raw, _ = run(dataclasses.replace(TINY, name="raw"), Tiny(), {}, cache)
    one, _ = run(TINY, Tiny(lines=1, workers=4), {"raw": raw}, cache)
    told = one.manifest
    assert (told.stage, told.version, told.key) == ("tiny", 1, TINY.key(Tiny(lines=1), {"raw": raw}))
    assert told.config["lines"] == 1
    assert told.runtime == {"workers": 4, "device": "cpu"}
    assert [(given.role, given.ref, given.digest) for given in told.inputs] == [("raw", raw.ref, raw.digest)]
    assert [file.path for file in told.files] == ["a", "b/c", "config.json", "d"]
    assert told.facts == {"files": 3}
    assert told.packages["avrl"]
    assert told.seconds >= 0
    verify(one)


def test_licences_are_handed_down_once_each(cache):
    def made(name, lines, **inputs):
        stage = Stage(name, 1, Tiny, lambda config, inputs: name, lambda *_: Built(licence=lines))
        return run(stage, Tiny(), inputs, cache)[0]

    one = made("one", ["EgoDex: CC-BY-NC-ND 4.0"])
    two = made("two", ["Bridge V2: CC BY 4.0"])
    three = made("three", [], raw=one)
    four = made("four", ["own"], a=one, b=two, c=three)
    assert three.manifest.licence == ["EgoDex: CC-BY-NC-ND 4.0"]
    assert four.manifest.licence == ["own", "EgoDex: CC-BY-NC-ND 4.0", "Bridge V2: CC BY 4.0"]


# Why.


def test_why_is_empty_for_a_hit(cache):
    run(TINY, Tiny(), {}, cache)
    assert why(TINY, Tiny(workers=3), {}, cache) == []


def test_why_names_the_changed_field_of_the_nearest(cache):
    assert why(TINY, Tiny(), {}, cache) == ["no tiny in the cache yet"]
    run(TINY, Tiny(), {}, cache)
    run(TINY, Tiny(case="upper", lines=9, sizes=(1,)), {}, cache)
    assert why(TINY, Tiny(lines=5), {}, cache) == ["lines: 3 -> 5"]
    assert why(TINY, Tiny(case="upper", lines=9, sizes=(1, 2)), {}, cache) == ["sizes: [1] -> [1, 2]"]
    other = dataclasses.replace(TINY, slug=lambda config, inputs: "other-lower")
    assert why(other, Tiny(lines=5), {}, cache) == ["none of it yet"]
    assert why(TINY, Tiny(lines=5, ends=False), {}, cache) == ["ends: True -> False", "lines: 3 -> 5"]
    assert why(dataclasses.replace(TINY, version=2), Tiny(), {}, cache) == ["version: 1 -> 2"]


def test_why_names_the_changed_input(cache):
    raws = [run(dataclasses.replace(TINY, name="raw"), Tiny(lines=n), {}, cache)[0] for n in (1, 2)]
    run(TINY, Tiny(), {"raw": raws[0]}, cache)
    digests = [raw.digest[:6] for raw in raws]
    assert why(TINY, Tiny(), {"raw": raws[1]}, cache) == [f"input raw: {digests[0]} -> {digests[1]}"]
    assert why(TINY, Tiny(), {}, cache) == [f"input raw: {digests[0]} -> none"]


def test_why_counts_many_inputs_of_one_role(cache):
    raws = [run(dataclasses.replace(TINY, name="raw"), Tiny(lines=n), {}, cache)[0] for n in range(1, 6)]

    def numbered(*some):
        return {f"scores-{at:02d}": one for at, one in enumerate(some)}

    run(TINY, Tiny(), numbered(raws[4]), cache)
    run(TINY, Tiny(), numbered(*raws[1:3]), cache)
    assert why(TINY, Tiny(), numbered(*raws[:4]), cache) == ["2 more scores"]
    assert why(TINY, Tiny(), numbered(raws[0], raws[2]), cache) == ["1 more score, 1 fewer score"]
    assert why(TINY, Tiny(), numbered(raws[2], raws[1]), cache) == ["scores: in another order"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whose:
    """A request about somebody."""

    encoder: Annotated[str, Opt("Whose")] = ""
    weights: Annotated[str, Opt("Digest")] = ""


def test_why_compares_with_nobody_elses(cache):
    stage = dataclasses.replace(TINY, config=Whose, slug=lambda *_: "it", build=lambda *_: Built())
    run(stage, Whose(encoder="pixels-16"), {}, cache)
    assert why(stage, Whose(encoder="dinov2", weights="a" * 64), {}, cache) == ["none of it yet"]
    assert why(stage, Whose(encoder="pixels-16", weights="a" * 64), {}, cache) == ["weights: none -> aaaaaa"]


def test_why_tells_of_a_beginning(cache):
    def fail(config, inputs, folder):
        (folder / "half").write_text("")
        raise ConfigError("cannot")

    run(TINY, Tiny(lines=1), {}, cache)
    with pytest.raises(ConfigError):
        run(dataclasses.replace(TINY, build=fail), Tiny(), {}, cache)
    assert why(TINY, Tiny(), {}, cache) == ["begun before and not finished: it goes on from there"]
    assert why(TINY, Tiny(lines=2), {}, cache) == ["lines: 1 -> 2"]


def test_nothing_is_made_by_asking(cache):
    why(TINY, Tiny(), {}, cache)
    assert not cache.root.exists()


# Killed.


def test_killed_at_every_step_it_is_partial_or_whole_and_goes_on(tmp_path):
    process = script("crash", tmp_path)
    told, talk = process.communicate()
    assert process.returncode == 0, talk
    steps = " ".join(json.loads(told))
    for step in ("open work.log", "os.rename tiny/.partial", f".{MANIFEST}.", f"os.rmdir tiny/.partial-{FEW_REF}"):
        assert step in steps
    assert f"open tiny/{FEW_REF}/{MANIFEST}" in steps


FEW_REF = f"tiny-lower-{TINY.key(FEW, {})[:12]}"


def test_killed_at_random_moments_it_goes_on_in_the_same_directory(cache, tmp_path):
    whole, _ = run(TINY, LONG, {}, Cache(tmp_path / "whole"))
    kills = 0
    for number in range(40):
        process = script("build", cache.root)
        deadline = time.monotonic() + 60
        done = len(works(cache)) if (cache.root / "work.log").exists() else 0
        # Up to four more files, then some more of a file: never at the same place.
        while process.poll() is None and time.monotonic() < deadline:
            log = cache.root / "work.log"
            if log.exists() and len(works(cache)) >= done + 3:
                break
            time.sleep(0.002)
        time.sleep(0.0023 * (number % 5))
        process.kill()
        process.communicate()
        found = cache.artifacts("tiny")
        if found:
            break
        kills += 1
        assert len(partials(cache)) == 1
        assert why(TINY, LONG, {}, cache) == ["begun before and not finished: it goes on from there"]
    else:
        pytest.fail("it never came through")
    assert kills >= 3
    again, hit = run(TINY, LONG, {}, cache)
    assert hit
    verify(again)
    assert again.digest == whole.digest
    # A file may be begun again, but what has its done-record is not: at most the one that a kill hit is.
    assert len(works(cache)) <= len(LONG.names) + kills
    assert set(works(cache)) == set(LONG.names)


def test_a_build_that_was_killed_while_hashing_keeps_its_scratch(cache, monkeypatch):
    """Hashing 300 GB takes minutes: what the build needs to go on must outlive a kill in them."""

    class Killed(BaseException):
        pass

    def die(root):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["avrl.stage"], "hash_files", die)
        with pytest.raises(Killed):
            run(TINY, Tiny(), {}, cache)
    assert len(list((partials(cache)[0] / SCRATCH).iterdir())) == 3
    run(TINY, Tiny(), {}, cache)
    assert works(cache) == ["a", "b/c", "d"]


def test_a_sealed_directory_is_only_published(cache, monkeypatch):
    class Killed(BaseException):
        pass

    def die(partial, final):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["avrl.stage"], "publish", die)
        with pytest.raises(Killed):
            run(TINY, Tiny(), {}, cache)
    assert cache.artifacts("tiny") == []
    one, hit = run(dataclasses.replace(TINY, build=never), Tiny(), {}, cache)
    assert not hit
    verify(one)
    assert not partials(cache)


def test_a_request_never_goes_on_with_anothers_work(cache):
    def half(config, inputs, folder):
        (folder / "half").write_text("")
        raise ConfigError("cannot")

    with pytest.raises(ConfigError):
        run(dataclasses.replace(TINY, build=half), Tiny(lines=1), {}, cache)
    one, _ = run(TINY, Tiny(lines=2), {}, cache)
    assert not (one.root / "half").exists()
    assert len(partials(cache)) == 1


# In the way.


def test_a_folder_without_a_manifest_is_refused_before_the_work(cache):
    one, _ = run(TINY, Tiny(), {}, cache)
    (one.root / MANIFEST).unlink()
    with pytest.raises(IntegrityError, match=f"{one.root} is in the way .*; remove it with: rm -r {one.root}$"):
        run(dataclasses.replace(TINY, build=never), Tiny(), {}, cache)
    shutil.rmtree(one.root)
    again, hit = run(TINY, Tiny(), {}, cache)
    assert (again.digest, hit) == (one.digest, False)


def test_two_at_once(cache):
    """The second process is told; when the first dies, its lock is gone with it."""
    other = script("hold", cache.root, stdin=subprocess.PIPE)
    assert other.stdout.readline() == "building\n"
    with pytest.raises(BusyError, match=f"another avrl is making {FEW_REF}; wait for it, or stop it") as caught:
        run(TINY, FEW, {}, cache)
    assert caught.value.exit_code == 7
    run(TINY, Tiny(), {}, cache)  # another request is another directory
    other.send_signal(signal.SIGKILL)
    other.communicate()
    lock = next((cache.root / "tiny").glob(".partial-*.lock"))
    assert lock.is_file()
    one, hit = run(TINY, FEW, {}, cache)
    assert not hit
    verify(one)


def test_the_first_of_two_publishes(cache):
    other = script("hold", cache.root, stdin=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(BusyError):
        run(TINY, FEW, {}, cache)
    _, talk = other.communicate("\n")
    assert other.returncode == 0, talk
    _, hit = run(dataclasses.replace(TINY, build=never), FEW, {}, cache)
    assert hit


# Out of space.


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MB, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip(f"needs a small disk, and may not mount one: {made.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


DATA = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8)
WRITERS = {
    "python": lambda path: path.write_bytes(DATA.tobytes()),
    "numpy": lambda path: np.save(path, DATA),
    "polars": lambda path: pl.DataFrame({"a": DATA}).write_parquet(path),
    "safetensors": lambda path: safetensors.numpy.save_file({"a": DATA}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_has_its_own_code_and_the_work_goes_on_when_there_is_room(disk, writer):
    def fill(config, inputs, folder):
        with contextlib.suppress(FileExistsError), (folder / "first").open("x") as file:
            file.write(writer)
        WRITERS[writer](folder / "second.npy")
        return Built()

    cache = Cache(disk / "cache")
    stage = dataclasses.replace(TINY, build=fill)
    with pytest.raises(DiskFullError, match=r"no space left while making tiny-lower in .*: it goes on from") as caught:
        run(stage, Tiny(), {}, cache)
    assert caught.value.exit_code == 6
    assert (partials(cache)[0] / "first").read_text() == writer
    assert cache.artifacts("tiny") == []
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    one, hit = run(stage, Tiny(), {}, cache)
    assert not hit
    verify(one)
    assert not partials(cache)


def test_a_disk_that_fills_up_at_the_manifest(disk):
    def just(config, inputs, folder):
        (folder / "most").write_bytes(b"x" * shutil.disk_usage(folder).free)
        return Built()

    with pytest.raises(DiskFullError):
        run(dataclasses.replace(TINY, build=just), Tiny(), {}, Cache(disk / "cache"))
    assert Cache(disk / "cache").artifacts("tiny") == []
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    one, _ = run(TINY, Tiny(names=()), {}, Cache(disk / "cache"))
    assert [path.name for path in one.root.iterdir() if path.name.startswith(".")] == []


def test_another_error_is_not_taken_for_a_full_disk(cache):
    def fail(config, inputs, folder):
        raise FileNotFoundError(2, "No such file", "x")

    with pytest.raises(FileNotFoundError):
        run(dataclasses.replace(TINY, build=fail), Tiny(), {}, cache)

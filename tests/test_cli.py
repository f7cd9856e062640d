"""The command line as a shell sees it: streams, exit codes, one line an error, the next command to type."""

import errno
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import tiny
import typer
from golden.regen import HELP, VERBS, help_of, page_of
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import avrl_cli.app
from avrl import __version__, errors
from avrl.artifact import MANIFEST, load
from avrl.cache import Cache
from avrl.config import Field, Opt
from avrl.progress import QUIET
from avrl.sources import SAMPLE
from avrl.stages.prep import STAGE as FRAMES
from avrl.stages.prep import PrepConfig
from avrl_cli.errors import explain
from avrl_cli.options import _typed
from avrl_cli.output import Session

AVRL = Path(sys.executable).with_name("avrl")
HEAVY = ("torch", "zarr", "boto3", "polars", "timm", "numpy")
CLEAN = {"PATH": os.environ["PATH"], "PYTHONUTF8": "1", "HOME": "/nonexistent"}


def avrl(*arguments, place, **environment):
    """A real process, in a folder of its own and with nothing of the caller's environment."""
    command = [AVRL, *map(str, arguments)]
    return subprocess.run(command, cwd=place, env=CLEAN | environment, capture_output=True, encoding="utf-8")


def one_line(talk):
    """The only line of what was said, without the name in front."""
    lines = talk.splitlines()
    assert len(lines) == 1, talk
    assert lines[0].startswith("avrl: ")
    return lines[0].removeprefix("avrl: ")


class Said:
    """Exit code and streams of a run inside this process."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def document(self):
        """The one JSON document on stdout: `loads` refuses a second one."""
        return json.loads(self.out)


@pytest.fixture
def inside(monkeypatch, capsys, tmp_path):
    """`main` without a process of its own; it leaves no handler behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AVRL_CACHE", raising=False)
    level = logging.getLogger("avrl").level
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)}

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["avrl", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            avrl_cli.app.main()
        out, err = capsys.readouterr()
        return Said(caught.value.code or 0, out, err)

    kept = logging.root.handlers[:]
    yield call
    logging.root.handlers[:] = kept
    logging.getLogger("avrl").setLevel(level)
    for one, handler in before.items():
        signal.signal(one, handler)
    os.environ.pop(QUIET, None)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A cache in which `avrl prep` has dropped one clip of three, and what that run said."""
    place = tmp_path_factory.mktemp("lab")
    small_part(place / "copy")
    fetched = avrl("fetch", "--part", "1", "--from", "copy", place=place)
    assert fetched.returncode == 0, fetched.stderr
    run = avrl("prep", "--on-error", "drop", "--image-size", "32", "--workers", "1", place=place)
    return place, fetched, run


@pytest.fixture
def raw(lab, tmp_path):
    """The raw data of `lab` in a cache of the test's own, which is the one that a verb takes by itself."""
    shutil.copytree(lab[0] / "cache" / "raw", tmp_path / "cache" / "raw", symlinks=True)
    return Cache(tmp_path / "cache").artifacts("raw")[0]


def small_part(folder):
    """``part1.zip`` of three real clips, one of which has lost its poses."""
    folder.mkdir()
    chosen = ("assemble_ring/0.mp4", "assemble_ring/0.hdf5", "hammer_nail/1.mp4", "hammer_nail/1.hdf5")
    with zipfile.ZipFile(SAMPLE / "egodex" / "sample.zip") as source, zipfile.ZipFile(folder / "part1.zip", "w") as to:
        for name in (*chosen, "hammer_nail/0.mp4"):
            to.writestr(f"part1/{name}", source.read(f"sample/{name}"))


# Several tasks in one run.


def test_one_failure_of_many_is_told_at_once_and_the_first_ones_code_ends_the_run(capsys, tmp_path):
    session, went_on = Session("probe", tmp_path, json=True), []
    for what, error in (("a", errors.IntegrityError("x is damaged")), ("b", None), ("c", errors.ConfigError("no y"))):
        with session.attempt(what):
            if error:
                raise error
            went_on.append(what)
    assert went_on == ["b"]
    assert capsys.readouterr().err == "avrl: a: x is damaged\navrl: c: no y\n"
    with pytest.raises(typer.Exit) as caught:
        session.close()
    document = json.loads(capsys.readouterr().out)
    assert caught.value.exit_code == document["exit_code"] == 8
    assert [one["what"] for one in document["failures"]] == ["a", "c"]


@pytest.mark.parametrize(
    "error", [errors.DiskFullError("full"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), SystemExit(143)]
)
def test_a_full_disk_or_a_signal_ends_all(tmp_path, error):
    session = Session("probe", tmp_path)
    with pytest.raises(type(error)), session.attempt("a"):
        raise error
    assert not session.failures


# Help, version, completion.


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_the_golden_one(verb):
    """`make golden` writes it anew."""
    assert help_of(verb) == page_of(verb).read_text(encoding="utf-8")


def test_there_is_a_golden_page_for_every_verb():
    app = avrl_cli.app.app
    listed = [one.name for one in app.registered_commands]
    for group in app.registered_groups:
        listed += [group.name, *(f"{group.name} {one.name}" for one in group.typer_instance.registered_commands)]
    assert ("avrl", *listed) == VERBS
    assert set(HELP.glob("*.txt")) == {page_of(verb) for verb in VERBS}


@pytest.mark.parametrize("verb", VERBS)
def test_help_loads_nothing_heavy(verb):
    code = f"""if True:
        import sys
        from avrl_cli.app import main
        sys.argv = {["avrl", *verb.removeprefix("avrl").split(), "--help"]!r}
        try:
            main()
        finally:
            print(*(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.split()) == (0, [])


def test_help_comes_at_once(tmp_path):
    """CPU time, the best of some: the machine may be busy."""

    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(5):
        before = spent()
        assert avrl("--help", place=tmp_path).returncode == 0
        times.append(spent() - before)
    assert min(times) <= 1  # .24; with torch it would be several


def test_version(tmp_path):
    done = avrl("--version", place=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"avrl {__version__}\n", "")


@pytest.mark.parametrize(
    ("shell", "mark"), [("bash", "complete -o default"), ("zsh", "compdef"), ("fish", "complete --command avrl")]
)
def test_completion_scripts(tmp_path, shell, mark):
    done = avrl(place=tmp_path, _AVRL_COMPLETE=f"source_{shell}")
    assert (done.returncode, done.stderr) == (0, "")
    assert mark in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["avrl", "pr"], ["prep", "pretrain", "probe"]),
        (["avrl", "pretrain", ""], ["two-stream", "single-stream", "videomae"]),
        (["avrl", "prep", "--on-error", ""], ["fail", "drop"]),
        (["avrl", "prep", "--im"], ["--image-size"]),
    ],
)
def test_completion_knows_verbs_options_and_choices(tmp_path, words, found):
    asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1), "_AVRL_COMPLETE": "complete_bash"}
    assert avrl(place=tmp_path, **asked).stdout.split() == found


# Errors: one line, the right code, the next command.


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--nope", "No such option: --nope; see: avrl --help"),
        ("nope", "No such command 'nope'; see: avrl --help"),
        ("prep --nope", "No such option: --nope .*; see: avrl prep --help"),
        ("prep --image-siz 3", "No such option: --image-siz .*--image-size.*; see: avrl prep --help"),
        ("prep --image-size big", "Invalid value for '--image-size': .*; see: avrl prep --help"),
        ("prep --image-size", "Option '--image-size' requires an argument; see: avrl --help"),
        ("pretrain videomae --lr nan", "lr=nan is not a finite number"),
        ("prep --image-size 17", "--image-size 17 is not a multiple of 16 px; try 224"),
        ("prep --on-error maybe", "Invalid value for '--on-error': .*'fail', 'drop'; see: avrl prep --help"),
        ("prep nope", "no source named 'nope'; known: egodex, bridge, lerobot, sample"),
        ("fetch nope", "no source named 'nope'; known: egodex, bridge, lerobot, sample"),
        ("fetch --part 9", "egodex has no part '9'; known: 1, 2, .*"),
        ("fetch encoders", "encoders and --encoder go together; type: avrl fetch encoders --encoder dinov2"),
        ("pretrain", "Missing argument 'objective'.*; see: avrl pretrain --help"),
        ("pretrain nope", "Invalid value for 'objective': .*'two-stream'.*; see: avrl pretrain --help"),
        ("pretrain videomae --ablate m-only", "--ablate m-only has no meaning for videomae; leave it at none"),
        ("pretrain two-stream --epochs 0", "--epochs 0 is less than 1"),
        ("probe bridge", "probe needs an encoder; type: avrl probe bridge --encoder dinov2"),
        (
            "probe bridge --encoder pixels-8,random",
            r"probe needs an encoder \(pixels-8, random: scored along with any\); type: avrl probe bridge .*",
        ),
        ("probe bridge --encoder nope", "no encoder or checkpoint named 'nope'; known: dinov2, .*"),
        (
            "probe bridge --encoder DINOv2",
            "no encoder or checkpoint named 'DINOv2'; did you mean dinov2, .*: avrl fetch encoders --dry-run",
        ),
        ("probe bridge --encoder two-strem", r".* 'two-strem'; did you mean two-stream\? all: .*"),
        ("fetch encoders --encoder dino2", "no encoder named 'dino2'; did you mean dinov2, .* all: .*"),
        ("fetch encoders --encoder pixels-8", "pixels-8 has no weights: there is nothing to fetch; it is scored .*"),
        ("probe bridge --encoder r3m --gap x", "gap: 'x' is not a list of int"),
        ("report extra", r"No such command 'extra'; see: avrl report --help"),
        ("report cache extra", r"Got unexpected extra argument.* \(extra\); see: avrl report cache --help"),
    ],
)
def test_a_slip_of_the_tongue(inside, arguments, line):
    said = inside(*arguments.split())
    assert re.fullmatch(line, one_line(said.err)), said.err
    assert (said.code, said.out) == (2, "")


def test_no_verb_at_all_shows_the_help(inside):
    said = inside()
    assert said.code == 2
    assert "Usage: avrl" in said.out
    assert one_line(said.err) == "no command given; see: avrl --help"


@pytest.mark.parametrize(
    ("arguments", "next_command"),
    [
        ("prep", "avrl fetch egodex"),
        ("prep bridge", "avrl fetch bridge"),
        ("prep sample", "avrl fetch sample"),
        ("pretrain two-stream", "avrl prep"),
        ("probe bridge --encoder two-stream", "avrl pretrain two-stream"),
        ("probe bridge --encoder dinov2", "avrl prep bridge"),
        ("report", "avrl probe bridge --encoder dinov2"),
    ],
)
def test_what_is_not_there_yet_names_the_verb_that_makes_it(inside, arguments, next_command):
    said = inside(*arguments.split())
    assert one_line(said.err).endswith(f": {next_command}")
    assert "cache" in said.err
    assert (said.code, said.out) == (3, "")
    assert not Path("cache").exists()
    known = CliRunner().invoke(avrl_cli.app.app, [*next_command.split()[1:], "--help"])
    assert known.exit_code == 0


@pytest.mark.parametrize("arguments", ["prep --nope", "prep", "prep --image-size 17", "probe bridge --encoder nope"])
def test_json_is_one_document_for_errors_too(inside, arguments):
    plain, said = inside(*arguments.split()), inside(*arguments.split(), "--json")
    line = one_line(said.err)
    assert plain.err == said.err
    assert said.code == plain.code
    assert said.document == {"error": line, "kind": said.document["kind"], "exit_code": said.code}


def test_the_same_holds_for_a_real_process(tmp_path):
    done = avrl("prep", "--json", place=tmp_path)
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"] == one_line(done.stderr)
    done = avrl("prep", "--nope", place=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr)


def test_a_cache_that_cannot_be_written_is_named(inside, tmp_path):
    (tmp_path / "file").write_text("")
    said = inside("fetch", "sample", "--quiet", "--cache", "file/cache")
    assert said.code == 2
    assert re.fullmatch("file/cache.*: Not a directory; .* --cache DIR", one_line(said.err))


CODES = {
    errors.ConfigError("x"): 2,
    errors.NotFoundError("x"): 3,
    errors.TemporaryError("x"): 5,
    errors.DiskFullError("x"): 6,
    OSError(28, "No space left on device", "x"): 6,
    errors.BusyError("x"): 7,
    errors.IntegrityError("x"): 8,
    errors.DecodeError("x", 3, "bad\nblock"): 8,
    errors.DivergedError("x"): 9,
    errors.MissingError("x"): 11,
    ModuleNotFoundError("x", name="zarr"): 11,
    PermissionError(13, "Permission denied", "x"): 2,
    type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.\nTried"): 2,
    KeyboardInterrupt(): 130,
    SystemExit(143): 143,
    ZeroDivisionError("x"): 1,
    errors.AvrlError("x"): 1,
}


@pytest.mark.parametrize("error", CODES, ids=repr)
def test_every_error_has_its_code_and_one_line(error):
    code, line = explain(error)
    assert code == CODES[error]
    assert line
    assert "\n" not in line


@given(st.text(), st.text(st.characters(exclude_categories=["C", "Z"])))
@settings(max_examples=40, deadline=None)
def test_a_cause_of_many_lines_is_told_in_one(cause, next_step):
    line = str(errors.AvrlError(cause, next_step))
    assert len(line.splitlines()) <= 1
    assert line.endswith(next_step)


# A bug.

BUG = """if True:
    import dataclasses, sys
    import avrl_cli.prep
    from avrl_cli.app import main

    def build(config, inputs, folder):
        return 1 / 0

    avrl_cli.prep.STAGE = dataclasses.replace(avrl_cli.prep.STAGE, build=build)
    sys.argv = ["avrl", *sys.argv[1:]]
    main()
"""


def with_bug(place, *arguments):
    command = [sys.executable, "-c", BUG, "prep", "--image-size", "48", *arguments]
    return subprocess.run(command, cwd=place, env=CLEAN, capture_output=True, encoding="utf-8")


def test_a_bug_is_told_in_one_line(lab):
    done = with_bug(lab[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"bug: ZeroDivisionError: .* at .*:\d+; run it again with --debug .*", one_line(done.stderr))


def test_debug_shows_where(lab):
    done = with_bug(lab[0], "--debug", "--json")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "in build" in done.stderr
    assert json.loads(done.stdout)["kind"] == "ZeroDivisionError"


def test_debug_shows_where_a_user_error_is_from(inside):
    said = inside("prep", "--debug")
    assert said.code == 3
    assert "Traceback" in said.err
    assert said.err.splitlines()[-1].startswith("avrl: no raw data of egodex")


# What a verb says, and where.


def test_stdout_is_paths_and_nothing_else(lab):
    place, fetched, prepped = lab
    for done, noun in ((fetched, "raw"), (prepped, "frames")):
        (path,) = done.stdout.splitlines()
        assert load(place / path).manifest.stage == noun
    assert "EgoDex: CC-BY-NC-ND 4.0" in fetched.stderr


def test_what_was_dropped_is_named_and_has_its_own_code(lab):
    place, _, done = lab
    assert done.returncode == 4
    artifact = load(place / done.stdout.strip())
    assert artifact.manifest.facts["dropped"] == 1
    assert artifact.manifest.facts["episodes"] == 2
    import polars as pl

    (row,) = pl.read_parquet(artifact.root / "dropped.parquet").to_dicts()
    assert (row["episode_id"], row["reason"]) == ("part1/hammer_nail/0", "has no .hdf5 beside it")
    assert (row["kind"], row["episode_index"]) == ("unpaired", -1)


def test_without_drop_it_is_an_error(inside, raw):
    said = inside("prep", "--image-size", "32")
    assert (said.code, said.out) == (8, "")
    assert re.search(r"part1/hammer_nail/0 has no \.hdf5 .*--on-error drop$", one_line(said.err))


DONE = ("prep", "--on-error", "drop", "--image-size", "32")


def test_the_second_run_is_a_hit(inside, lab):
    place, _, first = lab
    said = inside(*DONE, "--workers", "7", "--cache", place / "cache")
    assert said.code == 0
    assert said.out.strip() == str(place / first.stdout.strip())
    assert re.fullmatch(r"frames/egodex-part1-32px-\w{12}: nothing to do\n", said.err)


def test_json_is_one_document(inside, lab):
    said = inside(*DONE, "--json", "--cache", lab[0] / "cache")
    assert said.code == 0
    head = {key: value for key, value in said.document.items() if key != "artifacts"}
    assert head == {"verb": "prep", "dry_run": False, "exit_code": 0}
    (one,) = said.document["artifacts"]
    manifest = load(Path(one["path"])).manifest
    assert (one["stage"], one["hit"], one["key"], one["digest"]) == ("frames", True, manifest.key, manifest.digest)
    assert one["facts"] == manifest.facts


def test_json_tells_the_code_of_a_run_that_dropped(tmp_path, raw):
    done = avrl(*DONE, "--quality", "80", "--workers", "1", "--json", place=tmp_path)
    assert done.returncode == json.loads(done.stdout)["exit_code"] == 4


def test_quiet_is_silent(inside, lab):
    said = inside(*DONE, "--quiet", "--cache", lab[0] / "cache")
    assert (said.code, said.err) == (0, "")
    assert said.out.strip()
    said = inside("prep", "-q", "--cache", "nowhere")
    one_line(said.err)  # an error is still told


def test_the_cache_may_come_from_the_environment(inside, lab, monkeypatch):
    monkeypatch.setenv("AVRL_CACHE", str(lab[0] / "cache"))
    assert inside(*DONE).code == 0
    assert inside(*DONE, "--cache", "elsewhere").code == 3


# A dry run.


def test_a_dry_run_says_hit(inside, lab):
    said = inside(*DONE, "--dry-run", "--cache", lab[0] / "cache")
    assert (said.code, said.out, said.err) == (0, "", "hit  frames/egodex-part1-32px\n")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--quality", "80"], "quality: 90 -> 80"),
        (["--image-size", "64"], "image_size: 32 -> 64"),
        (["--on-error", "fail"], "on_error: drop -> fail"),
    ],
)
def test_a_dry_run_says_why_it_misses(inside, lab, more, why):
    command = (*DONE, *more, "--dry-run", "--cache", lab[0] / "cache")
    said = inside(*command)
    first, second = said.err.splitlines()
    assert re.fullmatch(f"miss frames/egodex-part1-(32|64)px: {why}", first)
    assert re.search(r"a store of .* free: it fits", second)
    assert (said.code, said.out) == (0, "")
    (one,) = inside(*command, "--json").document["artifacts"]
    assert (one["hit"], one["why"]) == (False, [why])


def test_a_dry_run_makes_nothing(inside):
    said = inside("fetch", "sample", "--dry-run", "--json")
    assert said.document["dry_run"]
    assert [one["slug"] for one in said.document["artifacts"]] == ["egodex-sample", "bridge-sample"]
    assert "nothing copied" in said.err
    assert not Path("cache").exists()


def half_done(raw, config):
    """The directory in which an earlier `avrl prep` was stopped."""
    inputs, cache = {"raw": raw}, Cache(raw.root.parent.parent)
    partial = cache.partial("frames", FRAMES.slug(config, inputs), FRAMES.key(config, inputs))
    partial.mkdir(parents=True)
    return partial


def test_a_dry_run_of_something_begun(inside, raw):
    half_done(raw, PrepConfig(image_size=32))
    said = inside("prep", "--image-size", "32", "--dry-run")
    assert "begun before and not finished: it goes on from there" in said.err


# --like.


def test_like_takes_what_was_not_typed(inside, lab):
    place, _, done = lab
    like = ("--like", place / done.stdout.strip())
    asked = ("prep", *like, "--dry-run", "--cache", place / "cache")
    assert inside(*asked).err.startswith("hit ")
    said = inside(*asked, "--quality", "80")
    assert "miss frames/egodex-part1-32px: quality: 90 -> 80" in said.err
    said = inside(*asked, "--image-size", "224", "--on-error", "fail")  # typed, though it is the default
    assert "image_size: 32 -> 224; on_error: drop -> fail" in said.err


def test_like_refuses_what_is_no_manifest_of_this_verb(inside, lab, tmp_path):
    place, fetched, _ = lab
    said = inside("prep", "--like", place / fetched.stdout.strip())
    assert (said.code, said.out) == (2, "")
    assert "no artifact of this verb" in one_line(said.err)
    (tmp_path / "mine").mkdir()
    for name in ("mine", "nowhere"):
        said = inside("prep", "--like", name)
        assert said.code == 3
        assert "rm -r" not in one_line(said.err)


# Options from a config.


@pytest.mark.parametrize(
    ("kind", "typed", "meant"),
    [
        (tuple[str, ...], ["1,test"], ["1", "test"]),
        (tuple[str, ...], ["1", "test, 2"], ["1", "test", "2"]),
        (tuple[int, ...], ["1,3", "10"], [1, 3, 10]),
        (tuple[int, ...], [], []),
        (tuple[str, ...], [","], []),
        (int, 3, 3),
        (str, "a,b", "a,b"),
    ],
)
def test_lists_may_be_repeated_or_comma_separated(kind, typed, meant):
    assert _typed(Field("some", kind, None, Opt("help")), typed) == meant


# Disks, signals and neighbours.


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=320k", "none", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip(f"needs a small disk, and may not mount one: {made.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(raw, disk):
    """Two clips at 96 px are larger than this disk; with more room, the same command goes on."""
    asked = ("prep", "--on-error", "drop", "--image-size", "96", "--workers", "1")
    shutil.copytree(raw.root.parent, disk / "cache" / "raw", symlinks=True)
    done = avrl(*asked, place=disk)
    assert (done.returncode, done.stdout) == (6, "")
    assert "no space left" in one_line(done.stderr)
    (partial,) = [one for one in (disk / "cache" / "frames").iterdir() if one.is_dir()]
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    done = avrl(*asked, place=disk)
    assert done.returncode == 4, done.stderr
    assert not partial.exists()


def begun(place, *arguments):
    """A real `avrl prep` of the sample that has decoded some episodes, in a process group of its own."""
    fetched = avrl("fetch", "sample", place=place)
    assert fetched.returncode == 0, fetched.stderr
    command = [AVRL, "prep", "sample", "--workers", "1", *arguments]
    process = subprocess.Popen(
        command,
        cwd=place,
        env=CLEAN,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(place.glob("cache/frames/.partial-*/scratch/*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_control_c(tmp_path):
    """A terminal sends it to every process of the group."""
    process = begun(tmp_path, "--json")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert one_line(err) == "interrupted; the same command goes on from here"
    assert json.loads(out)["exit_code"] == 130
    assert list(tmp_path.glob("cache/frames/.partial-*/scratch/*.json"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_schedulers_word_to_stop(signum, tmp_path):
    process = begun(tmp_path)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert one_line(err) == "stopped by a signal; the same command goes on from here"
    assert list(tmp_path.glob("cache/frames/.partial-*/scratch/*.json"))


def test_busy(inside, raw):
    """Another process holds the lock of the directory that this run wants."""
    lock = f"{half_done(raw, PrepConfig())}.lock"
    code = f"import fcntl; f = open({lock!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        said = inside("prep")
        other.communicate(b"\n")
    assert said.code == 7
    assert re.fullmatch(r"another avrl is making egodex-part1-224px-\w+; wait for it, or stop it", one_line(said.err))


def test_a_damaged_manifest_is_told_with_the_cure(inside, raw):
    (raw.root / MANIFEST).write_text("{")
    said = inside("prep")
    assert (said.code, said.out) == (8, "")
    assert one_line(said.err).endswith(f"; remove it with: rm -r cache/raw/{raw.ref}")


def test_a_garbled_zip(inside, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "part1.zip").write_bytes(b"PK no zip at all")
    said = inside("fetch", "-q", "--from", "copy")
    assert said.code == 8
    assert "part1.zip is cut short or damaged" in one_line(said.err)


def test_the_library_needs_no_command_line():
    """The tests' own stage runs without one: `tiny` imports no Typer."""
    code = f"import runpy, sys; runpy.run_path({tiny.__file__!r}); sys.exit('typer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

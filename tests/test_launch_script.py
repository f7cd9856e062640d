"""Launch scripts: what bash and YAML make of them is exactly the run that was asked for."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Annotated

import pytest
import ranked
import typer
import yaml
from typer.testing import CliRunner

import avrl_cli.app
from avrl import __version__
from avrl.errors import VERDICT, IntegrityError, TemporaryError
from avrl.ranks import Stopped
from avrl.stages.pretrain import PretrainConfig
from avrl_cli.errors import end
from avrl_cli.options import verb

TYPED = ["two-stream", "--gpus", "4", "--workers=3", "--epochs", "7", "--size", "small"]
# Commands that a script calls, put in front of the real ones: they tell their words and how they end.
TOLD = """#!/bin/sh
{ printf '%s\\0' "$(basename "$0")" "$AVRL_CACHE" "$PWD" "$@"; printf '\\n'; } >> "$TOLD"
[ -z "$SAID" ] || echo "$SAID" > "$AVRL_VERDICT"
[ "$(basename "$0")" = scontrol ] || exit "${CODE:-0}"
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder and a cache with odd names; frames are in it."""
    place = tmp_path / "a b'c"
    place.mkdir()
    monkeypatch.chdir(place)
    artifact = ranked.frames_artifact(place / "my $cache")
    return place, artifact


@pytest.fixture
def asked(lab, monkeypatch, capsys):
    """What `avrl pretrain ... --launch-script` prints; nothing may be built."""

    def ask(kind, *words, code=0):
        line = ["avrl", "pretrain", *words, "--launch-script", kind, "--cache", "my $cache"]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as caught:
            avrl_cli.app.main()
        said = capsys.readouterr()
        assert (caught.value.code or 0) == code, said.err
        assert [one.name for one in Path("my $cache").iterdir()] == ["frames"]
        return said.out or said.err

    return ask


def run(script, tmp_path, shell=("bash",), **environment):
    """Run a script with stand-ins for the commands of a cluster: their names, cache, folder and words, and its code."""
    tools = tmp_path / "tools"
    shutil.rmtree(tools, ignore_errors=True)
    tools.mkdir()
    for name in ("srun", "avrl", "scontrol"):
        (tools / name).write_text(TOLD)
        (tools / name).chmod(0o755)
    told = tools / "told"
    settled = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path), "TOLD": str(told), "SLURM_JOB_ID": "17"}
    done = subprocess.run([*shell, "-c", script], env=settled | environment, capture_output=True, text=True)
    assert done.stderr == ""
    return [line.split("\0")[:-1] for line in told.read_text().splitlines()], done.returncode


def understood(words):
    """The config that the command line makes of the words after ``avrl pretrain``."""
    found = []

    @verb(PretrainConfig)
    def command(session, config, objective: Annotated[str, typer.Argument()], frames: str = "") -> None:
        found.append((objective, frames, config))

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return found[0]


def options(script):
    """The #SBATCH lines, all of which stand before the first command."""
    head, _, body = script.partition("\n\n")
    assert "#SBATCH" not in body
    lines = [line.removeprefix("#SBATCH --") for line in head.splitlines() if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r"[a-z-]+(=\S+)?", line) for line in lines)
    return dict(line.partition("=")[::2] for line in lines)


def test_slurm_runs_a_task_a_gpu_with_the_words_that_were_typed(lab, asked, tmp_path):
    place, _ = lab
    script = asked("slurm", *TYPED)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert script.startswith("#!/bin/bash\n")
    told = options(script)
    assert re.fullmatch(r"\d+:00:00", told.pop("time"))
    assert told == {
        "job-name": "avrl-two-stream-small",
        "ntasks": "4",
        "cpus-per-task": "4",
        "gpus-per-task": "1",
        "mem-per-cpu": "2048M",
        "signal": "USR1@120",
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.out",
    }
    (call,), code = run(script, tmp_path)
    assert code == 0
    assert call[:3] == ["srun", str(place / "my $cache"), str(place)]
    at = call.index("avrl")
    assert call[3:at] == ["--kill-on-bad-exit=1", "--wait=0", "--cpus-per-task=4", "--gpu-bind=none"]
    assert call[at + 1 :] == ["pretrain", *TYPED]
    assert understood(call[at + 2 :]) == understood(TYPED)
    assert understood(TYPED)[2] == PretrainConfig(gpus=4, workers=3, epochs=7, size="small")


@pytest.mark.parametrize("word", ["a b", "it's", '"x"', "$HOME", "`id`", "a;b|c&d", "*", "\\", "é #1", "--gpus=9"])
@pytest.mark.parametrize("kind", ["slurm", "skypilot"])
def test_odd_words_come_through_a_shell_as_they_are(kind, word, lab, tmp_path):
    from avrl.launch_script import SCRIPTS, Launch

    place, _ = lab
    script = SCRIPTS[kind](Launch("n", ["pretrain", word, "-q"], 1, 1, True, place, place, None, 0.0))
    (call,), _ = run(script if kind == "slurm" else yaml.safe_load(script)["run"], tmp_path)
    assert call[-3:] == ["pretrain", word, "-q"]


@pytest.mark.parametrize(
    ("ended", "count", "again"),
    [(0, 0, False), (143, 99, True), (138, 0, False), (5, 0, True), (5, 10, False), (9, 0, False), (2, 0, False)],
)
def test_a_stopped_job_queues_again_and_a_hopeless_one_does_not(ended, count, again, asked, tmp_path):
    calls, code = run(asked("slurm", *TYPED), tmp_path, CODE=str(ended), SLURM_RESTART_COUNT=str(count))
    assert code == ended
    assert [call[3:] for call in calls[1:]] == [["requeue", "17"]] * again


def test_what_failed_for_good_is_told_though_srun_tells_of_those_that_it_killed_then(asked, lab, tmp_path):
    """Ranks that wait for a lost one in NCCL hear no signal: 137 is srun's code then, which would be tried again."""
    place = lab[0] / "my $cache"
    calls, code = run(asked("slurm", *TYPED), tmp_path, CODE="137", SAID="8")
    assert (len(calls), code) == (1, 8)
    assert [one.name for one in place.iterdir()] == ["frames"]


@pytest.mark.parametrize(
    ("error", "said"), [(IntegrityError("bad frame"), "8"), (TemporaryError("a rank died"), None), (Stopped(143), None)]
)
def test_only_what_another_try_cannot_cure_is_a_verdict(error, said, tmp_path, monkeypatch):
    monkeypatch.setenv(VERDICT, str(tmp_path / "verdict"))
    end(error, [])
    assert (tmp_path / "verdict").exists() == bool(said)
    assert not said or (tmp_path / "verdict").read_text() == said


def test_an_old_verdict_is_not_this_turns(asked, lab, tmp_path):
    script = asked("slurm", *TYPED)
    (lab[0] / "my $cache/.slurm-17").write_text("8")
    assert run(script, tmp_path)[1] == 0


def test_skypilot_gets_no_machine_for_one_that_powers_itself_off(asked, tmp_path):
    task = yaml.safe_load(asked("skypilot", *TYPED, "--sync", "s3://lab/runs", "--shutdown"))
    (call,), _ = run(task["run"], tmp_path)
    assert call[4:-2] == [*TYPED, "--sync", "s3://lab/runs"]  # the last two are the frames
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [5, 143]}  # what the notice ends with


def test_skypilot_copies_the_frames_to_a_spot_machine(lab, asked, tmp_path):
    _, artifact = lab
    task = yaml.safe_load(asked("skypilot", *TYPED, "--frames", "egodex-made"))
    del task["setup"], task["workdir"]
    (call,), code = run(task.pop("run"), tmp_path)
    assert task == {
        "name": "avrl-two-stream-small",
        "resources": {"accelerators": "A10G:4", "cpus": "16+", "memory": "32+", "disk_size": 100, "use_spot": True}
        | {"job_recovery": {"recover_on_exit_codes": [5, 143]}},
        "file_mounts": {f"~/avrl-cache/frames/{artifact.ref}": str(artifact.root.resolve())},
    }
    assert call[:2] == ["avrl", str(tmp_path / "avrl-cache")]
    assert understood(call[4:]) == (*understood(TYPED)[:1], artifact.ref, understood(TYPED)[2])
    assert code == 0


def task_from(source, lab):
    from avrl.launch_script import Launch, skypilot

    task = yaml.safe_load(skypilot(Launch("n", ["pretrain"], 1, 1, True, lab, lab, None, 0.0, source)))
    for name in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[name], text=True, check=True)
    return task


def test_skypilot_brings_the_avrl_that_is_here(lab, asked, tmp_path):
    root = Path(__file__).parents[1]
    task = yaml.safe_load(asked("skypilot", *TYPED))
    assert task["workdir"] == str(root)
    assert task["setup"].endswith("\n~/avrl-env/bin/pip install .\n")
    wanted = tomllib.loads((root / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f"--python {wanted.removeprefix('>=')} " in task["setup"]
    assert tomllib.loads((root / "pyproject.toml").read_text())["project"]["name"] == "avrl"

    wheel = tmp_path / "avrl-1.0-py3-none-any.whl"
    wheel.touch()
    task = task_from(wheel, tmp_path)
    assert task["file_mounts"] == {f"~/{wheel.name}": str(wheel)}
    assert task["setup"].endswith(f"/pip install ~/{wheel.name}\n")

    task = task_from(None, tmp_path)
    assert task["setup"].endswith(f"/pip install avrl=={__version__}\n")
    assert {"workdir", "file_mounts"}.isdisjoint(task)


@pytest.mark.parametrize(("noted", "found"), [("{url}", True), ("{url}.gone", False), ("https://x/y.whl", False)])
def test_where_avrl_comes_from_is_what_pip_has_noted(noted, found, tmp_path, monkeypatch):
    """A copy of avrl as a wheel leaves it, asked for its source."""
    site, wheel = tmp_path / "site", tmp_path / "a b.whl"
    wheel.touch()
    shutil.copytree(Path(avrl_cli.app.__file__).parents[1] / "avrl", site / "avrl", ignore=lambda *_: ["sample"])
    (site / "avrl-1.dist-info").mkdir()
    (site / "avrl-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: avrl\nVersion: 1\n")
    note = json.dumps({"url": noted.format(url=wheel.as_uri())})
    (site / "avrl-1.dist-info/direct_url.json").write_text(note)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from avrl.launch_script import source; print(source())"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(wheel if found else None)


def test_without_a_gpu_none_is_asked_for(asked, tmp_path):
    words = ("videomae", "--device", "cpu", "--size", "tiny")
    script = asked("slurm", *words)
    assert "gpus-per-task" not in options(script)
    assert "--gpu-bind=none" not in run(script, tmp_path)[0][0]
    assert set(yaml.safe_load(asked("skypilot", *words))["resources"]) == {
        "cpus",
        "memory",
        "disk_size",
        "use_spot",
        "job_recovery",
    }


def test_json_holds_the_script(asked):
    document = json.loads(asked("slurm", *TYPED, "--json"))
    assert options(document["launch_script"])["ntasks"] == "4"
    assert document["artifacts"] == []


@pytest.mark.parametrize(
    ("words", "line", "code"),
    [
        (["--like", "x"], "--like names a folder", 2),
        (["--frames", "no\nname"], "no frames of egodex named", 3),
        (["--batch-size", "7", "--gpus", "2"], "does not divide among 2 GPUs", 2),
    ],
)
def test_what_cannot_run_there_is_refused_here(words, line, code, lab, asked, tmp_path):
    if words[0] == "--like":
        shutil.copytree(checkpoint(tmp_path), "x")
    assert line in asked("skypilot", "two-stream", *words, code=code)


def checkpoint(tmp_path):
    """The manifest of a pretrained encoder, without one."""
    from dataclasses import replace

    from avrl.cache import Cache
    from avrl.stage import Built
    from avrl.stage import run as build
    from avrl.stages.pretrain import STAGE

    made = replace(STAGE, slug=lambda config, inputs: "x", build=lambda config, inputs, out: Built())
    return build(made, PretrainConfig(), {}, Cache(tmp_path / "other"))[0].root


def test_a_name_of_two_lines_is_refused(lab):
    from avrl.errors import ConfigError
    from avrl.launch_script import Launch, slurm

    place, _ = lab
    with pytest.raises(ConfigError, match="cannot hold"):
        slurm(Launch("n", ["pretrain", "a\nrm -r /"], 1, 1, True, place, place, None, 0.0))

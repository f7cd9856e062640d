"""The smallest stage there can be. As a script: processes that build it, hold it, or are killed while they do.

python tiny.py build CACHE    slowly, so that there is time to kill it
python tiny.py hold CACHE     says "building" and waits for a line
python tiny.py crash FOLDER   killed at every step that touches the cache, once each; prints the steps as JSON
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from avrl.artifact import SCRATCH, verify, write_durably
from avrl.cache import Cache
from avrl.config import Opt
from avrl.stage import Built, Stage, run


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """One field of each kind."""

    lines: Annotated[int, Opt("Lines a file", unit="lines")] = 3
    scale: Annotated[float, Opt("Factor")] = 1.0
    case: Annotated[Literal["lower", "upper"], Opt("Spelling")] = "lower"
    names: Annotated[tuple[str, ...], Opt("Files")] = ("a", "b/c", "d")
    sizes: Annotated[tuple[int, ...], Opt("Numbers")] = ()
    ends: Annotated[bool, Opt("Newline at the end")] = True
    limit: Annotated[int | None, Opt("Most lines")] = None
    workers: Annotated[int, Opt("Processes", runtime=True)] = 1
    device: Annotated[str, Opt("Where it runs", runtime=True)] = "cpu"


def build(config, inputs, folder, pause=0.0):
    """Write each file in lines, then its done-record; what has a done-record is kept. Work is told in work.log."""
    (folder / SCRATCH).mkdir(exist_ok=True)
    for name in config.names:
        done = folder / SCRATCH / name.replace("/", "-")
        if done.exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("w") as file:
            for number in range(config.lines):
                file.write(f"{name} {number}\n")
                time.sleep(pause)
        with (folder.parent.parent / "work.log").open("a") as log:  # first: a kill between the two must not lose it
            log.write(f"{name}\n")
        write_durably(done, b"")
    write_durably(folder / "config.json", b"{}")
    return Built({"files": len(config.names)}, ["Tiny: CC0"])


TINY = Stage("tiny", 1, Tiny, lambda config, inputs: f"tiny-{config.case}", build)
FEW = Tiny(lines=2, names=("a", "b/c"))
LONG = Tiny(names=tuple(f"{n // 4}/{n}" for n in range(20)))


def slow(pause):
    """The same stage, taking its time over each line."""
    return replace(TINY, build=lambda config, inputs, folder: build(config, inputs, folder, pause))


def _hold(config, inputs, folder):
    print("building", flush=True)
    sys.stdin.readline()
    return build(config, inputs, folder)


STEPS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def _kill_at(step, root):
    """SIGKILL this process just before the given one of its steps below a folder."""
    count = 0

    def hook(event, args):
        nonlocal count
        if event in STEPS and str(args[0]).startswith(str(root)):
            count += 1
            if count == step:
                (root.parent / "last").write_text(f"{event} {Path(str(args[0])).relative_to(root)}")
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _partials(cache):
    return [one for one in (cache.root / "tiny").glob(".partial-*") if one.is_dir()]


def crash(folder):
    """Kill a build at its 1st, 2nd, ... step until it comes through; after each kill look, build again, look."""
    whole, _ = run(TINY, FEW, {}, Cache(folder / "whole"))
    listed = sorted(path.relative_to(whole.root) for path in whole.root.rglob("*"))
    points = []
    for step in range(1, 1000):
        cache = Cache(folder / f"{step:03d}")
        child = os.fork()
        if not child:
            _kill_at(step, cache.root)
            run(TINY, FEW, {}, cache)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return points
        points.append((folder / "last").read_text())
        found = cache.artifacts("tiny")
        for one in found:
            verify(one)
        assert len(found) + len(_partials(cache)) <= 1, points[-1]
        again, hit = run(TINY, FEW, {}, cache)
        assert hit == bool(found), points[-1]
        assert again.digest == whole.digest, points[-1]
        assert sorted(path.relative_to(again.root) for path in again.root.rglob("*")) == listed, points[-1]
        assert not _partials(cache), points[-1]
    raise AssertionError("it never came through")


if __name__ == "__main__":
    verb, place = sys.argv[1], Path(sys.argv[2])
    if verb == "build":
        run(slow(0.004), LONG, {}, Cache(place))
    elif verb == "hold":
        run(replace(TINY, build=_hold), FEW, {}, Cache(place))
    elif verb == "crash":
        print(json.dumps(crash(place)))

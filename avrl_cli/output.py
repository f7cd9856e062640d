"""What a verb says, and where: results on stdout, talk on stderr, one JSON document with ``--json``."""

from __future__ import annotations

import json as jsonlib
import logging
import os
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from avrl.cache import Cache, size
from avrl.errors import NotFoundError
from avrl.progress import QUIET, bar
from avrl.stage import run, why
from avrl_cli.errors import DISK_FULL, explain

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from avrl.artifact import Artifact
    from avrl.stage import Inputs, Stage


DROPPED = 4  # exit code: finished, some inputs dropped by name


def set_up_talk(argv: list[str]) -> None:
    """Send the library's log to stderr at the level that -v and -q ask for; progress bars only on a TTY."""
    quiet, verbose = {"-q", "--quiet"} & set(argv), {"-v", "--verbose"} & set(argv)
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("avrl").setLevel(level)
    if quiet:
        os.environ[QUIET] = "1"


def printable(text: str) -> str:
    """A name from outside as one line that cannot drive the terminal: no control or format characters."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


@dataclass
class Session:
    """One run of one verb: its options, its cache, and what it has to say."""

    verb: str
    cache: Path
    dry_run: bool = False
    json: bool = False
    quiet: bool = False
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    document: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    listing: bool = True  # at its end, paths of what was made; not where a document was told on stdout

    @property
    def store(self) -> Cache:
        """The cache that this run reads and writes."""
        return Cache(self.cache)

    def run(
        self, stage: Stage, config: object, inputs: Inputs, expect: str = "", *, wait_s: float = 0.0
    ) -> Artifact | None:
        """Run a stage, or with ``--dry-run`` say what it would do. None: a dry run whose artifact is missing.

        Args:
            stage: What to run.
            config: Its options.
            inputs: Role -> artifact.
            expect: For a dry run: counts, bytes and time of a miss, where they are known beforehand.
            wait_s: How long to wait for another process that is making it.
        """
        slug = stage.slug(config, inputs)
        if self.dry_run:
            reasons = why(stage, config, inputs, self.store)
            found = self.store.find(stage.name, stage.key(config, inputs))
            plan = {"stage": stage.name, "slug": slug, "hit": found is not None, "why": reasons, "expect": expect}
            self.artifacts.append(plan)
            verdict = "hit " if found else "miss"
            self.say(f"{verdict} {stage.name}/{slug}" + (f": {'; '.join(reasons)}" if reasons else ""))
            if expect and not found:
                self.say(f"     {expect}")
            return found
        artifact, hit = run(stage, config, inputs, self.store, wait_s=wait_s)
        self.artifacts.append(
            {
                "stage": stage.name,
                "ref": artifact.ref,
                "path": str(artifact.root),
                "key": artifact.manifest.key,
                "digest": artifact.digest,
                "hit": hit,
                "bytes": artifact.bytes,
                "seconds": artifact.manifest.seconds,
                "facts": artifact.manifest.facts,
            }
        )
        done = "nothing to do" if hit else f"{size(artifact.bytes)} in {artifact.manifest.seconds:.1f} s"
        self.say(f"{stage.name}/{artifact.ref}: {done}")
        return artifact

    def mirror(self, artifact: Artifact | None, url: str) -> None:
        """Copy a finished artifact to a bucket, if one was named and this is no dry run."""
        if artifact and url and not self.dry_run:
            from avrl.mirror import upload

            with bar("mirror", artifact.bytes, "B", unit_scale=True) as shown:
                place = upload(artifact.manifest.files, artifact.root, url, progress=shown.update)
            self.artifacts[-1]["mirror"] = place
            self.say(f"mirrored to {place}")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """One of several tasks that do not need each other: its error is told at once, and `close` ends with the first.

        A signal ends all of them, and so does a full disk.
        """
        try:
            yield
        except Exception as error:
            code, line = explain(error)
            if code == DISK_FULL:
                raise
            if "--debug" in sys.argv:
                traceback.print_exception(error)
            print(f"avrl: {what}: {line}", file=sys.stderr, flush=True)
            self.failures.append({"what": what, "error": line, "kind": type(error).__name__, "exit_code": code})

    def missing(self, stage: str, why: str) -> None:
        """Dry run only: a stage that cannot be keyed yet because its input is still to be made."""
        if not self.dry_run:
            raise NotFoundError(f"no {stage}: {why}")
        self.artifacts.append({"stage": stage, "hit": False, "why": [why]})
        self.say(f"miss {stage}: {why}")

    def say(self, text: str) -> None:
        """Talk: to stderr, unless ``--quiet``."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """A result: to stdout, unless ``--json`` keeps stdout for its one document."""
        if not self.json:
            print(text)

    def _dropped(self) -> int:
        return sum(one.get("facts", {}).get("dropped", 0) for one in self.artifacts if not one["hit"])

    def close(self) -> None:
        """End the run: the JSON document, or the paths of what was made, so that shells compose."""
        code = self.failures[0]["exit_code"] if self.failures else DROPPED if self._dropped() else 0
        if self.json:
            head = {"verb": self.verb, "dry_run": self.dry_run, "exit_code": code}
            failed = {"failures": self.failures} if self.failures else {}
            print(jsonlib.dumps({**head, **self.document, **failed, "artifacts": self.artifacts}, indent=1))
        elif self.listing and not self.dry_run:
            for one in self.artifacts:
                print(one["path"])
        if code:
            raise typer.Exit(code)

"""Write this folder's golden files anew (``make golden``); the diff is the review."""

import os
import subprocess
import sys
from pathlib import Path

HELP = Path(__file__).parent / "help"
VERBS = ("avrl", "fetch", "prep", "pretrain", "probe", "report", "report cache")


def page_of(verb):
    """Its golden file."""
    return HELP / f"{verb.replace(' ', '-')}.txt"


def help_of(verb):
    """The help page of a verb, or of ``avrl`` itself: 100 columns, no colour, nothing of the caller's terminal."""
    # UTF-8 whatever the locale is, for the frames around the options.
    clean = {"PATH": os.environ["PATH"], "COLUMNS": "100", "NO_COLOR": "1", "PYTHONUTF8": "1"}
    command = [Path(sys.executable).with_name("avrl"), *verb.removeprefix("avrl").split(), "--help"]
    done = subprocess.run(command, env=clean, capture_output=True, encoding="utf-8", check=True)
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines()) + "\n"


if __name__ == "__main__":
    HELP.mkdir(exist_ok=True)
    for name in VERBS:
        page_of(name).write_text(help_of(name), encoding="utf-8")

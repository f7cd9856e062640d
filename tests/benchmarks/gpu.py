"""What only a GPU can show, in one run of some minutes: steps and utilisation by model, size, batch and compiler.

    python -m tests.benchmarks.gpu [--seconds 420] [--out gpu.md]

A row is `tests.benchmarks.step`; last comes the extraction of features (`tests.benchmarks.encode`). Rows come in the
order of their weight, each written as soon as it is known: what the time does not allow for is missing at the end.
Then the tests that need a GPU: ``pytest -m gpu``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.step import GOALS, measure, recipe

# The plan's model and batch first, a batch that fills the GPU, its rivals; then the same without the compiler.
ROWS = [
    ("two-stream", "base", 24, False),
    ("two-stream", "base", 24, True),
    ("two-stream", "base", 96, True),
    ("two-stream", "base", 96, False),
    ("single-stream", "base", 96, True),
    ("videomae", "base", 96, True),
    ("two-stream", "small", 96, True),
    ("two-stream", "small", 96, False),
    ("videomae", "small", 96, True),
]
SHARE = "model_flop_utilisation"
TITLES = ["bare seconds", *GOALS, "train samples_per_second", f"bare {SHARE}", f"train {SHARE}"]
ENCODERS = (["--encoder", "dinov2", "--frames", "8192", "--batch", "256"], ["--encoder", "r3m", "--frames", "8192"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420, help="begin no row after so many")
    parser.add_argument("--out", type=Path, default=Path("gpu.md"))
    parser.add_argument("--size", help="this size for all rows, and few steps: to try the script where there is no GPU")
    given = parser.parse_args()
    until, on_gpu = time.monotonic() + given.seconds, torch.cuda.is_available()
    steps, workers = (60, 8) if on_gpu else (3, 2)

    def say(line: str) -> None:
        print(line, flush=True)
        with given.out.open("a") as file:
            file.write(line + "\n")

    say(f"{torch.cuda.get_device_name() if on_gpu else 'cpu'}, torch {torch.__version__}")
    say("| " + " | ".join(["model", "size", "batch", "blocks", *TITLES]) + " |")
    say("|---" * (4 + len(TITLES)) + "|")
    for model, size, batch, compiled in ROWS:
        if time.monotonic() > until:
            say(f"no time was left for {model} {size}, batch {batch}")
            continue
        size, batch = (given.size, 4) if given.size else (size, batch)
        asked = recipe(model, size, 224, batch, steps, workers, "auto", compiled)
        try:
            found = measure(asked, steps, 3 if on_gpu else 1)
            cells = [f"{found[one]:.4g}" if one in found else "-" for one in TITLES]
        except Exception as error:  # a row that fails must not cost the others
            cells = [" ".join(f"{type(error).__name__}: {error}".split())[:120]]
        say("| " + " | ".join([model, size, str(batch), "compiled" if compiled else "eager", *cells]) + " |")
    for words in ENCODERS:
        if on_gpu and time.monotonic() < until:
            done = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.encode", *words], capture_output=True, text=True, check=False
            )
            say(f"extraction, {' '.join(words)}:\n{done.stdout}{done.stderr[-500:] if done.returncode else ''}")


if __name__ == "__main__":
    main()

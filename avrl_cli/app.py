"""The ``avrl`` command: five verbs in the order of the data's way."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from avrl import __version__
from avrl_cli import fetch, prep, pretrain, probe, report
from avrl_cli.errors import INTERRUPTED, SIGNALLED, TERMINATED, end, let_go
from avrl_cli.options import Command, Group
from avrl_cli.output import set_up_talk

app = typer.Typer(
    name="avrl",
    help="From egocentric video to a trustworthy action-probing table, in five commands.",
    epilog="fetch, prep, pretrain, probe, report: each finds what the one before it made.",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for module in (fetch, prep, pretrain, probe):
    app.command(module.NAME, cls=Command)(module.command)
app.add_typer(report.app, name=report.NAME)


def _version(asked: bool) -> None:
    if asked:
        print(f"avrl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _terminate(signum: int, frame: object) -> None:
    raise SystemExit(TERMINATED)


def main() -> None:
    """Run the command line and exit with the code that the outcome has."""
    for one in (signal.SIGTERM, signal.SIGUSR1):  # the second is Slurm's warning
        signal.signal(one, _terminate)
    argv = sys.argv[1:]
    set_up_talk(argv)
    try:
        code = app(prog_name="avrl", standalone_mode=False)
        sys.stdout.flush()  # what cannot be written is told here, and not after the end
    except SystemExit as error:
        if isinstance(error.code, int) and error.code > SIGNALLED:
            sys.exit(end(error, argv))
        raise
    except BrokenPipeError:  # whoever reads has seen enough, as with what Typer itself writes
        let_go()
        sys.exit(1)
    except BaseException as error:
        sys.exit(end(error, argv))
    if code == INTERRUPTED:  # Typer has caught the KeyboardInterrupt and turned it into this code
        sys.exit(end(KeyboardInterrupt(), argv))
    sys.exit(code if isinstance(code, int) else 0)

"""Where the ``avrl`` command begins: Control-C has its line and its exit code while the modules are still loading."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Load the command line and run it."""
    try:
        from avrl_cli import app

        app.main()
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only cut the line short
        from avrl_cli.errors import end

        sys.exit(end(error, sys.argv[1:]))


if __name__ == "__main__":
    main()

"""The command ``modelcache``, also as ``python -m modelcache``: the command line, run in this process."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from . import _native


def main() -> NoReturn:
    """Run the command line with the arguments of this process, and exit with its exit code."""
    # The command line has its own handlers, and the programs that it starts expect the defaults. Python changes these
    # two signals. SIGINT stays ignored in a background job.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    sys.exit(_native.run_command(["modelcache", *sys.argv[1:]]))


if __name__ == "__main__":
    main()

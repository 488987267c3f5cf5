"""Pass the log records of the native module to ``logging``, to loggers below ``modelcache``."""

from __future__ import annotations

import logging
import traceback

from . import _native

_LOGGER = logging.getLogger("modelcache")


def level() -> int:
    """Return the lowest level to record: the effective level of the logger, at most 255 to fit into one byte."""
    return min(_LOGGER.getEffectiveLevel(), 255)


def forward_records() -> None:
    """Pass the queued records to their loggers.

    If a handler raises an exception, it is printed. The call that passes the records does not fail.
    """
    for level, logger, text in _native.take_records():
        try:
            logging.getLogger(logger).log(level, "%s", text)
        except Exception:
            traceback.print_exc()

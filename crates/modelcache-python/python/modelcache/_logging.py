"""Pass the log records of the native module to ``logging``, to loggers below ``modelcache``."""

from __future__ import annotations

import logging
import traceback

from . import _native

_LOGGER = logging.getLogger("modelcache")


def level() -> int:
    """Return the lowest level to record: the effective level of the logger, at most 255 to fit into one byte."""
    return min(_LOGGER.getEffectiveLevel(), 255)


def hand_over() -> None:
    """Pass the queued records to their loggers.

    An exception in a handler is printed. It does not make the call fail during which the records are passed on.
    """
    for level, logger, text in _native.take_records():
        try:
            logging.getLogger(logger).log(level, "%s", text)
        except Exception:
            traceback.print_exc()

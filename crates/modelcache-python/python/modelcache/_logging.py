"""Where the native half's log goes: loggers below ``modelcache``, so that ``logging`` decides what is seen."""

from __future__ import annotations

import logging
import traceback

from . import _native

_LOGGER = logging.getLogger("modelcache")


def level() -> int:
    """The lowest level that is wanted; at most 255."""
    return min(_LOGGER.getEffectiveLevel(), 255)


def hand_over() -> None:
    """Hands the records that wait to their loggers. A handler that raises fails no call."""
    for level, logger, text in _native.take_records():
        try:
            logging.getLogger(logger).log(level, "%s", text)
        except Exception:
            traceback.print_exc()

"""Where the native half's log goes: loggers below ``modelcache``, so that ``logging`` decides what is seen."""

from __future__ import annotations

import logging

_LOGGER = logging.getLogger("modelcache")


def level() -> int:
    """The lowest level that is wanted; at most 255."""
    return min(_LOGGER.getEffectiveLevel(), 255)


def emit(level: int, logger: str, text: str) -> None:
    """Hands one record to its logger."""
    logging.getLogger(logger).log(level, "%s", text)

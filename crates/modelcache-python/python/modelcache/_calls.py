"""Waiting for calls of the native module: on a thread or in an event loop. No wait holds the interpreter's lock."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable
from typing import Any, Protocol, cast

from . import _logging
from ._native import Call
from ._reports import Progress

_PROGRESS_SECONDS = 0.1
"""Interval of progress reports in an event loop."""


class TqdmLike(Protocol):
    """The part of the interface of a ``tqdm`` progress bar that this package uses."""

    total: float | None
    n: float

    def refresh(self) -> object: ...
    def close(self) -> object: ...


ProgressArgument = Callable[[Progress], object] | Callable[..., TqdmLike]
"""A function that is called with a :class:`Progress`, or a progress bar class such as ``tqdm.tqdm``."""


class _Reporter:
    """Passes progress to a function or to a progress bar.

    :param progress: the ``progress`` argument of the call.
    :param label: the description of the progress bar.
    """

    def __init__(self, progress: ProgressArgument | None, label: str) -> None:
        self._function: Callable[[Progress], object] | None = None
        self._bar: TqdmLike | None = None
        if progress is not None and inspect.isclass(progress) and hasattr(progress, "update"):
            make = cast("Callable[..., TqdmLike]", progress)
            self._bar = make(total=None, desc=label, unit="B", unit_scale=True)
        elif progress is not None:
            self._function = cast("Callable[[Progress], object]", progress)

    def __call__(self, phase: str, done: int, total: int, remote: int, origin: int) -> None:
        """Report the fields of ``Call.snapshot``."""
        if self._function is not None:
            self._function(Progress(phase, done, total or None, remote, origin))
        elif self._bar is not None and total:
            self._bar.total, self._bar.n = total, min(done, total)
            self._bar.refresh()

    def end(self, call: Call) -> None:
        """Report the final progress of a successful call."""
        if self._function is not None:
            self(*call.snapshot())
        elif self._bar is not None and self._bar.total:
            # The last phase may count other bytes. The bar ends full in any case.
            self._bar.n = self._bar.total
            self._bar.refresh()

    def close(self) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()


def wait(call: Call, progress: ProgressArgument | None = None, label: str = "") -> Any:
    """Wait for a call on the current thread and return its answer.

    The callbacks, that is ``progress`` and logging handlers, may use the cache. The call continues meanwhile.

    :raises ModelCacheError: the call failed.
    :raises KeyboardInterrupt: Ctrl-C was pressed. The call is cancelled.
    """
    if progress is None:
        return _answer(call, None)
    reporter = _Reporter(progress, label)
    try:
        answer = _answer(call, reporter)
        reporter.end(call)
        return answer
    finally:
        reporter.close()


def _answer(call: Call, reporter: _Reporter | None) -> Any:
    try:
        # `wait` returns to Python ten times a second. Signal handlers run then.
        while (answer := call.wait()) is None:
            _logging.hand_over()
            if reporter is not None:
                reporter(*call.snapshot())
        return answer
    except BaseException:
        # Ctrl-C, or an exception raised by a signal handler or by `progress`.
        call.cancel()
        raise
    finally:
        _logging.hand_over()


async def awaited(call: Call, progress: ProgressArgument | None = None, label: str = "") -> Any:
    """Wait for a call in the running event loop and return its answer.

    Cancelling the task cancels the call. A download that other callers wait for continues.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(answer: Any, error: BaseException | None) -> None:
        # The task may have been cancelled in the meantime.
        if not future.done():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(answer)

    def done(answer: Any, error: BaseException | None) -> None:
        # Runs on a dispatcher thread of the native module.
        with contextlib.suppress(RuntimeError):  # The loop is closed, so no task waits for the answer.
            loop.call_soon_threadsafe(settle, answer, error)

    call.start(done)
    try:
        if progress is None:
            return await future
        reporter = _Reporter(progress, label)
        try:
            while not (await asyncio.wait({future}, timeout=_PROGRESS_SECONDS))[0]:
                reporter(*call.snapshot())
            answer = future.result()
            reporter.end(call)
            return answer
        finally:
            reporter.close()
    finally:
        # The task was cancelled, or `progress` raised an exception.
        if not future.done() or future.cancelled():
            call.cancel()

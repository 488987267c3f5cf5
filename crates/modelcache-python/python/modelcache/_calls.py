"""Waits for calls of the native module, on a thread or in an event loop, without holding the interpreter's lock."""

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

    def finish(self, call: Call) -> None:
        """Report the final progress of a successful call."""
        if self._function is not None:
            self(*call.snapshot())
        elif self._bar is not None and self._bar.total:
            # The bar ends full, although the bytes of the last phase may differ from those of the download.
            self._bar.n = self._bar.total
            self._bar.refresh()

    def close(self) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()


def wait(call: Call, progress: ProgressArgument | None = None, label: str = "") -> Any:
    """Wait for a call on the current thread and return its output.

    The callbacks, that is ``progress`` and logging handlers, may use the cache. The call continues while they run.

    :raises ModelCacheError: the call failed.
    :raises KeyboardInterrupt: Ctrl-C was pressed. The call is cancelled.
    """
    if progress is None:
        return _wait_for_output(call, None)
    reporter = _Reporter(progress, label)
    try:
        output = _wait_for_output(call, reporter)
        reporter.finish(call)
        return output
    finally:
        reporter.close()


def _wait_for_output(call: Call, reporter: _Reporter | None) -> Any:
    try:
        # `wait` returns to Python ten times a second, so that signal handlers can run.
        while (output := call.wait()) is None:
            _logging.forward_records()
            if reporter is not None:
                reporter(*call.snapshot())
        return output
    except BaseException:
        # Ctrl-C, or an exception raised by a signal handler or by `progress`.
        call.cancel()
        raise
    finally:
        _logging.forward_records()


async def awaited(call: Call, progress: ProgressArgument | None = None, label: str = "") -> Any:
    """Wait for a call in the running event loop and return its output.

    Cancelling the task cancels the call. A download that other callers wait for continues.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(output: Any, error: BaseException | None) -> None:
        # The task may have been cancelled in the meantime.
        if not future.done():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(output)

    def done(output: Any, error: BaseException | None) -> None:
        # Runs on a dispatcher thread of the native module.
        with contextlib.suppress(RuntimeError):  # The loop is closed, so no task waits for the output.
            loop.call_soon_threadsafe(settle, output, error)

    call.start(done)
    try:
        if progress is None:
            return await future
        reporter = _Reporter(progress, label)
        try:
            while not (await asyncio.wait({future}, timeout=_PROGRESS_SECONDS))[0]:
                reporter(*call.snapshot())
            output = future.result()
            reporter.finish(call)
            return output
        finally:
            reporter.close()
    finally:
        # The task was cancelled, or `progress` raised an exception.
        if not future.done() or future.cancelled():
            call.cancel()

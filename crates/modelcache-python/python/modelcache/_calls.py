"""Waits for calls of the native module, on a thread or in an event loop, without holding the interpreter's lock.

A method is written once, as a function that begins a call and returns a :class:`Pending`. :func:`blocking` makes the
method from it, and :func:`asynchronous` the one with the prefix ``a``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Generic, ParamSpec, TypeVar

from . import _arguments, _logging
from ._native import Call
from ._progress import ProgressArgument, Reporter, reporter

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_PROGRESS_SECONDS = 0.1
"""Interval of progress reports in an event loop."""


def wait(call: Call, progress: ProgressArgument | None = None, label: str = "") -> Any:
    """Wait for a call on the current thread and return its output.

    The callbacks, that is ``progress`` and logging handlers, may use the cache. The call continues while they run.

    :raises ModelCacheError: the call failed.
    :raises KeyboardInterrupt: Ctrl-C was pressed. The call is cancelled.
    """
    if progress is None:
        return _wait_for_output(call, None)
    with reporter(call, progress, label) as reporting:
        return _wait_for_output(call, reporting)


def _wait_for_output(call: Call, reporting: Reporter | None) -> Any:
    try:
        # `wait` returns to Python ten times a second, so that signal handlers can run.
        while (output := call.wait()) is None:
            _logging.forward_records()
            if reporting is not None:
                reporting.report()
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
    import asyncio  # Slow to import, and not needed by the command line.

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
        with reporter(call, progress, label) as reporting:
            while not (await asyncio.wait({future}, timeout=_PROGRESS_SECONDS))[0]:
                reporting.report()
            return future.result()
    finally:
        # The task was cancelled, or `progress` raised an exception.
        if not future.done() or future.cancelled():
            call.cancel()
        _logging.forward_records()


class Pending(Generic[_Result]):
    """A call that a method has begun.

    :param call: the call of the native module, or a context manager that prepares it and cleans up after it.
    :param convert: a function that makes the result of the method from the output of the call.
    :param progress: the ``progress`` argument of the method.
    :param label: the description of the progress bar.
    """

    def __init__(
        self,
        call: Call | contextlib.AbstractContextManager[Call],
        convert: Callable[[Any], _Result],
        progress: ProgressArgument | None = None,
        label: str = "",
    ) -> None:
        if progress is not None and not isinstance(progress, bool) and not callable(progress):
            raise TypeError("progress must be a bool, a function or a progress bar class")
        self.prepared = contextlib.nullcontext(call) if isinstance(call, Call) else call
        # A call that is ready needs no other thread to be prepared on.
        self.is_ready = isinstance(call, Call)
        self.convert, self.progress, self.label = convert, None if progress is False else progress, label

    def wait(self) -> _Result:
        """Wait for the call on the current thread and return the result."""
        with self.prepared as call:
            return self.convert(wait(call, self.progress, self.label))

    async def awaited(self) -> _Result:
        """Wait for the call in the running event loop and return the result."""
        if self.is_ready:
            with self.prepared as call:
                return self.convert(await awaited(call, self.progress, self.label))
        import asyncio

        async with contextlib.AsyncExitStack() as stack:
            call = await asyncio.to_thread(self.prepared.__enter__)
            stack.push_async_callback(asyncio.to_thread, self.prepared.__exit__, None, None, None)
            return self.convert(await awaited(call, self.progress, self.label))


def nothing(_: Any) -> None:
    """Convert the output of a call whose method returns nothing."""


def _begin(
    start: Callable[_Parameters, Pending[_Result]], *args: _Parameters.args, **kwargs: _Parameters.kwargs
) -> Pending[_Result]:
    """Begin a call. If an argument has a wrong type, name it."""
    try:
        return start(*args, **kwargs)
    except TypeError as error:
        _arguments.explain(error, start.__name__, start, args, kwargs)
        raise


def blocking(start: Callable[_Parameters, Pending[_Result]]) -> Callable[_Parameters, _Result]:
    """Make a method that waits for the call that ``start`` begins, and returns its result."""
    # Documentation and signature are those of the method: `Path` instead of `Pending[Path]`.
    start.__annotations__["return"] = start.__annotations__["return"].removeprefix("Pending[").removesuffix("]")

    @functools.wraps(start)
    def method(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        return _begin(start, *args, **kwargs).wait()

    return method


def asynchronous(
    method: Callable[_Parameters, _Result], note: str = ""
) -> Callable[_Parameters, Coroutine[Any, Any, _Result]]:
    """Make the asynchronous version of a method that :func:`blocking` made.

    :param note: further text for its documentation.
    """
    start: Callable[_Parameters, Pending[_Result]] = inspect.unwrap(method)

    @functools.wraps(start)
    async def twin(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        return await _begin(start, *args, **kwargs).awaited()

    twin.__name__ = f"a{method.__name__}"
    twin.__qualname__ = method.__qualname__.removesuffix(method.__name__) + twin.__name__
    twin.__doc__ = f"Asynchronous version of :meth:`{method.__name__}`. {note}".strip()
    return twin

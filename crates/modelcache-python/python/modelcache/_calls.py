"""Waiting for calls: on a thread, or in an event loop. The interpreter's lock is never held meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable
from typing import Any, Protocol, cast

from . import _logging
from ._native import Call
from ._reports import Progress

_LOOK_EVERY = 0.1
"""Seconds between two tellings of progress."""


class TqdmLike(Protocol):
    """What is used of a progress bar of ``tqdm``."""

    total: float | None
    n: float

    def refresh(self) -> object: ...
    def close(self) -> object: ...


ProgressArgument = Callable[[Progress], object] | Callable[..., TqdmLike]
"""A function that is called with a :class:`Progress`, or a class like ``tqdm.tqdm``."""


class _Teller:
    """Tells progress to a function, or shows it on a bar."""

    def __init__(self, progress: ProgressArgument | None, what: str) -> None:
        self._tell: Callable[[Progress], object] | None = None
        self._bar: TqdmLike | None = None
        if progress is not None and inspect.isclass(progress) and hasattr(progress, "update"):
            make = cast("Callable[..., TqdmLike]", progress)
            self._bar = make(total=None, desc=what, unit="B", unit_scale=True)
        elif progress is not None:
            self._tell = cast("Callable[[Progress], object]", progress)

    def __call__(self, phase: str, done: int, total: int, remote: int, origin: int) -> None:
        if self._tell is not None:
            self._tell(Progress(phase, done, total or None, remote, origin))
        elif self._bar is not None and total:
            self._bar.total, self._bar.n = total, min(done, total)
            self._bar.refresh()

    def end(self, call: Call) -> None:
        if self._tell is not None:
            self(*call.snapshot())
        elif self._bar is not None and self._bar.total:
            self._bar.n = self._bar.total
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def wait(call: Call, progress: ProgressArgument | None = None, what: str = "") -> Any:
    """The answer; raises what the call failed with, and ``KeyboardInterrupt`` soon after Ctrl-C.

    Whatever is called back, ``progress`` or a logging handler, may make calls of its own: this one goes on meanwhile.
    """
    if progress is None:
        return _answer(call, None)
    teller = _Teller(progress, what)
    try:
        answer = _answer(call, teller)
        teller.end(call)
        return answer
    finally:
        teller.close()


def _answer(call: Call, teller: _Teller | None) -> Any:
    try:
        while (answer := call.wait()) is None:
            _logging.hand_over()
            if teller is not None:
                teller(*call.snapshot())
        return answer
    except BaseException:
        call.cancel()
        raise
    finally:
        _logging.hand_over()


async def awaited(call: Call, progress: ProgressArgument | None = None, what: str = "") -> Any:
    """The answer. Cancelling ends this call; a fill that others wait for goes on for them."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(answer: Any, error: BaseException | None) -> None:
        if not future.done():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(answer)

    def done(answer: Any, error: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # The loop has closed: nobody waits any more.
            loop.call_soon_threadsafe(settle, answer, error)

    call.start(done)
    try:
        if progress is None:
            return await future
        teller = _Teller(progress, what)
        try:
            while not (await asyncio.wait({future}, timeout=_LOOK_EVERY))[0]:
                teller(*call.snapshot())
            answer = future.result()
            teller.end(call)
            return answer
        finally:
            teller.close()
    finally:
        if not future.done() or future.cancelled():
            call.cancel()

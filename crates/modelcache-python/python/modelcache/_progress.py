"""Reports the progress of a call: to a function, to a progress bar class, or to a person (``progress=True``).

All reports are made on the thread that waits for the call, about ten times a second. Errors of the display for
``progress=True`` are logged and never end the call; those of the caller's function or class do.
"""

from __future__ import annotations

import contextlib
import functools
import html
import importlib
import inspect
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, Protocol, cast

from ._native import Call
from ._reports import Progress

_SHOW_AFTER_SECONDS = 1.0
"""A call that processes no bytes, such as one that waits for a server, is displayed after this time."""
_LINE_SECONDS = 5.0
"""Shortest time between two lines of one call where lines cannot be redrawn."""

_warnings: set[str] = set()
"""The warnings that this process has logged."""


class TqdmLike(Protocol):
    """The part of the interface of a ``tqdm`` progress bar that this package uses."""

    total: float | None
    n: float

    def reset(self, total: float | None = ...) -> object: ...
    def refresh(self) -> object: ...
    def close(self) -> object: ...


ProgressArgument = Callable[[Progress], object] | Callable[..., TqdmLike] | bool
"""A function that is called with a :class:`Progress`, a progress bar class such as ``tqdm.tqdm``, or ``True``."""


def reporter(call: Call, progress: ProgressArgument, label: str) -> Reporter:
    """Return the reporter for the ``progress`` argument of a call.

    :param label: the description of the call in a display.
    """
    if progress is True:
        return _Display(call, label)
    # `huggingface_hub` also accepts a `functools.partial` of a class.
    if inspect.isclass(kind := getattr(progress, "func", progress)) and hasattr(kind, "refresh"):
        return _Bar(call, cast("Callable[..., TqdmLike]", progress), label)
    return _Function(call, cast("Callable[[Progress], object]", progress))


class Reporter:
    """Reports the progress of one call. The end of the ``with`` block is the end of the call."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def report(self) -> None:
        """Report the present progress."""
        self._update(Progress._of(self._call.snapshot()))

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(Progress._of(self._call.snapshot()), kind)

    def _update(self, progress: Progress) -> None:
        raise NotImplementedError

    def _end(self, progress: Progress, error: type[BaseException] | None) -> None:
        raise NotImplementedError


class _Function(Reporter):
    """Calls a function with the progress, and once more after success."""

    def __init__(self, call: Call, function: Callable[[Progress], object]) -> None:
        super().__init__(call)
        self._function = function

    def _update(self, progress: Progress) -> None:
        self._function(progress)

    def _end(self, progress: Progress, error: type[BaseException] | None) -> None:
        if error is None:
            self._function(progress)


class _Bar(Reporter):
    """Shows the progress in a bar of the class that the caller passed. The bar is created when the total size is known."""

    def __init__(self, call: Call, make: Callable[..., TqdmLike], label: str) -> None:
        super().__init__(call)
        self._make = functools.partial(make, desc=label, unit="B", unit_scale=True)
        self._bar: TqdmLike | None = None

    def _update(self, progress: Progress) -> None:
        if not progress.total_bytes:
            return
        if self._bar is None:
            self._bar = self._make(total=progress.total_bytes)
        elif self._bar.total != progress.total_bytes:
            # A bar in a notebook ignores a change of the attribute `total`.
            self._bar.reset(progress.total_bytes)
        self._bar.n = min(progress.done_bytes, progress.total_bytes)
        self._bar.refresh()

    def _end(self, progress: Progress, error: type[BaseException] | None) -> None:
        if self._bar is None and error is None and (size := _known_bytes(progress)):
            self._bar = self._make(total=size)
        if self._bar is None:
            return
        try:
            if error is None and self._bar.total:
                # The bar ends full, although the bytes of the last phase may differ from those of the download.
                self._bar.n = self._bar.total
                self._bar.refresh()
        finally:
            self._bar.close()


class _Display(Reporter):
    """Shows the progress where the program runs: in a notebook, on a terminal, or as lines in a log.

    A call that processes no bytes and ends within a second, such as one for an artifact on disk, shows nothing.
    """

    def __init__(self, call: Call, label: str) -> None:
        super().__init__(call)
        self._label = repr(label)[1:-1]
        self._output: _Output | None = None
        self._has_failed = False
        self._started = time.monotonic()
        self._bytes = 0
        # The start of the current phase: phase and total, time, and bytes done. The speed is the average since then.
        self._part: tuple[str, int | None] | None = None
        self._part_started, self._part_bytes = 0.0, 0

    def _update(self, progress: Progress) -> None:
        self._attempt(self._draw, progress)

    def _end(self, progress: Progress, error: type[BaseException] | None) -> None:
        self._attempt(self._close, progress, error)

    def _attempt(self, step: Callable[..., None], *arguments: Any) -> None:
        """Run a step of the display. After an error, log it and show nothing more."""
        if self._has_failed:
            return
        try:
            step(*arguments)
        except Exception as error:
            self._has_failed = True
            text = f"the progress cannot be displayed, and the call continues without: {error!r}"
            if text not in _warnings:
                _warnings.add(text)
                with contextlib.suppress(Exception):  # Standard error may be closed, or a handler may fail.
                    logging.getLogger("modelcache").warning("%s", text)

    def _draw(self, progress: Progress) -> None:
        self._bytes = max(self._bytes, _known_bytes(progress))
        speed = self._speed(progress)
        if self._output is None and not self._bytes and time.monotonic() - self._started < _SHOW_AFTER_SECONDS:
            return
        self._output = self._output or _output()
        self._output.draw(_fraction(progress), f"{self._label}: {_text(progress)}{speed}")

    def _close(self, progress: Progress, error: type[BaseException] | None) -> None:
        self._bytes = max(self._bytes, _known_bytes(progress))
        seconds = f"{time.monotonic() - self._started:.1f} s"
        if error is None and (self._output or self._bytes):
            done = f"{_size(self._bytes)} in {seconds}" if self._bytes else seconds
            (self._output or _output()).close(1.0, f"{self._label}: done, {done}", True)
        elif self._output:
            # KeyboardInterrupt and CancelledError are no subclasses of Exception.
            outcome = "failed" if error is not None and issubclass(error, Exception) else "cancelled"
            text = f"{self._label}: {outcome} after {seconds}, {_text(progress)}"
            self._output.close(_fraction(progress), text, False)

    def _speed(self, progress: Progress) -> str:
        """Return the average rate of this phase and the time left; an empty text while they are unknown."""
        part, now = (progress.phase, progress.total_bytes), time.monotonic()
        if self._part != part:
            self._part, self._part_started, self._part_bytes = part, now, progress.done_bytes
        moved, seconds = progress.done_bytes - self._part_bytes, now - self._part_started
        if not progress.total_bytes or moved <= 0 or seconds <= 0:
            return ""
        rate = moved / seconds
        return f", {_size(rate)}/s, {max(progress.total_bytes - progress.done_bytes, 0) / rate:.0f} s left"


_ACTIVITIES = {
    "resolve": "resolving the reference",
    "acquire": "checking the local disk",
    "join": "waiting for another download",
    "plan": "planning",
    "download": "downloading",
    "read": "reading",
    "publish": "publishing",
    "backfill": "uploading",
    "materialize": "writing files",
    "extract": "extracting",
    "verify": "verifying",
}


def _known_bytes(progress: Progress) -> int:
    """Return the bytes to process, or those received if the total is unknown."""
    return progress.total_bytes or progress.remote_bytes + progress.origin_bytes


def _text(progress: Progress) -> str:
    """Return the phase, the bytes, and whether a request is sent again."""
    words = [_ACTIVITIES.get(progress.phase, progress.phase)]
    if progress.total_bytes:
        words.append(f"{_fraction(progress):.0%}, {_size(progress.done_bytes)} of {_size(progress.total_bytes)}")
    elif received := _known_bytes(progress):
        words.append(_size(received))
    if progress.last_error is not None:
        words.append("a request failed and is sent again")
    return ", ".join(words)


def _fraction(progress: Progress) -> float:
    return min(progress.done_bytes / progress.total_bytes, 1.0) if progress.total_bytes else 0.0


def _size(count: float) -> str:
    """Format bytes in decimal units: ``350 MB``, ``1.2 GB``."""
    units = iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while count >= 999.5 and (larger := next(units, None)):
        count, unit = count / 1000, larger
    return f"{count:.{int(unit != 'B' and count < 99.95)}f} {unit}"


# -- outputs -----------------------------------------------------------------------------------------------------------


class _Output(Protocol):
    """A place where the progress of one call is displayed."""

    def draw(self, fraction: float, text: str) -> None: ...
    def close(self, fraction: float, text: str, is_success: bool) -> None:
        """Display the last text, which stays."""


def _output() -> _Output:
    """Return an output for the place where this process runs."""
    if _is_notebook():
        try:
            return _Widget()
        except ImportError:
            return _NotebookText()
    return _TerminalLine() if _is_terminal() else _Lines()


def can_redraw() -> bool:
    """Return whether the output of this process is a notebook, or a terminal that can redraw a line."""
    return _is_notebook() or _is_terminal()


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    kernel = getattr(ipython and ipython.get_ipython(), "kernel", None)
    # A forked child cannot send messages to the notebook. What it writes to standard error is shown there.
    return kernel is not None and getattr(getattr(kernel, "session", None), "pid", os.getpid()) == os.getpid()


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _display(item: object, **options: Any) -> Any:
    """Call ``IPython.display.display``."""
    return importlib.import_module("IPython.display").display(item, **options)


class _Widget:
    """A progress bar of ipywidgets, with the text beside it.

    :raises ImportError: ipywidgets is not installed.
    """

    def __init__(self) -> None:
        ipywidgets: Any = importlib.import_module("ipywidgets")
        self._bar = ipywidgets.FloatProgress(max=1.0)
        self._text = ipywidgets.HTML()
        _display(ipywidgets.HBox([self._bar, self._text]))

    def draw(self, fraction: float, text: str) -> None:
        self._bar.value, self._text.value = fraction, html.escape(text)

    def close(self, fraction: float, text: str, is_success: bool) -> None:
        self._bar.bar_style = "success" if is_success else "danger"
        self.draw(fraction, text)


class _NotebookText:
    """A text in the output of the cell, replaced in place."""

    def __init__(self) -> None:
        self._handle: Any = None

    def draw(self, fraction: float, text: str) -> None:
        if self._handle is None:
            self._handle = _display({"text/plain": text}, raw=True, display_id=True)
        else:
            self._handle.update({"text/plain": text}, raw=True)

    def close(self, fraction: float, text: str, is_success: bool) -> None:
        self.draw(fraction, text)


class _TerminalLine:
    """The last line of the terminal, which concurrent calls share. The last text of each call stays."""

    _texts: ClassVar[dict[_TerminalLine, str]] = {}

    def draw(self, fraction: float, text: str) -> None:
        self._texts[self] = text
        # A copy, because other threads change the dictionary.
        line = " | ".join(tuple(self._texts.values()))
        _write(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K")

    def close(self, fraction: float, text: str, is_success: bool) -> None:
        self._texts.pop(self, None)
        _write(f"\r{text}\x1b[K\n")


# The calls of other threads of the parent do not run in a forked child.
os.register_at_fork(after_in_child=_TerminalLine._texts.clear)


class _Lines:
    """Lines on standard error at a bounded rate, for logs."""

    def __init__(self) -> None:
        self._next = 0.0

    def draw(self, fraction: float, text: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_SECONDS
            _write(f"{text}\n")

    def close(self, fraction: float, text: str, is_success: bool) -> None:
        _write(f"{text}\n")


def _write(text: str) -> None:
    # One write, so that the texts of concurrent threads do not mix.
    sys.stderr.write(text)
    sys.stderr.flush()

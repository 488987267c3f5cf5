"""Callbacks that use the cache: progress functions, logging handlers and signal handlers."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_model
from modelcache import ModelCache, ModelCacheError, Progress, _native
from servers import SlowProxy

SIZE = 2 << 20


@pytest.fixture
def published(slow: SlowProxy, tmp_path: Path) -> SlowProxy:
    """`m@1` and `n@1`, both on the remote only. The download of `m@1` takes long enough for a few callbacks."""
    with ModelCache() as cache:
        cache.put("m", "1", write_model(tmp_path / "model", SIZE), tier="remote")
        cache.put("n", "1", write_model(tmp_path / "other", 1000), tier="remote")
    slow.bytes_per_second = 4_000_000
    return slow


def _put(cache: ModelCache) -> object:
    path = cache.cache_dir.parent / "small"
    path.write_text("small")
    return cache.put("p", "1", path, force=True)


async def _concurrent_calls(cache: ModelCache) -> object:
    return await asyncio.gather(cache.aget("n", "1"), cache.astats())


def _open_and_read(cache: ModelCache) -> bytes:
    with cache.open("n@1", "config.json") as file:
        return file.read()


CALLS: dict[str, Callable[[ModelCache], object]] = {
    "get": lambda cache: cache.get("n", "1"),
    "get the same": lambda cache: cache.get("m", "1"),
    "lease": lambda cache: cache.lease("n", "1").release(),
    "open": _open_and_read,
    "put": _put,
    "prewarm": lambda cache: cache.prewarm(["n@1"]),
    "evict": lambda cache: cache.get("n", "1") and cache.evict("n", "1", tier="disk"),
    "stats": lambda cache: cache.stats(),
    "resolve": lambda cache: cache.resolve("m@1"),
    "list": lambda cache: cache.list_artifacts(remote=True),
    "pin": lambda cache: cache.get("n", "1") and cache.pin("n", "1"),
    "tag": lambda cache: cache.tag("n", "1", "prod"),
    "verify": lambda cache: list(cache.verify()),
    "metrics": lambda cache: cache.metrics.text(),
    "another cache": lambda cache: ModelCache().close(),
    "an event loop": lambda cache: asyncio.run(_concurrent_calls(cache)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_progress_function_may_use_the_cache(name: str, published: SlowProxy, open_cache: Any) -> None:
    cache, calls = open_cache(), 0

    def on_progress(_: Progress) -> None:
        nonlocal calls
        if calls == 0:
            calls = 1
            CALLS[name](cache)

    path = cache.get("m", "1", progress=on_progress)
    assert calls == 1
    assert (path / "weights.bin").stat().st_size == SIZE


def test_a_progress_function_may_close_the_cache(published: SlowProxy, open_cache: Any) -> None:
    cache = open_cache()
    cache.get("m", "1", progress=lambda _: cache.close())
    assert cache.closed
    with pytest.raises(ModelCacheError, match="closed"):
        cache.stats()


def test_progress_functions_of_other_calls_may_use_the_cache(
    published: SlowProxy, open_cache: Any, tmp_path: Path
) -> None:
    cache, reports = open_cache(), []

    def on_progress(progress: Progress) -> None:
        reports.append(cache.stats())

    published.bytes_per_second = None
    cache.put("q", "1", write_model(tmp_path / "q", 100_000), progress=on_progress)
    cache.verify(progress=on_progress)
    cache.prewarm(["n@1"], progress=on_progress)
    asyncio.run(cache.aget("m", "1", progress=on_progress))
    assert len(reports) >= 4


class _CallingHandler(logging.Handler):
    """A handler that calls a function for every record, except for records that are logged during this call."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self.call, self.called, self.failed = call, threading.Event(), False
        self._busy = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(self._busy, "is_set", False):
            return
        self._busy.is_set = True
        try:
            self.call()
        except BaseException:
            self.failed = True
            raise
        finally:
            self._busy.is_set = False
            self.called.set()


@pytest.fixture
def add_handler() -> Iterator[Callable[[Callable[[], object]], _CallingHandler]]:
    """A function that adds a logging handler which calls `call`. The handlers are removed at the end of the test."""
    logger, handlers = logging.getLogger("modelcache"), []

    def add(call: Callable[[], object]) -> _CallingHandler:
        handlers.append(_CallingHandler(call))
        logger.addHandler(handlers[-1])
        logger.setLevel(logging.DEBUG)
        return handlers[-1]

    yield add
    logger.setLevel(logging.NOTSET)
    for handler in handlers:
        logger.removeHandler(handler)


def test_a_logging_handler_may_use_the_cache(published: SlowProxy, open_cache: Any, add_handler: Any) -> None:
    cache = open_cache()
    handler = add_handler(lambda: cache.get("n", "1"))
    assert cache.get("m", "1").exists()
    assert handler.called.wait(30) and not handler.failed


def test_a_logging_handler_may_wait_for_an_event_loop(published: SlowProxy, open_cache: Any, add_handler: Any) -> None:
    cache = open_cache()
    # In a coroutine, a handler runs in the thread of the loop, where it cannot run another one.
    handler = add_handler(lambda: asyncio.run(_concurrent_calls(cache)))
    assert cache.get("m", "1").exists()
    assert handler.called.wait(30) and not handler.failed


def test_a_signal_handler_may_use_the_cache(published: SlowProxy, open_cache: Any) -> None:
    cache, seen = open_cache(), []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(cache.stats()))
    try:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        assert cache.get("m", "1").exists()
        timer.join()
        # Return to the interpreter once more, so that it runs a pending signal handler.
        time.sleep(0.01)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(seen) == 1


def test_an_exception_in_a_callback_ends_only_its_own_call(published: SlowProxy, open_cache: Any) -> None:
    cache = open_cache()

    def stop(_: Progress) -> None:
        cache.stats()
        raise LookupError

    with pytest.raises(LookupError):
        cache.get("m", "1", progress=stop)
    assert cache.get("m", "1").exists()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_panic_is_an_exception(at_once: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelCacheError, match="a defect in modelcache: on purpose"):
        _native.panicking_call(at_once).wait()

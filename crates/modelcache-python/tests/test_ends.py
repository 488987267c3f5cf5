"""The interpreter exits while threads are in calls: without abort, panic, traceback or hang.

Each program runs several times (MODELCACHE_EXIT_RUNS), because failures at exit are intermittent.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_model
from modelcache import ModelCache
from servers import SlowProxy

RUNS = int(os.environ.get("MODELCACHE_EXIT_RUNS", "4"))

START = """
import asyncio, atexit, logging, sys, threading, time
import modelcache
cache = modelcache.ModelCache()
def daemon(work):
    threading.Thread(target=work, daemon=True).start()
def forever(work):
    def run():
        while True:
            work()
    return run
"""

PROGRAMS = {
    "a cold get in a daemon thread": """
daemon(lambda: cache.get("m", "1"))
time.sleep(0.15)
""",
    "a cold get with progress in a daemon thread": """
daemon(lambda: cache.get("m", "1", progress=lambda _: sum(range(300_000))))
time.sleep(0.25)
""",
    "a cold get of a cache that is not referenced": """
daemon(lambda: modelcache.ModelCache().get("m", "1"))
time.sleep(0.15)
del cache
""",
    "a daemon thread that gets for ever": """
cache.get("n", "1")
daemon(forever(lambda: cache.get("n", "1")))
time.sleep(0.1)
""",
    "many daemon threads that get and evict": """
logging.getLogger("modelcache").setLevel(logging.ERROR)  # Evicting an artifact during its fill logs a warning.
def turn():
    try:
        with cache.lease("n", "1"):
            pass
        cache.evict("n", "1", tier="disk")
    except modelcache.ModelCacheError:
        pass
for _ in range(8):
    daemon(forever(turn))
time.sleep(0.2)
""",
    "daemon threads that open caches": """
def turn():
    with modelcache.ModelCache() as other:
        other.stats()
for _ in range(3):
    daemon(forever(turn))
time.sleep(0.1)
""",
    "a daemon thread that reads a file during its download": """
daemon(lambda: cache.open("m@1", "weights.bin").read())
time.sleep(0.15)
""",
    "an event loop in a daemon thread": """
async def work():
    while True:
        await asyncio.gather(*(cache.aget("n", "1") for _ in range(4)))
daemon(lambda: asyncio.run(work()))
time.sleep(0.2)
""",
    "a logging handler that is running": """
class Handler(logging.Handler):
    def emit(self, record):
        sum(range(10_000))
logging.getLogger("modelcache").addHandler(Handler())
logging.getLogger("modelcache").setLevel(logging.DEBUG)
daemon(forever(lambda: modelcache.ModelCache(cache_dir=str(cache.cache_dir) + "-2").get("n", "1")))
daemon(lambda: cache.get("m", "1"))
time.sleep(0.2)
""",
    "exit handlers that use the cache": """
atexit.register(lambda: cache.get("n", "1"))
atexit.register(lambda: cache.stats())
daemon(lambda: cache.get("m", "1"))
time.sleep(0.15)
""",
    "an executor whose future was cancelled": """
async def main():
    future = asyncio.get_running_loop().run_in_executor(None, cache.get, "n", "1")
    await asyncio.sleep(0.05)
    future.cancel()
asyncio.run(main())
""",
    "an exit code": """
daemon(lambda: cache.get("m", "1"))
time.sleep(0.15)
sys.exit(3)
""",
    "a subinterpreter that imports": """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
code = "try:\\n  import modelcache\\nexcept ImportError as error:\\n  assert 'subinterpreters' in str(error)"
other = interpreters.create()
interpreters.run_string(other, code)
cache.get("n", "1")
interpreters.destroy(other)
""",
}


@pytest.fixture
def published(slow: SlowProxy, tmp_path: Path) -> SlowProxy:
    """`m@1` and `n@1`, both on the remote only. The download of `m@1` outlasts the programs, that of `n@1` does not."""
    with ModelCache() as cache:
        cache.put("m", "1", write_model(tmp_path / "model", 12 << 20), tier="remote")
        cache.put("n", "1", write_model(tmp_path / "other", 1000), tier="remote")
    slow.bytes_per_second = 500_000
    return slow


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_interpreter_exits_cleanly_during(name: str, published: SlowProxy) -> None:
    code = 3 if name == "an exit code" else 0
    for run in range(RUNS):
        program = [sys.executable, "-c", START + PROGRAMS[name]]
        done = subprocess.run(program, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", ""), f"run {run}"


def test_exit_handlers_that_run_after_the_one_of_the_package_get_errors(published: SlowProxy) -> None:
    # Exit handlers run in reverse order of registration. The package registers its handler when it is imported.
    program = """
import atexit
def late():
    for call in (lambda: cache.stats(), lambda: modelcache.ModelCache().stats()):
        try:
            call()
        except modelcache.ModelCacheError as error:
            print(error.message)
atexit.register(late)
import modelcache
cache = modelcache.ModelCache()
cache.stats()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "the cache is closed\nthe Python interpreter is shutting down; no call can be started\n"
    )

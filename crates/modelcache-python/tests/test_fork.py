"""Forks: a child can use the cache in any state of its parent, and does not disturb the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import noise, write_model
from modelcache import ConflictError, ModelCache
from servers import SlowProxy

SIZE = 2 << 20
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def in_child(work: Callable[[], object], *, exit_with: Callable[[int], object] = os._exit) -> None:
    """Run `work` in a forked child, which ends with `exit_with`. Fails if it raises an exception or hangs."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        exit_with(code)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", SIZE)


def check(path: Path) -> None:
    assert (path / "weights.bin").read_bytes() == noise(SIZE)


def test_a_child_uses_the_cache_of_its_parent(s3: str, model: Path, open_cache: Any) -> None:
    cache = open_cache()
    cache.put("m", "1", model)
    cache.put("n", "1", model, tier="remote")
    cache.get("m", "1")

    def work() -> None:
        check(cache.get("m", "1"))
        check(cache.get("n", "1"))
        cache.close()

    in_child(work)
    in_child(work)
    check(cache.get("m", "1"))


def test_a_child_of_a_child_uses_the_cache(model: Path, open_cache: Any) -> None:
    cache = open_cache()
    cache.put("m", "1", model)

    def work() -> None:
        check(cache.get("m", "1"))
        in_child(lambda: check(cache.get("m", "1")))

    in_child(work)


def test_threads_of_a_child_open_the_cache_once(model: Path, open_cache: Any) -> None:
    cache, other = open_cache(), open_cache()
    names = [f"m{number}" for number in range(8)]
    for name in names:
        cache.put(name, "1", model)

    def work() -> None:
        start = threading.Barrier(len(names))

        def get(name: str) -> None:
            start.wait()
            cache.get(name, "1")

        threads = [threading.Thread(target=get, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Every path is still leased, so no thread replaced the cache that another thread had opened.
        for name in names:
            with pytest.raises(ConflictError):
                other.evict(name, "1")

    in_child(work)


def test_the_exit_of_a_child_does_not_release_the_leases_of_its_parent(model: Path, open_cache: Any) -> None:
    cache, other = open_cache(), open_cache()
    cache.put("m", "1", model)
    lease = cache.lease("m", "1")
    path = cache.get("m", "1")

    def exit_like_python(code: int) -> None:
        # Close and free everything, as the end of the interpreter does. `os._exit` alone would not.
        import modelcache._cache as private

        lease.release()
        private._close_all()
        os._exit(code)

    in_child(lambda: cache.get("m", "1"), exit_with=exit_like_python)
    in_child(lambda: None, exit_with=exit_like_python)
    lease.release()
    with pytest.raises(ConflictError):
        other.evict("m", "1")
    check(path)


def test_a_child_acquires_its_own_leases_on_the_artifacts_of_its_parent(model: Path, open_cache: Any) -> None:
    cache, other = open_cache(), open_cache()
    cache.put("m", "1", model)
    cache.get("m", "1")
    read, write = os.pipe()
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        cache.stats()  # The child leases the artifacts on its first use of the cache.
        os.write(ready_write, b".")
        os.read(read, 1)
        os._exit(0)
    try:
        os.read(ready_read, 1)
        cache.close()
        with pytest.raises(ConflictError):
            other.evict("m", "1")
    finally:
        os.write(write, b".")
        os.waitpid(pid, 0)
    assert other.evict("m", "1").disk_bytes


def test_a_fork_during_a_download(slow: SlowProxy, model: Path, open_cache: Any, tmp_path: Path) -> None:
    cache = open_cache()
    cache.put("m", "1", model, tier="remote")
    slow.bytes_to_clients, slow.bytes_per_second = 0, 2_000_000
    paths: list[Path] = []
    thread = threading.Thread(target=lambda: paths.append(cache.get("m", "1")))
    thread.start()
    while slow.bytes_to_clients < SIZE // 4:
        time.sleep(0.01)
    in_child(lambda: check(cache.get("m", "1")))
    thread.join()
    check(paths[0])


def _get_in_worker(cache: ModelCache) -> str:
    path = cache.get("m", "1")
    check(path)
    return str(path)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_multiprocessing(method: str, model: Path, open_cache: Any) -> None:
    cache = open_cache()
    cache.put("m", "1", model)
    cache.get("m", "1")
    with multiprocessing.get_context(method).Pool(2) as pool:
        paths = set(pool.map(_get_in_worker, [cache] * 4))
    assert paths == {str(cache.get("m", "1"))}


PREFORKED = """
import os
from modelcache import ModelCache

cache = ModelCache()
before = cache.get("m", "1")

def app(environ, start_response):
    after = cache.get("n", "1")
    start_response("200 OK", [("content-type", "text/plain")])
    sizes = [(path / "weights.bin").stat().st_size for path in (before, after)]
    return [f"{os.getpid()} {sizes}".encode()]
"""


def test_gunicorn_that_loads_the_application_before_it_forks(
    s3: str, model: Path, open_cache: Any, tmp_path: Path
) -> None:
    cache = open_cache()
    cache.put("m", "1", model, tier="remote")
    cache.put("n", "1", model, tier="remote")
    (tmp_path / "app.py").write_text(PREFORKED)
    command = [sys.executable, "-m", "gunicorn", "--chdir", str(tmp_path), "--preload", "--workers", "2"]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        descriptor = listening.fileno()
        server = subprocess.Popen(
            [*command, "--bind", f"fd://{descriptor}", "app:app"], pass_fds=[descriptor], start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
            workers: set[str] = set()
            deadline = time.monotonic() + 60
            while len(workers) < 2:
                assert time.monotonic() < deadline, f"only {workers} answered"
                worker, _, sizes = httpx.get(address, timeout=30).text.partition(" ")
                assert sizes == str([SIZE, SIZE])
                workers.add(worker)
            assert str(server.pid) not in workers
            with pytest.raises(ConflictError):
                cache.evict("m", "1", tier="disk")
            server.terminate()
            assert server.wait(30) == 0
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
    cache.evict("m", "1", tier="disk")  # No lease is left.


def test_a_fork_by_native_code(model: Path, open_cache: Any) -> None:
    """A fork by native code does not run the handlers of `os.register_at_fork`."""
    cache = open_cache()
    cache.put("m", "1", model)
    code = (
        "import ctypes, os\nfrom modelcache import ModelCache\n"
        "cache = ModelCache()\ncache.get('m', '1')\n"
        "pid = ctypes.CDLL(None).fork()\n"
        "cache.get('m', '1')\n"
        "if pid == 0: os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_interpreter_exits_during_calls(slow: SlowProxy, model: Path, open_cache: Any) -> None:
    open_cache().put("m", "1", model, tier="remote")
    slow.bytes_per_second = 10_000
    code = (
        "import asyncio, threading\nfrom modelcache import ModelCache\n"
        "cache = ModelCache()\n"
        "threading.Thread(target=cache.get, args=('m', '1'), daemon=True).start()\n"
        "loop = asyncio.new_event_loop()\n"
        "task = loop.create_task(cache.aget('m', '1'))\n"
        "loop.run_until_complete(asyncio.sleep(0.5))\n"
        "print('over')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr

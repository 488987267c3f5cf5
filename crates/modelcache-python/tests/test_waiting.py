"""Waiting for calls: Ctrl-C, threads, asyncio, cancellation, and downloads shared by several callers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import modelcache
import pytest
from conftest import noise, run_and_interrupt, write_model
from modelcache import ModelCache, Progress
from servers import SlowProxy

SIZE = 4 << 20


@pytest.fixture
def published(slow: SlowProxy, tmp_path: Path) -> SlowProxy:
    """`m@1`, on the remote only."""
    with ModelCache() as cache:
        cache.put("m", "1", write_model(tmp_path / "model", SIZE), tier="remote")
    slow.bytes_to_clients = 0
    return slow


def check(path: Path) -> None:
    assert (path / "weights.bin").read_bytes() == noise(SIZE)


def test_ctrl_c_ends_a_get(published: SlowProxy) -> None:
    published.bytes_per_second = 10_000  # The download would take minutes.
    code = (
        "import sys\nfrom modelcache import ModelCache\n"
        "try:\n    ModelCache().get('m', '1', progress=lambda _: print('waiting', flush=True))\n"
        "except KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
    )
    assert run_and_interrupt(code, "waiting")[-1] == "interrupted"
    assert published.bytes_to_clients < SIZE


def test_a_program_that_ignores_ctrl_c_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "print('ready', flush=True)\ntime.sleep(600)\n"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        run_and_interrupt(code, "ready", timeout_seconds=0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_an_exception_in_progress_ends_the_get(published: SlowProxy, open_cache: Any) -> None:
    published.bytes_per_second = 10_000

    def stop(progress: Progress) -> None:
        raise LookupError(progress.phase)

    with pytest.raises(LookupError):
        open_cache().get("m", "1", progress=stop)


def test_other_threads_run_while_one_waits(published: SlowProxy, open_cache: Any) -> None:
    published.bytes_per_second = 10_000
    get_waits, other_ran = threading.Event(), threading.Event()

    def other() -> None:
        get_waits.wait()
        sum(range(100_000))
        other_ran.set()

    threading.Thread(target=other, daemon=True).start()

    class Enough(Exception):
        pass

    def on_progress(_: Progress) -> None:
        get_waits.set()
        if other_ran.is_set():
            raise Enough

    with pytest.raises(Enough):
        open_cache().get("m", "1", progress=on_progress)


def test_a_timeout_raises_unavailable_and_keeps_the_bytes(published: SlowProxy, open_cache: Any) -> None:
    published.bytes_per_second = 2_000_000
    cache = open_cache()
    with pytest.raises(modelcache.UnavailableError, match="not done within"):
        cache.get("m", "1", timeout=1.5)
    published.bytes_per_second = None
    check(cache.get("m", "1"))


def test_threads_and_caches_share_one_download(published: SlowProxy, open_cache: Any) -> None:
    published.bytes_per_second = 8_000_000
    caches = [open_cache(), open_cache()]
    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(lambda number: caches[number % 2].get("m", "1"), range(8)))
    [path] = paths
    check(path)
    assert published.bytes_to_clients < SIZE * 1.5
    assert sum(cache.metrics.to_dict()["waits"]["count"] for cache in caches) == 7


def test_processes_share_one_download(published: SlowProxy) -> None:
    published.bytes_per_second = 8_000_000
    code = "from modelcache import ModelCache\nprint(ModelCache().get('m', '1'))"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    [path] = {process.communicate(timeout=60)[0].strip() for process in processes}
    check(Path(path))
    assert published.bytes_to_clients < SIZE * 1.5


def test_an_event_loop_runs_while_a_get_waits(published: SlowProxy, open_cache: Any) -> None:
    published.bytes_per_second = 8_000_000
    reports: list[Progress] = []

    async def main() -> int:
        task = asyncio.create_task(open_cache().aget("m", "1", progress=reports.append))
        turns = 0
        while not task.done():
            turns += 1
            await asyncio.sleep(0.01)
        check(await task)
        return turns

    assert asyncio.run(main()) > 5
    assert reports[-1].remote_bytes >= SIZE


def test_a_download_continues_for_other_tasks_when_one_is_cancelled(published: SlowProxy, open_cache: Any) -> None:
    published.bytes_per_second = 4_000_000
    cache = open_cache()
    reports: list[Progress] = []

    async def main() -> Path:
        first = asyncio.create_task(cache.aget("m", "1"))
        while published.bytes_to_clients < SIZE // 8:
            await asyncio.sleep(0.01)
        second = asyncio.create_task(cache.aget("m", "1", progress=reports.append))
        # The second call has joined the download when it reports bytes of it.
        while not (reports and reports[-1].done_bytes):
            await asyncio.sleep(0.01)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        path: Path = await second
        return path

    check(asyncio.run(main()))
    assert published.bytes_to_clients < SIZE * 1.5


def test_cancelling_the_only_task_ends_the_download(published: SlowProxy, open_cache: Any) -> None:
    published.bytes_per_second = 500_000
    cache = open_cache()

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(cache.aget("m", "1"), 0.5)
        before = published.bytes_to_clients
        await asyncio.sleep(1.5)
        # Bytes in transit still arrive. No further ones are requested.
        assert published.bytes_to_clients - before < 500_000

    asyncio.run(main())


def test_failures_reach_the_event_loop(open_cache: Any) -> None:
    async def main() -> None:
        cache = open_cache()
        gets = [cache.aget("absent", str(version)) for version in range(20)]
        outcomes = await asyncio.gather(*gets, return_exceptions=True)
        assert all(isinstance(each, modelcache.NotFoundError) for each in outcomes)
        with pytest.raises(modelcache.InvalidError):
            await cache.aget("no version")

    asyncio.run(main())


def test_every_async_version_works(s3: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", 1000)

    async def main() -> None:
        async with ModelCache(ref_ttl=0) as cache:
            assert (await cache.aput("m", "1", model)).on_remote
            assert (await cache.atag("m", "1", "prod")).after == "1"
            assert (await cache.aresolve("m", "prod")).version == "1"
            with await cache.alease("m", "1") as path:
                assert path.exists()
            assert len(await cache.aprewarm(["m@1"])) == 1
            assert (await cache.apin("m", "1")).until is None
            await cache.aunpin("m", "1")
            assert all(each.ok for each in await cache.averify(tier="all"))
            assert [row.name for row in await cache.alist_artifacts()] == ["m"]
            assert (await cache.astats()).artifacts == 1
            assert "modelcache_puts_total 1" in await cache.metrics.atext()
            assert (await cache.auntag("m", "prod")).before == "1"
            assert (await cache.aevict("m", "1")).remote_bytes
        assert cache.closed

    asyncio.run(main())


def test_threads_event_loops_and_processes_together(published: SlowProxy, tmp_path: Path) -> None:
    """Many callers get and evict one artifact at the same time. Every path that they get has the right bytes."""
    rounds = int(os.environ.get("MODELCACHE_STRESS_ROUNDS", "15"))
    code = f"""
import asyncio, threading
from modelcache import ModelCache, ConflictError, NotFoundError
from pathlib import Path
expected = Path({str(tmp_path / "model" / "weights.bin")!r}).read_bytes()
failures = []
def check(path): assert (path / "weights.bin").read_bytes() == expected
def work():
    try:
        for _ in range({rounds}):
            cache = ModelCache()
            with cache.lease("m", "1") as path: check(path)
            try: cache.evict("m", "1", tier="disk")
            except (ConflictError, NotFoundError): pass
            async def several():
                for lease in await asyncio.gather(*(cache.alease("m", "1") for _ in range(3))):
                    with lease as path: check(path)
            asyncio.run(several())
            cache.close()
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=work) for _ in range(3)]
[each.start() for each in threads]
[each.join() for each in threads]
assert not failures, failures
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for process in processes:
        _, err = process.communicate(timeout=170)
        assert process.returncode == 0, err

"""Resource limits of the process: threads and address space."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_model

CALLS = """
import asyncio
from modelcache import ModelCache, ModelCacheError
cache = ModelCache()
def outcome(call):
    try:
        call()
        return "ok"
    except ModelCacheError as error:
        assert "RLIMIT_" in str(error), error
        return error.code
waited = outcome(lambda: cache.get("m", "1", progress=lambda _: cache.stats()))
print(waited, outcome(lambda: asyncio.run(cache.aget("m", "1"))))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that all users can access. It contains an origin with `m@1`."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        write_model(Path(folder) / "origin" / "m" / "1")
        yield Path(folder)


def outcomes(folder: Path, set_limits: str) -> str:
    """Run the code `set_limits`, and return the outcomes of a blocking call and of a call in an event loop."""
    env = {
        "HOME": str(folder),
        "MODEL_CACHE_DIR": str(folder / "cache"),
        "MODEL_CACHE_MIN_FREE_BYTES": "0",
        "MODEL_CACHE_ORIGIN": f"file://{folder}/origin/{{name}}/{{version}}",
    }
    program = [sys.executable, "-c", "import asyncio, modelcache, os, resource\n" + set_limits + CALLS]
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user that has no other process")
@pytest.mark.parametrize(
    ("threads", "expected"),
    [(1, "limits limits"), (2, "ok limits"), (3, "ok limits"), (4, "ok limits"), (5, "ok ok"), (8, "ok ok")],
)
def test_a_low_thread_limit_is_enough_or_an_error(threads: int, expected: str, open_folder: Path) -> None:
    # RLIMIT_NPROC counts the threads of a user, so the process becomes a user without other processes.
    user = 1_100_000 + os.getpid() % 100_000
    limit = f"os.setuid({user})\nresource.setrlimit(resource.RLIMIT_NPROC, ({threads}, {threads}))\n"
    assert outcomes(open_folder, limit) == expected


@pytest.mark.parametrize("mib", [250, 400, 600, 1000])
def test_little_address_space_is_enough(mib: int, open_folder: Path) -> None:
    limit = f"resource.setrlimit(resource.RLIMIT_AS, ({mib << 20}, {mib << 20}))\n"
    assert outcomes(open_folder, limit) == "ok ok"


def test_too_little_address_space_is_an_error(open_folder: Path) -> None:
    # 50 MiB more than the process uses now.
    limit = """
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (50 << 20),) * 2)
"""
    assert outcomes(open_folder, limit) == "limits limits"

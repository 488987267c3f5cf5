"""Shared fixtures: clean settings, an S3 server, a slow proxy in front of it, and a stand-in for the Hub."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from modelcache import ModelCache
from servers import SlowProxy, StandIn

MIB = 1 << 20
_REMOTE_NUMBERS = itertools.count()
_SETTING_PREFIXES = ("MODEL_CACHE_", "AWS_", "HF_", "XDG_", "MLFLOW_")


# Some tests read their files as another user, so the tests do not use the umask of the caller.
os.umask(0o022)
# A background job of a shell ignores SIGINT, and its child processes inherit that. They do not inherit a handler: they
# start with the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove all settings from the environment. Give each test its own cache directory and home."""
    for name in [name for name in os.environ if name.startswith(_SETTING_PREFIXES)]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODEL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MODEL_CACHE_MIN_FREE_BYTES", "0")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """An S3 server that all tests share."""
    server = StandIn("s3", "--folder", str(tmp_path_factory.mktemp("s3")), "--bucket", "models")
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: StandIn, monkeypatch: pytest.MonkeyPatch) -> str:
    """A remote for one test on the S3 server, set in the environment. Returns its URL."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    remote = f"s3://models/test-{os.getpid()}-{next(_REMOTE_NUMBERS)}"
    monkeypatch.setenv("MODEL_CACHE_REMOTE", remote)
    return remote


@pytest.fixture
def slow(s3: str, s3_server: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowProxy]:
    """A proxy in front of the S3 server, without limits at first."""
    endpoint = next(name for name in s3_server.env if name.startswith("AWS_ENDPOINT_URL"))
    proxy = SlowProxy(int(s3_server.env[endpoint].rsplit(":", 1)[1].rstrip("/")))
    monkeypatch.setenv(endpoint, f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.stop()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for the Hub with the repository `org/model`. Returns the folder of the repository."""
    folder = tmp_path / "hub" / "org" / "model"
    write_model(folder)
    server = StandIn("hub", "--folder", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", server.env["HF_ENDPOINT"])
    yield folder
    server.stop()


@pytest.fixture
def open_cache() -> Iterator[Any]:
    """A function that opens caches. They are closed at the end of the test."""
    caches: list[ModelCache] = []

    def open_one(**arguments: Any) -> ModelCache:
        caches.append(ModelCache(**arguments))
        return caches[-1]

    yield open_one
    for cache in caches:
        cache.close()


def run_and_interrupt(
    code: str, first: str, *, after_seconds: float = 0, timeout_seconds: float = 60
) -> list[str]:
    """Run a program, send it SIGINT after it has printed the line `first`, and return the lines that follow.

    The program must exit with code 0. It is killed if it does not end in time.
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{first}\n"
            time.sleep(after_seconds)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=timeout_seconds)
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0
    return out.splitlines()


def noise(size: int, seed: int = 0) -> bytes:
    """Return reproducible random bytes."""
    return random.Random(seed).randbytes(size)


def write_model(folder: Path, size: int = 3 * MIB) -> Path:
    """Create a model folder with a configuration, a tokenizer in a subfolder, and weights of `size` bytes."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 384}')
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (folder / "weights.bin").write_bytes(noise(size))
    return folder

"""Files that are read while they are downloaded."""

from __future__ import annotations

import asyncio
import io
import json
import mmap
import os
import pickle
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import modelcache
import numpy as np
import pytest
from conftest import MIB, noise, run_and_interrupt
from modelcache import CachedFile, ModelCache, ModelCacheError
from safetensors import safe_open
from safetensors.numpy import load, save_file
from servers import SlowProxy
from test_fork import in_child

PART = 8 * MIB
SIZE = 3 * PART + 12345
"""Four parts; the last one is short."""
TENSORS = {
    "first": np.arange(1000, dtype=np.float32),
    "second": np.arange(31 * MIB, dtype=np.uint32).view(np.float32),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def put(slow: SlowProxy, tmp_path: Path) -> Callable[[str, bytes], None]:
    """A function that publishes a file on the remote only."""

    def put(name: str, content: bytes) -> None:
        file = tmp_path / "published" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        with ModelCache() as cache:
            cache.put("m", "1", file, tier="remote")

    return put


@pytest.fixture
def published(slow: SlowProxy, put: Callable[[str, bytes], None]) -> SlowProxy:
    """`m@1`, one file of four parts, on the remote only."""
    put("weights.bin", noise(SIZE))
    return slow


def partly_downloaded(slow: SlowProxy, open_cache: Any, **arguments: Any) -> CachedFile:
    """Open the file of `m@1`. Returns it while one MiB of its download is missing."""
    slow.let_through(SIZE - MIB)
    file: CachedFile = open_cache().open("m@1", **arguments)
    # All four parts are requested at once. The short last one is complete first.
    assert file.pread(10, SIZE - 10) == noise(SIZE)[-10:]
    assert not file.is_whole
    return file


def test_one_tensor_is_read_before_half_of_the_file_is_downloaded(
    slow: SlowProxy, put: Callable[[str, bytes], None], tmp_path: Path, open_cache: Any
) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    put("model.safetensors", content)
    before = slow.bytes_to_clients
    # Enough for the first parts, even if some of them are requested twice.
    slow.let_through(len(content) // 2 - MIB)
    with open_cache().open("m@1") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
        start, stop = header["first"]["data_offsets"]
        tensor = np.empty(1000, np.float32)
        file.seek(8 + header_size + start)
        assert file.readinto(tensor) == stop - start
        assert np.array_equal(tensor, TENSORS["first"])
        assert slow.bytes_to_clients - before < len(content) / 2
        assert 0 < file.progress.remote_bytes < len(content) / 2
        assert not file.is_whole
        slow.let_through(None)
        file.seek(0)
        loaded = load(file.read())
        assert all(np.array_equal(loaded[name], TENSORS[name]) for name in TENSORS)
        with safe_open(file.path, framework="np") as tensors:
            assert np.array_equal(tensors.get_tensor("second"), TENSORS["second"])
        assert file.is_whole and file.progress.remote_bytes >= len(content)


def test_numpy_reads_and_maps_the_file(put: Callable[[str, bytes], None], open_cache: Any) -> None:
    array = np.arange(3_000_000, dtype=np.float64).reshape(1000, 3000)
    stream = io.BytesIO()
    np.save(stream, array)
    put("array.npy", stream.getvalue())
    for method in ("read", "descriptor", "buffered"):
        cache = open_cache(cache_dir=Path(os.environ["MODEL_CACHE_DIR"]) / method)
        with cache.open("m@1") as file:
            if method == "read":
                assert np.array_equal(np.load(file), array)
            elif method == "descriptor":
                mapped = np.memmap(file, np.float64, "r", offset=128)
                assert np.array_equal(mapped, array.ravel())
                file.seek(128)
                assert np.array_equal(np.fromfile(file, np.float64), array.ravel())
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
                    assert whole[:] == stream.getvalue()
            else:
                assert np.array_equal(np.load(io.BufferedReader(file)), array)


def test_a_cached_file_behaves_like_a_plain_file(published: SlowProxy, tmp_path: Path, open_cache: Any) -> None:
    rng = random.Random(20)
    plain = open(tmp_path / "published/weights.bin", "rb", buffering=0)
    cache = open_cache()
    with plain, cache.open("m@1") as downloading, cache.open("m@1") as raw:
        for file in (downloading, io.BufferedReader(raw)):
            plain.seek(0)
            for _ in range(300):
                size, offset = rng.randrange(100_000), rng.randrange(-SIZE, SIZE + 1000)
                whence = rng.choice([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])
                try:
                    moved: int | type[Exception] = plain.seek(offset, whence)
                except OSError:
                    with pytest.raises((ValueError, OSError)):
                        file.seek(offset, whence)
                    continue
                assert file.seek(offset, whence) == moved
                if rng.random() < 0.5:
                    assert file.read(size) == plain.read(size)
                else:
                    one, other = bytearray(size), bytearray(size)
                    assert file.readinto(one) == plain.readinto(other)
                    assert one == other
                assert file.tell() == plain.tell()
            file.seek(SIZE - 3 * MIB)
            plain.seek(SIZE - 3 * MIB)
            assert file.read() == plain.read()
            assert file.read() == b"" and file.read(5) == b"" and file.readinto(bytearray(3)) == 0
        assert downloading.readable() and downloading.seekable()
        assert not downloading.writable() and not downloading.isatty()
        with pytest.raises(ValueError):
            downloading.seek(0, 7)
        with pytest.raises(ValueError):
            downloading.pread(-1, 0)
        with pytest.raises(io.UnsupportedOperation):
            downloading.write(b"x")
        assert downloading.pread(10, SIZE + 5) == b""
        assert (downloading.name, downloading.artifact, downloading.size) == ("weights.bin", "m@1", SIZE)
    assert downloading.closed
    with pytest.raises(ValueError):
        downloading.read()


def test_a_descriptor_and_a_path_wait_for_the_complete_file(published: SlowProxy, open_cache: Any) -> None:
    file = partly_downloaded(published, open_cache)
    with ThreadPoolExecutor(2) as threads:
        descriptor, path = threads.submit(file.fileno), threads.submit(lambda: file.path)
        time.sleep(0.3)
        assert not descriptor.done() and not path.done()
        published.let_through(None)
        assert os.pread(descriptor.result(60), SIZE, 0) == noise(SIZE)
        assert path.result(60).read_bytes() == noise(SIZE)


def test_an_open_file_is_leased(published: SlowProxy, open_cache: Any) -> None:
    file = open_cache().open("m@1")
    path = file.path
    with pytest.raises(modelcache.ConflictError):
        open_cache().evict("m", "1", tier="disk")
    file.close()
    file.close()
    assert open_cache().evict("m", "1", tier="disk").disk_bytes
    assert not path.exists()


def test_threads_share_a_file(published: SlowProxy, open_cache: Any) -> None:
    content = noise(SIZE)
    published.bytes_per_second = 40_000_000
    file = open_cache().open("m@1")

    def read(seed: int) -> bool:
        offset = random.Random(seed).randrange(SIZE)
        return bool(file.pread(100_000, offset) == content[offset : offset + 100_000])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(100)))
    assert file.tell() == 0


def test_async_reads_wait_and_can_be_cancelled(published: SlowProxy, open_cache: Any) -> None:
    content = noise(SIZE)
    published.let_through(SIZE - MIB)

    async def main() -> None:
        cache = open_cache()
        file = await cache.aopen("m@1")
        assert await file.apread(10, SIZE - 10) == content[-10:]
        read = asyncio.create_task(file.aread())
        path = asyncio.create_task(file.apath())
        await asyncio.sleep(0.2)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        assert file.tell() == 0
        published.let_through(None)
        assert await file.aread(100) == content[:100]
        assert await file.aread() == content[100:]
        assert await file.aread() == b""
        assert (await path).read_bytes() == content
        with pytest.raises(modelcache.NotFoundError):
            await cache.aopen("m@2")

    asyncio.run(main())


def test_a_forked_child_reads_a_file_only_if_it_was_complete_at_the_fork(published: SlowProxy, open_cache: Any) -> None:
    # Incomplete at the fork: reads are refused in the child.
    file = partly_downloaded(published, open_cache)

    def refused() -> None:
        for read in (file.read, file.fileno, lambda: file.path, lambda: file.pread(10, SIZE - 10)):
            with pytest.raises(ModelCacheError, match="was forked"):
                read()
        file.close()

    in_child(refused)
    published.let_through(None)
    assert file.pread(100, 0) == noise(SIZE)[:100]
    deadline = time.monotonic() + 60
    while not file.is_whole:
        assert time.monotonic() < deadline
        time.sleep(0.01)

    # Complete at the fork: reads work in the child.
    def read() -> None:
        assert file.read() == noise(SIZE)
        assert os.pread(file.fileno(), 100, 0) == noise(SIZE)[:100]
        assert file.path.read_bytes() == noise(SIZE)
        file.close()

    in_child(read)
    assert file.read() == noise(SIZE)


def test_ctrl_c_ends_a_read(published: SlowProxy) -> None:
    published.let_through(SIZE - MIB)
    code = (
        "from modelcache import ModelCache\n"
        "file = ModelCache().open('m@1')\n"
        "print('open', flush=True)\n"
        "try:\n    file.readinto(bytearray(file.size))\n"
        "except KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
    )
    assert run_and_interrupt(code, "open", after_seconds=0.5) == ["interrupted"]


def test_closing_the_cache_closes_its_files_and_ends_waiting_reads(published: SlowProxy, open_cache: Any) -> None:
    cache = open_cache()
    file = partly_downloaded(published, lambda: cache)
    failures: list[BaseException] = []

    def read() -> None:
        try:
            file.read()
        except ModelCacheError as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    cache.close()
    thread.join(60)
    assert not thread.is_alive()
    assert isinstance(failures[0], modelcache.InvalidError) and "closed" in str(failures[0])
    assert file.closed
    with pytest.raises(ValueError):
        file.fileno()


def test_a_read_times_out(published: SlowProxy, open_cache: Any) -> None:
    file = partly_downloaded(published, open_cache, timeout=3)
    with pytest.raises(modelcache.UnavailableError, match="not done within"):
        file.read()
    published.let_through(None)
    deadline = time.monotonic() + 60
    while not file.is_whole:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert file.read() == noise(SIZE)


def test_bytes_without_checkpoints_are_returned_only_if_unchecked(
    published: SlowProxy, tmp_path: Path, open_cache: Any
) -> None:
    # A file that another tool uploaded has no checkpoints.
    bucket = boto3.client("s3")
    bucket.upload_file(str(tmp_path / "published/weights.bin"), "models", f"by-hand-{os.getpid()}/weights.bin")
    bucket.close()
    cache = open_cache(remote="none")
    published.let_through(SIZE - MIB)
    reference = f"s3://models/by-hand-{os.getpid()}/weights.bin"
    unchecked = cache.open(reference, unchecked=True)
    checked = cache.open(reference, timeout=3)
    assert unchecked.pread(10, SIZE - 10) == noise(SIZE)[-10:]
    with pytest.raises(modelcache.UnavailableError):
        checked.pread(10, SIZE - 10)
    published.let_through(None)
    # This waits without a timeout until the file is published.
    assert unchecked.path.read_bytes() == noise(SIZE)
    assert checked.path.read_bytes() == unchecked.read() == checked.read() == noise(SIZE)


def test_open_requires_one_file(hub: Path, open_cache: Any) -> None:
    cache = open_cache(remote="none")
    with pytest.raises(modelcache.InvalidError, match="3 files") as raised:
        cache.open("hf://org/model")
    assert raised.value.hint is not None and "config.json" in raised.value.hint
    with cache.open("hf://org/model", "config.json", revision="main") as file:
        assert json.load(file) == {"hidden_size": 384}
    with cache.open("hf://org/model@main/tokenizer/vocab.txt") as file:
        assert io.TextIOWrapper(io.BufferedReader(file), "utf-8").read() == "a\nb\n"
    with pytest.raises(modelcache.NotFoundError):
        cache.open("hf://org/model", "nothing.bin")
    with pytest.raises(modelcache.NotFoundError):
        cache.open("absent", version="1")
    with cache.open("hf://org/model", "config.json") as file, pytest.raises(TypeError, match="pickled"):
        pickle.dumps(file)

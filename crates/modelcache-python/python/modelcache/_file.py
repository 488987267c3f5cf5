"""``CachedFile``: one file of an artifact, read while it may still be coming."""

from __future__ import annotations

import asyncio
import errno
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import _calls, _native
from ._reports import Progress

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_WAIT_BYTES = 32 << 20
"""What is waited for at a time: reading goes on while the rest comes."""
_READ_BYTES = 1 << 30
"""What is read at a time; the system takes less than 2 GiB."""


class CachedFile(io.RawIOBase):
    """A file of an artifact, as :meth:`ModelCache.open` gives it: binary, read-only, seekable.

    A read waits only for the bytes it needs, without the interpreter's lock, and gives all that were asked for unless
    the file ends. It is not buffered: a read of bytes that are here costs a system call. For very many very small reads
    wrap it in ``io.BufferedReader(file)``.

    What works with a descriptor or a path (``mmap``, ``numpy.fromfile``, ``safetensors.safe_open``) gets a whole file:
    :meth:`fileno` and :attr:`path` wait until all of it is here and proven.

    Threads may share it: :meth:`pread` takes no account of the position, which :meth:`read` and :meth:`seek` move. It
    cannot be pickled. In a forked child it goes on working if it was whole; else every read raises
    :class:`ModelCacheError`.

    Reads raise what the fetch failed with, and :class:`IntegrityError` if bytes that were read before have turned out
    wrong, or may have.
    """

    def __init__(self, native: _native.File) -> None:
        super().__init__()
        self._native: _native.File | None = native
        self._position = 0
        self._name, self._artifact, self._size = native.name, native.artifact, native.size

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Its path in the artifact."""
        return self._name

    @property
    def artifact(self) -> str:
        """The artifact, as ``name@version``."""
        return self._artifact

    @property
    def size(self) -> int:
        """Its bytes, those that are still to come included."""
        return self._size

    @property
    def is_whole(self) -> bool:
        """Whether all of it is here, proven and held."""
        return self._live().is_whole

    @property
    def progress(self) -> Progress:
        """How far its fetch is, and how many bytes came from where so far; those of a fetch that others share, too."""
        phase, done, total, remote, origin = self._live().snapshot()
        return Progress(phase, done, total or None, remote, origin)

    @property
    def path(self) -> Path:
        """Where it lies, once all of it is here and proven, which is waited for. Valid until it is closed."""
        native = self._live()
        return Path(native.whole_path or _calls.wait(native.whole()))

    async def apath(self) -> Path:
        """As :attr:`path`, for asyncio."""
        native = self._live()
        return Path(native.whole_path or await _calls.awaited(native.whole()))

    def fileno(self) -> int:
        """A descriptor of it, once all of it is here and proven, which is waited for. Valid until it is closed."""
        native = self._live()
        if not native.is_whole:
            _calls.wait(native.whole())
        return _ready(native, 0, 0)

    def readable(self) -> bool:
        """Yes."""
        self._live()
        return True

    def seekable(self) -> bool:
        """Yes."""
        self._live()
        return True

    # -- reading -----------------------------------------------------------------------------------------------------

    def tell(self) -> int:
        """Where the next read begins."""
        self._live()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Moves to ``offset`` from the beginning, the position or the end, without waiting for anything."""
        self._live()
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        if whence not in bases:
            raise ValueError(f"invalid whence ({whence}, should be 0, 1 or 2)")
        if bases[whence] + offset < 0:
            raise ValueError(f"negative seek position {bases[whence] + offset}")
        self._position = bases[whence] + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """``size`` bytes, or as many as there are up to the end; all of them without a size."""
        data = self.pread(self._left() if size is None or size < 0 else size, self._position)
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        """All bytes up to the end."""
        return self.read()

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fills ``buffer``, or as much of it as there are bytes up to the end; how many."""
        native, position = self._live(), self._position
        view = memoryview(buffer)
        if view.nbytes == 0:
            return 0
        view = view.cast("B")
        end = min(position + len(view), self._size)
        at = position
        while at < end:
            stop = min(at + _WAIT_BYTES, end)
            descriptor = _ready(native, at, stop)
            at += _some(os.preadv(descriptor, [view[at - position : stop - position]], at))
        self._position = max(at, position)
        return max(at - position, 0)

    def pread(self, size: int, offset: int) -> bytes:
        """``size`` bytes at ``offset``, or as many as there are up to the end. Leaves the position as it is."""
        native, stop = self._live(), self._stop(size, offset)
        return _read(native, _ready(native, offset, stop), offset, stop) if offset < stop else b""

    async def aread(self, size: int | None = -1) -> bytes:
        """As :meth:`read`, for asyncio."""
        data = await self.apread(self._left() if size is None or size < 0 else size, self._position)
        self._position += len(data)
        return data

    async def apread(self, size: int, offset: int) -> bytes:
        """As :meth:`pread`, for asyncio. Cancelling ends this wait, and no fetch."""
        native, stop = self._live(), self._stop(size, offset)
        if offset >= stop:
            return b""
        descriptor = native.ready(offset, stop)
        while descriptor is None:
            await _calls.awaited(native.wait(offset, stop))
            descriptor = native.ready(offset, stop)
        return await asyncio.to_thread(_read, native, descriptor, offset, stop)

    def write(self, data: ReadableBuffer, /) -> NoReturn:
        """Refused: what is published never changes."""
        raise io.UnsupportedOperation("not writable")

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Lets go of it. Reads that wait in other threads fail; a fetch that nobody else waits for ends."""
        native, self._native = self._native, None
        try:
            if native is not None:
                native.close()
        finally:
            super().close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("an open file cannot be pickled: open it in the other process")

    def __repr__(self) -> str:
        state = "closed " if self.closed else ""
        return f"<{state}CachedFile {self._name!r} of {repr(self._artifact)[1:-1]}, {self._size} bytes>"

    def _live(self) -> _native.File:
        """The native half. Whoever uses a descriptor of it keeps this meanwhile: it closes with the last reference."""
        if self._native is None:
            raise ValueError("I/O operation on closed file")
        return self._native

    def _left(self) -> int:
        return max(self._size - self._position, 0)

    def _stop(self, size: int, offset: int) -> int:
        if size < 0 or offset < 0:
            raise ValueError("size and offset must not be negative")
        return min(offset + size, self._size)


def _ready(native: _native.File, start: int, stop: int) -> int:
    descriptor = native.ready(start, stop)
    while descriptor is None:
        _calls.wait(native.wait(start, stop))
        descriptor = native.ready(start, stop)
    return descriptor


def _read(native: _native.File, descriptor: int, start: int, stop: int) -> bytes:
    """The bytes, which are ready; ``native`` keeps the descriptor open meanwhile."""
    pieces, at = [], start
    while at < stop:
        pieces.append(os.pread(descriptor, min(stop - at, _READ_BYTES), at))
        at += _some(len(pieces[-1]))
    del native
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _some(count: int) -> int:
    """``count``, unless the file ends where it should not."""
    if count == 0:
        raise OSError(errno.EIO, "the file is shorter than it was")
    return count

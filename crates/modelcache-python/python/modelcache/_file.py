"""``CachedFile``: one file of an artifact, readable while it is being downloaded."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import _calls, _native
from ._reports import Progress

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_WAIT_MAX_BYTES = 32 << 20
"""Bytes that ``readinto`` waits for at a time. It copies them while the next bytes are downloaded."""
_READ_MAX_BYTES = 1 << 30
"""Bytes of one system call. Linux transfers less than 2 GiB per call."""


class CachedFile(io.RawIOBase):
    """A file of an artifact, opened with :meth:`ModelCache.open`: binary, read-only, seekable.

    A read waits only for the bytes it needs, without the interpreter's lock. It returns all bytes requested, fewer only
    at the end of the file. The file is unbuffered: each read costs a system call. For many small reads wrap it in
    ``io.BufferedReader(file)``.

    Functions that use a descriptor or a path, such as ``mmap``, ``numpy.fromfile`` and ``safetensors.safe_open``, need
    the complete file: :meth:`fileno` and :attr:`path` wait until it is downloaded and verified.

    Threads may share the file: :meth:`pread` neither uses nor changes the position, which :meth:`read` and :meth:`seek`
    move. The file cannot be pickled. In a forked child it remains usable if it was complete at the fork. Otherwise
    every read in the child raises :class:`ModelCacheError`.

    If the download failed, reads raise its error. They raise :class:`IntegrityError` if bytes that earlier reads
    returned failed verification, or may have failed it.
    """

    def __init__(self, native: _native.File) -> None:
        super().__init__()
        self._native: _native.File | None = native
        self._position = 0
        self._name, self._artifact, self._size = native.name, native.artifact, native.size

    # -- attributes --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The path of the file within the artifact."""
        return self._name

    @property
    def artifact(self) -> str:
        """The artifact, as ``name@version``."""
        return self._artifact

    @property
    def size(self) -> int:
        """The size of the complete file in bytes."""
        return self._size

    @property
    def is_whole(self) -> bool:
        """True if the complete file is on disk, verified and leased."""
        return self._open_native().is_whole

    @property
    def progress(self) -> Progress:
        """The progress of the download, with the bytes received so far by tier.

        A download that other callers share counts in full.
        """
        return Progress._of(self._open_native().snapshot())

    @property
    def path(self) -> Path:
        """The path on disk. Waits until the file is downloaded and verified. Valid until the file is closed."""
        native = self._open_native()
        return Path(native.whole_path or _calls.wait(native.whole()))

    async def apath(self) -> Path:
        """Asynchronous version of :attr:`path`."""
        native = self._open_native()
        return Path(native.whole_path or await _calls.awaited(native.whole()))

    def fileno(self) -> int:
        """Return a descriptor. Waits until the file is downloaded and verified. Valid until the file is closed."""
        native = self._open_native()
        if not native.is_whole:
            _calls.wait(native.whole())
        return _ready(native, 0, 0)

    def readable(self) -> bool:
        """Return ``True``."""
        self._open_native()
        return True

    def seekable(self) -> bool:
        """Return ``True``."""
        self._open_native()
        return True

    # -- reading -----------------------------------------------------------------------------------------------------

    def tell(self) -> int:
        """Return the position, at which the next read begins."""
        self._open_native()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position and return it. Does not wait for the download.

        :param offset: bytes relative to ``whence``.
        :param whence: ``io.SEEK_SET`` (start of the file), ``io.SEEK_CUR`` (position) or ``io.SEEK_END`` (end).
        :raises ValueError: the new position is negative, or ``whence`` is invalid.
        """
        self._open_native()
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        if whence not in bases:
            raise ValueError(f"invalid whence ({whence}, should be 0, 1 or 2)")
        if bases[whence] + offset < 0:
            raise ValueError(f"negative seek position {bases[whence] + offset}")
        self._position = bases[whence] + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Read from the position and move it behind the bytes read.

        :param size: number of bytes; negative or ``None`` for all up to the end of the file.
        :returns: ``size`` bytes, fewer only at the end of the file.
        """
        data = self.pread(self._remaining() if size is None or size < 0 else size, self._position)
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        """Read all bytes from the position to the end of the file."""
        return self.read()

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read into ``buffer`` from the position and move it behind the bytes read.

        :returns: the number of bytes read, less than the size of ``buffer`` only at the end of the file.
        """
        native, position = self._open_native(), self._position
        view = memoryview(buffer)
        if view.nbytes == 0:
            return 0
        view = view.cast("B")
        end = min(position + len(view), self._size)
        at = position
        # In steps, so that copying overlaps with the download.
        while at < end:
            stop = min(at + _WAIT_MAX_BYTES, end)
            descriptor = _ready(native, at, stop)
            at += _nonzero(os.preadv(descriptor, [view[at - position : stop - position]], at))
        self._position = max(at, position)
        return max(at - position, 0)

    def pread(self, size: int, offset: int) -> bytes:
        """Read at ``offset`` without using or moving the position.

        :param size: number of bytes.
        :param offset: where to begin, in bytes from the start of the file.
        :returns: ``size`` bytes, fewer only at the end of the file.
        :raises ValueError: ``size`` or ``offset`` is negative.
        """
        native, stop = self._open_native(), self._end_offset(size, offset)
        return _read(native, _ready(native, offset, stop), offset, stop) if offset < stop else b""

    async def aread(self, size: int | None = -1) -> bytes:
        """Asynchronous version of :meth:`read`."""
        data = await self.apread(self._remaining() if size is None or size < 0 else size, self._position)
        self._position += len(data)
        return data

    async def apread(self, size: int, offset: int) -> bytes:
        """Asynchronous version of :meth:`pread`. Cancelling the task ends the wait; the download continues."""
        native, stop = self._open_native(), self._end_offset(size, offset)
        if offset >= stop:
            return b""
        descriptor = native.ready(offset, stop)
        while descriptor is None:
            await _calls.awaited(native.wait(offset, stop))
            descriptor = native.ready(offset, stop)
        import asyncio  # Slow to import, and not needed by the command line.

        return await asyncio.to_thread(_read, native, descriptor, offset, stop)

    def write(self, data: ReadableBuffer, /) -> NoReturn:
        """Raise ``io.UnsupportedOperation``: published files are immutable."""
        raise io.UnsupportedOperation("not writable")

    # -- close -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the file and release its lease.

        Reads that wait in other threads fail. The download is cancelled unless other callers wait for it. Closing again
        has no effect.
        """
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

    def _open_native(self) -> _native.File:
        """Return the native file.

        The caller keeps this reference while it uses a descriptor of the file. The descriptor is closed when the last
        reference is gone, so that :meth:`close` in another thread does not close it during a read.
        """
        if self._native is None:
            raise ValueError("I/O operation on closed file")
        return self._native

    def _remaining(self) -> int:
        return max(self._size - self._position, 0)

    def _end_offset(self, size: int, offset: int) -> int:
        if size < 0 or offset < 0:
            raise ValueError("size and offset must not be negative")
        return min(offset + size, self._size)


def _ready(native: _native.File, start: int, stop: int) -> int:
    """Wait until the bytes ``start:stop`` can be read and return the descriptor to read them from."""
    descriptor = native.ready(start, stop)
    # `wait` returns no descriptor, so call `ready` again after it.
    while descriptor is None:
        _calls.wait(native.wait(start, stop))
        descriptor = native.ready(start, stop)
    return descriptor


def _read(native: _native.File, descriptor: int, start: int, stop: int) -> bytes:
    """Read the bytes ``start:stop``, which are available. The argument ``native`` keeps the descriptor open."""
    pieces, at = [], start
    while at < stop:
        pieces.append(os.pread(descriptor, min(stop - at, _READ_MAX_BYTES), at))
        at += _nonzero(len(pieces[-1]))
    del native
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _nonzero(count: int) -> int:
    """Return ``count``, the number of bytes read, or raise ``OSError`` if it is 0: the file was truncated."""
    if count == 0:
        raise OSError(errno.EIO, "unexpected end of file: the cached file is shorter than its recorded size")
    return count

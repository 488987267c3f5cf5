"""``ModelCache``: the cache, as programs in Python use it."""

from __future__ import annotations

import atexit
import contextlib
import getpass
import json
import os
import socket
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from . import _calls, _logging, _native
from ._calls import ProgressArgument
from ._errors import ModelCacheError, from_native
from ._file import CachedFile
from ._metrics import Metrics
from ._reports import CachedArtifact, EvictReport, PinRecord, PutReport, Resolved, Stats, TagReport, Verified

_StrPath = str | os.PathLike[str]
_Patterns = str | Sequence[str] | None
Reference = str | tuple[str, str]
"""``"name@version"``, a URI, or a pair of name and version."""

_CLOSE_SECONDS = 10.0


class Lease:
    """A hold on an artifact: it cannot be evicted until this is released, or the ``with`` block ends."""

    def __init__(self, native: _native.Lease) -> None:
        self._native = native

    @property
    def path(self) -> Path:
        """The file, or the folder of a tree."""
        return Path(self._native.path)

    @property
    def name(self) -> str:
        """The artifact's name."""
        return self._native.name

    @property
    def version(self) -> str:
        """Its version: of a revision or tag, the one that it meant."""
        return self._native.version

    @property
    def report(self) -> dict[str, Any]:
        """How it came here: ``from`` (``disk``, ``remote``, ``origin``), ``bytes`` by tier, ``seconds`` by phase."""
        report: dict[str, Any] = json.loads(self._native.report)
        return report

    def release(self) -> None:
        """Lets go of it; again changes nothing."""
        self._native.release()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<Lease on {_printable(self.name)}@{_printable(self.version)} at {str(self.path)!r}>"


class ModelCache:
    """A cache over one local directory. Safe to share between threads, and open in a forked child.

    Every argument that is ``None`` comes from the environment (``MODEL_CACHE_DIR``, ``MODEL_CACHE_S3_BUCKET``, …), else
    from the configuration file, else its default: the same settings as the command line's. Opening asks no network.

    What :meth:`get` lends stays on disk until :meth:`close`, the end of a ``with`` block, or the interpreter's end.

    :param cache_dir: the local directory.
    :param s3_bucket: short for ``remote="s3://BUCKET"``.
    :param max_bytes: most bytes that the directory may take: a number, ``"14GB"``, ``"1.5TiB"``, ``"80%"``.
    :param remote: ``"s3://bucket/prefix"``, ``"file:///folder"``, or ``"none"``.
    :param origin: where a bare ``name@version`` comes from: a template like ``"hf://{name}@{version}"``, or several.
    :param min_free_bytes: never leave less than this free on the filesystem.
    :param lower_dir: a cache underneath that is only read.
    :param shared: ``"off"``, ``"group"`` or ``"world"``: which users share the directory.
    :param remote_mode: ``"rw"`` or ``"ro"``.
    :param remote_options: options of the object store by name, such as ``region`` or ``endpoint``.
    :param on_remote_down: ``"origin"`` or ``"fail"``.
    :param backfill: when the remote gets what came from an origin: ``"background"`` (the default here), ``"wait"``,
        ``"later"``, ``"never"``.
    :param require_checksum: refuse files of which nobody states a checksum.
    :param offline: never ask an origin.
    :param ref_ttl: seconds for which a resolved revision or tag is fresh.
    :param start_jitter: seconds up to which the first remote call is put off at random.
    :param retry_deadline: seconds for which a failing service is tried.
    :param read_timeout: seconds for which a silent server is waited for.
    :param token: the token for the Hugging Face Hub; ``False``: none.
    :param config: the configuration file to read, instead of the usual ones.
    :raises InvalidError: a setting that cannot be used (also a ``ValueError``).
    :raises DirectoryError: the directory cannot be made or used.
    """

    def __init__(
        self,
        cache_dir: _StrPath | None = None,
        s3_bucket: str | None = None,
        max_bytes: int | str | None = None,
        remote: str | None = None,
        origin: str | Sequence[str] | None = None,
        *,
        min_free_bytes: int | str | None = None,
        lower_dir: _StrPath | None = None,
        shared: Literal["off", "group", "world"] | None = None,
        remote_mode: Literal["rw", "ro"] | None = None,
        remote_options: Mapping[str, str | int | bool] | None = None,
        on_remote_down: Literal["origin", "fail"] | None = None,
        backfill: Literal["wait", "background", "later", "never"] | None = None,
        require_checksum: bool | None = None,
        offline: bool | None = None,
        ref_ttl: float | str | None = None,
        start_jitter: float | str | None = None,
        retry_deadline: float | str | None = None,
        read_timeout: float | str | None = None,
        token: str | bool | None = None,
        config: _StrPath | None = None,
    ) -> None:
        given: dict[str, Any] = {
            name: value for name, value in locals().items() if name != "self" and not name.startswith("__")
        }
        self._given = given
        arguments = dict(given)
        config, token = arguments.pop("config"), _token(arguments.pop("token"))
        options = arguments.pop("remote_options")
        keys = {"cache_dir": "dir"}
        self._native = _native.Cache(
            {keys.get(name, name): (_text(value), name) for name, value in arguments.items() if value is not None},
            list(os.environb.items()),
            None if config is None else os.fsdecode(config),
            None if options is None else {name: _text(value) for name, value in options.items()},
            token,
        )
        _logging.hand_over()
        self._metrics = Metrics(self._native)
        self._files: weakref.WeakSet[CachedFile] = weakref.WeakSet()
        _OPEN[id(self)] = self

    @property
    def cache_dir(self) -> Path:
        """The local directory."""
        return Path(self._native.dir)

    @property
    def remote(self) -> str | None:
        """The remote's address, if there is one."""
        return self._native.remote

    @property
    def metrics(self) -> Metrics:
        """What this cache did since it was opened."""
        return self._metrics

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._native.is_open

    # -- get ---------------------------------------------------------------------------------------------------------

    def get(
        self,
        reference: str,
        version: str | None = None,
        *,
        revision: str | None = None,
        allow_patterns: _Patterns = None,
        ignore_patterns: _Patterns = None,
        local_dir: _StrPath | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_refresh: bool = False,
        verify: bool = False,
        timeout: float | None = None,
        progress: ProgressArgument | None = None,
    ) -> Path:
        """Makes an artifact local and gives its path: of the file, or of the folder of a tree.

        The nearest place that has it gives it, and the nearer ones keep it. Every byte is checked. Whoever asks for the
        same at the same time, in this process or another, waits for one fetch. The path is held until the cache closes.

        :param reference: a name (with ``version``), ``"name@version"``, ``"hf://org/model"``, ``"s3://bucket/prefix"``,
            ``"https://host/file"``, ``"file:///folder"``, ``"models:/name/3"``, ``"oci://registry/repo:tag"``.
        :param version: the version, or a tag.
        :param revision: branch, tag or commit, of references that have one; of a bare name, its version.
        :param allow_patterns: only files that match one of these (``fnmatch``; ``*`` crosses folders).
        :param ignore_patterns: no files that match one of these.
        :param local_dir: put the files into this folder, and give that path instead. It is replaced as a whole; one
            that holds anything else is refused. It is the caller's: nothing is held.
        :param token: the Hub's token for this call; ``False``: none.
        :param local_files_only: ask neither remote nor origin.
        :param force_refresh: ask what a revision or tag means, however fresh the last answer is.
        :param verify: read what is here in full and compare it with its digests first.
        :param timeout: seconds after which to give up; what has come by then is kept for the next call.
        :param progress: called with a :class:`Progress` about ten times a second on the calling thread, or a class
            like ``tqdm.tqdm``. It may use the cache; what it raises ends the call.
        :raises NotFoundError: no tier has it (also a ``FileNotFoundError``).
        :raises UnauthorizedError: credentials are missing or refused, or the repository is gated.
        :raises UnavailableError: a service failed, or it took longer than ``timeout``.
        :raises IntegrityError: bytes do not match their digest.
        :raises FullError: there is no room for it.
        :raises DirectoryError: the directory cannot be written.
        :raises InvalidError: the reference or an argument is wrong (also a ``ValueError``).
        """
        call = self._get(
            reference, version, revision, allow_patterns, ignore_patterns, local_dir, token, local_files_only,
            force_refresh, verify, timeout, True,
        )  # fmt: skip
        return Path(_calls.wait(call, progress, _label(reference, version)))

    async def aget(
        self,
        reference: str,
        version: str | None = None,
        *,
        revision: str | None = None,
        allow_patterns: _Patterns = None,
        ignore_patterns: _Patterns = None,
        local_dir: _StrPath | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_refresh: bool = False,
        verify: bool = False,
        timeout: float | None = None,
        progress: ProgressArgument | None = None,
    ) -> Path:
        """As :meth:`get`, for asyncio. Cancelling ends this call, and never a fetch that others wait for."""
        call = self._get(
            reference, version, revision, allow_patterns, ignore_patterns, local_dir, token, local_files_only,
            force_refresh, verify, timeout, True,
        )  # fmt: skip
        return Path(await _calls.awaited(call, progress, _label(reference, version)))

    def lease(
        self,
        reference: str,
        version: str | None = None,
        *,
        revision: str | None = None,
        allow_patterns: _Patterns = None,
        ignore_patterns: _Patterns = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        timeout: float | None = None,
        progress: ProgressArgument | None = None,
    ) -> Lease:
        """Makes an artifact local and holds it as long as the :class:`Lease` says: ``with cache.lease(…) as path:``.

        Arguments and errors as for :meth:`get`.
        """
        call = self._get(
            reference, version, revision, allow_patterns, ignore_patterns, None, token, local_files_only,
            False, False, timeout, False,
        )  # fmt: skip
        return Lease(_calls.wait(call, progress, _label(reference, version)))

    async def alease(
        self,
        reference: str,
        version: str | None = None,
        *,
        revision: str | None = None,
        allow_patterns: _Patterns = None,
        ignore_patterns: _Patterns = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        timeout: float | None = None,
        progress: ProgressArgument | None = None,
    ) -> Lease:
        """As :meth:`lease`, for asyncio."""
        call = self._get(
            reference, version, revision, allow_patterns, ignore_patterns, None, token, local_files_only,
            False, False, timeout, False,
        )  # fmt: skip
        return Lease(await _calls.awaited(call, progress, _label(reference, version)))

    def _get(
        self,
        reference: str,
        version: str | None,
        revision: str | None,
        allow_patterns: _Patterns,
        ignore_patterns: _Patterns,
        local_dir: _StrPath | None,
        token: str | bool | None,
        local_files_only: bool,
        refresh: bool,
        verify: bool,
        timeout: float | None,
        hold: bool,
    ) -> _native.Call:
        return self._native.get(
            {
                "reference": reference,
                "version": version,
                "revision": revision,
                "include": _patterns(allow_patterns),
                "exclude": _patterns(ignore_patterns),
                "into": None if local_dir is None else os.fsdecode(local_dir),
                "token": _token(token),
                "local_files_only": local_files_only,
                "refresh": refresh,
                "verify": verify,
                "timeout_seconds": timeout,
                "hold": hold,
            }
        )

    # -- open ----------------------------------------------------------------------------------------------------------

    def open(
        self,
        reference: str,
        path: str | None = None,
        *,
        version: str | None = None,
        revision: str | None = None,
        unchecked: bool = False,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_refresh: bool = False,
        timeout: float | None = None,
        progress: ProgressArgument | None = None,
    ) -> CachedFile:
        """Opens one file of an artifact, here or not, for reading: a read waits only for the bytes that it needs.

        What a read waits for is asked for before the rest, which goes on coming meanwhile. Whoever gets or opens the
        same at the same time shares one fetch. Once the file is whole it is held until it is closed; closed before
        that, the fetch ends unless somebody else waits for it, and what came is kept for the next one.

        Bytes are given before the whole file is proven only where a ladder vouches for each part: one that was proven
        on this disk, or one from the remote's manifest where that manifest is what the fetch goes by. Otherwise, as for
        what comes from an origin for the first time, a read waits until all of it is proven. Where another process
        fetches the artifact, this call waits until that is done.

        :param reference: as for :meth:`get`.
        :param path: which file of the artifact; may be left out where there is only one, or the reference names it.
        :param version: the version, or a tag, of a bare name.
        :param revision: branch, tag or commit, of references that have one; of a bare name, its version.
        :param unchecked: give bytes as soon as they are written, right or wrong. A file that turns out wrong fails the
            next read, as :class:`IntegrityError`.
        :param token: the Hub's token for this call; ``False``: none.
        :param local_files_only: ask neither remote nor origin.
        :param force_refresh: ask what a revision or tag means, however fresh the last answer is.
        :param timeout: seconds after which to give up, for this call and for each wait of a read.
        :param progress: as for :meth:`get`, of this call; afterwards :attr:`CachedFile.progress` tells.
        :raises InvalidError: several files might be meant, or an argument is wrong (also a ``ValueError``).
        :raises ModelCacheError: as for :meth:`get`.
        """
        call = self._open_file(
            reference, path, version, revision, unchecked, token, local_files_only, force_refresh, timeout
        )
        return self._opened(_calls.wait(call, progress, _label(reference, version)))

    async def aopen(
        self,
        reference: str,
        path: str | None = None,
        *,
        version: str | None = None,
        revision: str | None = None,
        unchecked: bool = False,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_refresh: bool = False,
        timeout: float | None = None,
        progress: ProgressArgument | None = None,
    ) -> CachedFile:
        """As :meth:`open`, for asyncio. Its reads are ``await file.aread(…)`` and ``await file.apread(…)``."""
        call = self._open_file(
            reference, path, version, revision, unchecked, token, local_files_only, force_refresh, timeout
        )
        return self._opened(await _calls.awaited(call, progress, _label(reference, version)))

    def _open_file(
        self,
        reference: str,
        path: str | None,
        version: str | None,
        revision: str | None,
        unchecked: bool,
        token: str | bool | None,
        local_files_only: bool,
        refresh: bool,
        timeout: float | None,
    ) -> _native.Call:
        return self._native.open_file(
            {
                "reference": reference,
                "path": path,
                "version": version,
                "revision": revision,
                "unchecked": unchecked,
                "token": _token(token),
                "local_files_only": local_files_only,
                "refresh": refresh,
                "timeout_seconds": timeout,
            }
        )

    def _opened(self, native: _native.File) -> CachedFile:
        file = CachedFile(native)
        self._files.add(file)
        return file

    # -- prewarm -----------------------------------------------------------------------------------------------------

    def prewarm(
        self, references: Iterable[Reference], *, jobs: int = 4, progress: ProgressArgument | None = None
    ) -> list[Path]:
        """Fills a list ahead of time and holds it. It is refused as a whole, before a byte moves, if it does not fit.

        :param references: ``"name@version"``, URIs, or pairs of name and version.
        :param jobs: artifacts filled at once.
        :returns: the paths, in the order given.
        :raises FullError: the list cannot all be on disk at once.
        :raises ModelCacheError: some failed; the others were filled. The error is the first one's, and its ``failures``
            has all of them by reference.
        """
        wanted = _wanted(references)
        return _prewarmed(wanted, _calls.wait(self._native.prewarm(wanted, jobs), progress, "prewarm"))

    async def aprewarm(
        self, references: Iterable[Reference], *, jobs: int = 4, progress: ProgressArgument | None = None
    ) -> list[Path]:
        """As :meth:`prewarm`, for asyncio."""
        wanted = _wanted(references)
        return _prewarmed(wanted, await _calls.awaited(self._native.prewarm(wanted, jobs), progress, "prewarm"))

    # -- put, evict, tag -----------------------------------------------------------------------------------------------

    def put(
        self,
        name: str,
        version: str,
        path: _StrPath,
        *,
        tag: str | None = None,
        tier: Literal["all", "remote"] = "all",
        expect: str | None = None,
        sidecar: bool = False,
        force: bool = False,
        progress: ProgressArgument | None = None,
    ) -> PutReport:
        """Publishes a file or folder on disk and, where there is one, on the remote. A version never changes.

        :param tag: then make this tag mean the version.
        :param tier: ``"remote"`` keeps no copy on this disk.
        :param expect: refuse what is of another format: ``"safetensors"``, ``"gguf"``, ``"onnx"``, ``"tar.gz"``, …
        :param sidecar: write ``FILE.sha256`` beside every object on the remote.
        :param force: replace other content under the same key, or a damaged copy.
        :raises ConflictError: the version has other content, or another writer is at work on it.
        :raises IntegrityError: it is not of the format expected.
        """
        call = self._native.put(
            name, version, os.fsdecode(path), tag=tag, tier=tier, expect=expect, sidecar=sidecar, force=force
        )
        return PutReport._parse(_calls.wait(call, progress, _label(name, version)))

    async def aput(
        self,
        name: str,
        version: str,
        path: _StrPath,
        *,
        tag: str | None = None,
        tier: Literal["all", "remote"] = "all",
        expect: str | None = None,
        sidecar: bool = False,
        force: bool = False,
        progress: ProgressArgument | None = None,
    ) -> PutReport:
        """As :meth:`put`, for asyncio."""
        call = self._native.put(
            name, version, os.fsdecode(path), tag=tag, tier=tier, expect=expect, sidecar=sidecar, force=force
        )
        return PutReport._parse(await _calls.awaited(call, progress, _label(name, version)))

    def evict(
        self,
        name: str,
        version: str | None = None,
        *,
        tier: Literal["all", "disk", "remote"] = "all",
        dry_run: bool = False,
    ) -> EvictReport:
        """Removes an artifact from disk and remote, and the tags that mean it. Nobody is asked.

        What this cache itself holds of it is let go first.

        :param tier: remove it from this one only.
        :param dry_run: only tell what would go.
        :raises ConflictError: somebody else uses it, or it is pinned.
        """
        return EvictReport._parse(_calls.wait(self._native.evict(name, version, tier, dry_run)))

    async def aevict(
        self,
        name: str,
        version: str | None = None,
        *,
        tier: Literal["all", "disk", "remote"] = "all",
        dry_run: bool = False,
    ) -> EvictReport:
        """As :meth:`evict`, for asyncio."""
        return EvictReport._parse(await _calls.awaited(self._native.evict(name, version, tier, dry_run)))

    def tag(self, name: str, version: str, tag: str) -> TagReport:
        """Makes a tag on the remote mean a version: a rollout, or a rollback.

        :raises InvalidError: there is no remote, or the tag is a version.
        :raises NotFoundError: the remote does not have the version.
        """
        return TagReport._parse(_calls.wait(self._native.tag(name, version, tag)))

    async def atag(self, name: str, version: str, tag: str) -> TagReport:
        """As :meth:`tag`, for asyncio."""
        return TagReport._parse(await _calls.awaited(self._native.tag(name, version, tag)))

    def untag(self, name: str, tag: str) -> TagReport:
        """Removes a tag; the version stays."""
        return TagReport._parse(_calls.wait(self._native.untag(name, tag)))

    async def auntag(self, name: str, tag: str) -> TagReport:
        """As :meth:`untag`, for asyncio."""
        return TagReport._parse(await _calls.awaited(self._native.untag(name, tag)))

    # -- look ----------------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """The budget, what is used of it, and what is free."""
        return Stats._parse(_calls.wait(self._native.stats()))

    async def astats(self) -> Stats:
        """As :meth:`stats`, for asyncio."""
        return Stats._parse(await _calls.awaited(self._native.stats()))

    def list_artifacts(self, *, remote: bool = False) -> list[CachedArtifact]:
        """The artifacts on disk, or on the remote, by name."""
        return [CachedArtifact._from(row) for row in json.loads(_calls.wait(self._native.artifacts(remote)))]

    async def alist_artifacts(self, *, remote: bool = False) -> list[CachedArtifact]:
        """As :meth:`list_artifacts`, for asyncio."""
        return [CachedArtifact._from(row) for row in json.loads(await _calls.awaited(self._native.artifacts(remote)))]

    def resolve(
        self,
        reference: str,
        version: str | None = None,
        *,
        revision: str | None = None,
        force_refresh: bool = False,
        local_files_only: bool = False,
    ) -> Resolved:
        """What a reference means now, pinned. Fetches no file."""
        call = self._native.resolve(reference, version, revision, force_refresh, local_files_only)
        return Resolved._parse(_calls.wait(call))

    async def aresolve(
        self,
        reference: str,
        version: str | None = None,
        *,
        revision: str | None = None,
        force_refresh: bool = False,
        local_files_only: bool = False,
    ) -> Resolved:
        """As :meth:`resolve`, for asyncio."""
        call = self._native.resolve(reference, version, revision, force_refresh, local_files_only)
        return Resolved._parse(await _calls.awaited(call))

    # -- tend ----------------------------------------------------------------------------------------------------------

    def pin(
        self,
        reference: str,
        version: str | None = None,
        *,
        seconds: float | None = None,
        reason: str | None = None,
    ) -> PinRecord:
        """Keeps an artifact that is on disk there, for ``seconds`` or until :meth:`unpin`; across processes.

        :raises NotFoundError: it is not on disk.
        """
        return _pinned(_calls.wait(self._native.pin(reference, version, seconds, _caller(), reason)))

    async def apin(
        self,
        reference: str,
        version: str | None = None,
        *,
        seconds: float | None = None,
        reason: str | None = None,
    ) -> PinRecord:
        """As :meth:`pin`, for asyncio."""
        return _pinned(await _calls.awaited(self._native.pin(reference, version, seconds, _caller(), reason)))

    def unpin(self, reference: str, version: str | None = None) -> None:
        """Takes a pin off; without one, does nothing."""
        _calls.wait(self._native.unpin(reference, version))

    async def aunpin(self, reference: str, version: str | None = None) -> None:
        """As :meth:`unpin`, for asyncio."""
        await _calls.awaited(self._native.unpin(reference, version))

    def verify(
        self,
        references: Iterable[str] | str = (),
        *,
        tier: Literal["disk", "remote", "all"] = "disk",
        repair: bool = False,
        bytes_per_second: int | None = None,
        progress: ProgressArgument | None = None,
    ) -> list[Verified]:
        """Reads what is kept in full and compares it with its digests; all of it, where no reference is given.

        A bad copy on disk is never served again; ``repair`` fetches it anew at once.
        """
        call = self._native.verify(_references(references), tier, repair, bytes_per_second)
        return [Verified._from(row) for row in json.loads(_calls.wait(call, progress, "verify"))]

    async def averify(
        self,
        references: Iterable[str] | str = (),
        *,
        tier: Literal["disk", "remote", "all"] = "disk",
        repair: bool = False,
        bytes_per_second: int | None = None,
        progress: ProgressArgument | None = None,
    ) -> list[Verified]:
        """As :meth:`verify`, for asyncio."""
        call = self._native.verify(_references(references), tier, repair, bytes_per_second)
        return [Verified._from(row) for row in json.loads(await _calls.awaited(call, progress, "verify"))]

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self, timeout: float = _CLOSE_SECONDS) -> None:
        """Lets go of everything that was lent, and closes the files that were opened.

        Uploads in the background are waited for ``timeout`` seconds.

        What has not reached the remote by then is written down, and a later run brings it there. Again changes nothing.
        """
        self._let_go()
        _calls.wait(self._native.close(timeout))

    async def aclose(self, timeout: float = _CLOSE_SECONDS) -> None:
        """As :meth:`close`, for asyncio."""
        self._let_go()
        await _calls.awaited(self._native.close(timeout))

    def _let_go(self) -> None:
        _OPEN.pop(id(self), None)
        for file in list(self._files):
            file.close()

    def __enter__(self) -> ModelCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> ModelCache:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the same anew, with the arguments given here and its own environment."""
        return _again, (self._given,)

    def __repr__(self) -> str:
        state = "closed " if self.closed else ""
        return f"<{state}ModelCache at {str(self.cache_dir)!r}, remote {_printable(str(self.remote))}>"


def _printable(text: str) -> str:
    """``text`` without characters that a terminal obeys or does not show."""
    return repr(text)[1:-1]


_OPEN: dict[int, ModelCache] = {}
"""Caches that were not closed: a path that was lent is held, even where nobody keeps the cache that lent it."""


def _close_all() -> None:
    _native.begin_end()
    try:
        for cache in list(_OPEN.values()):
            with contextlib.suppress(ModelCacheError):
                cache.close()
    finally:
        _native.shut_down()
        _logging.hand_over()


atexit.register(_close_all)


def _forked() -> None:
    """Runs in a child that was forked just now."""
    _native.forked()
    for cache in list(_OPEN.values()):
        cache._native.forked()


os.register_at_fork(after_in_child=_forked)


def _again(given: dict[str, Any]) -> ModelCache:
    return ModelCache(**given)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(str(each) for each in value)
    return str(value)


def _token(token: str | bool | None) -> str | None:
    """A token as the native half takes it: empty for none at all, ``None`` for the configured one."""
    if token is False:
        return ""
    return None if token is None or token is True else token


def _patterns(patterns: _Patterns) -> list[str]:
    if patterns is None:
        return []
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _references(references: Iterable[str] | str) -> list[str]:
    return [references] if isinstance(references, str) else list(references)


def _wanted(references: Iterable[Reference]) -> list[tuple[str, str | None]]:
    references = [references] if isinstance(references, str) else references
    return [(each, None) if isinstance(each, str) else each for each in references]


def _label(reference: str, version: str | None) -> str:
    return reference if version is None else f"{reference}@{version}"


def _prewarmed(wanted: list[tuple[str, str | None]], answer: str) -> list[Path]:
    rows = json.loads(answer)
    failures = dict(_failures(wanted, rows))
    if failures:
        first = next(iter(failures.values()))
        first.failures = failures
        raise first
    return [Path(row["path"]) for row in rows]


def _failures(
    wanted: list[tuple[str, str | None]], rows: list[dict[str, Any]]
) -> Iterator[tuple[str, ModelCacheError]]:
    for (reference, version), row in zip(wanted, rows, strict=True):
        if "kind" in row:
            about = (row["hint"], row["artifact"], row["tier"], row["retry_after"], row["transient"])
            yield _label(reference, version), from_native(row["kind"], row["message"], about)


def _pinned(answer: str) -> PinRecord:
    return PinRecord._from(json.loads(answer)["pin"])


def _caller() -> str | None:
    """``user@host``, for those who find the pin in the way."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):
        return None

"""``ModelCache``, the main class of the package."""

from __future__ import annotations

import atexit
import contextlib
import getpass
import json
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, runtime_checkable

from . import _arguments, _calls, _logging, _native
from ._calls import Pending
from ._errors import InvalidError, ModelCacheError, from_native
from ._file import CachedFile
from ._metrics import Metrics
from ._progress import ProgressArgument
from ._reports import CachedArtifact, EvictReport, PinRecord, PutReport, ResolvedReference, Stats, TagReport, VerifyReport

_StrPath = str | os.PathLike[str]
_Patterns = str | Sequence[str] | None
Reference = str | tuple[str, str]
"""``"name@version"``, a URI, or a pair of name and version."""


@runtime_checkable
class SupportsRead(Protocol):
    """A file that is open for reading in binary mode, or any object with such a method ``read``."""

    def read(self, size: int = ..., /) -> bytes: ...


_CLOSE_SECONDS = 10.0
"""Default of the time limit of :meth:`ModelCache.close`."""


class Lease:
    """A lease on an artifact, obtained from :meth:`ModelCache.lease`.

    The artifact cannot be evicted until :meth:`release`, or until the end of the ``with`` block, which yields the path.
    """

    def __init__(self, native: _native.Lease) -> None:
        self._native = native

    @property
    def path(self) -> Path:
        """The path of the file, or of the folder if the artifact is a folder."""
        return Path(self._native.path)

    @property
    def name(self) -> str:
        """The name of the artifact."""
        return self._native.name

    @property
    def version(self) -> str:
        """The version of the artifact. A revision or tag appears as the version that it resolved to."""
        return self._native.version

    @property
    def report(self) -> dict[str, Any]:
        """The report of the get.

        Its keys are those of ``modelcache get --json``, see docs/json.md. They include ``from`` (farthest tier that
        bytes came from: ``disk``, ``remote``, ``origin``), ``bytes`` by tier and ``seconds`` by phase.
        """
        report: dict[str, Any] = json.loads(self._native.report)
        return report

    def release(self) -> None:
        """Release the lease. Releasing it again has no effect."""
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
    """A cache over one local directory. Thread-safe, and usable in forked child processes.

    An argument that is ``None`` takes its value from the environment (``MODEL_CACHE_DIR``, ``MODEL_CACHE_S3_BUCKET``,
    …), else from the configuration file, else its default. The command line has the same settings. Opening a cache
    sends no request.

    Artifacts returned by :meth:`get` are leased, so that they stay on disk, until :meth:`close`, the end of the
    ``with`` block, or the end of the interpreter.

    :param cache_dir: the local directory.
    :param s3_bucket: short for ``remote="s3://BUCKET"``.
    :param max_bytes: maximum size of the local directory: a number of bytes, ``"14GB"``, ``"1.5TiB"`` or ``"80%"``.
    :param remote: URL of the shared object store: ``"s3://bucket/prefix"``, ``"file:///folder"``, or ``"none"``.
    :param origin: where to find a bare ``name@version`` that the remote does not have: a template such as
        ``"hf://{name}@{version}"``, or several to try in order.
    :param min_free_bytes: free space to leave on the filesystem, in bytes or as a percentage.
    :param lower_dir: a second cache directory that is only read.
    :param shared: the users that share the directory: ``"off"``, ``"group"`` or ``"world"``.
    :param layout: with ``"hub"``, make artifacts of the Hugging Face Hub available as a Hugging Face cache in the folder
        ``hub`` of the directory; paths of such artifacts are in that folder.
    :param extract: whether :meth:`get` extracts an archive and returns the folder of its files: ``"never"``, ``"auto"``
        (if the file is one) or ``"always"`` (anything else is an error).
    :param keep_archive: keep an archive on disk after it was extracted.
    :param remote_mode: ``"rw"``, or ``"ro"`` to only read the remote.
    :param remote_options: options of the object store by name, such as ``region`` or ``endpoint``.
    :param on_remote_down: while the remote is unavailable, use the origin (``"origin"``) or fail (``"fail"``).
    :param backfill: when to upload artifacts from an origin to the remote: ``"wait"`` (before the call returns),
        ``"background"`` (the default in Python), ``"later"`` (in a later run) or ``"never"``.
    :param require_checksum: refuse files for which no checksum is available.
    :param forbid: files that are neither published nor returned: formats of content such as ``"pickle"``, and patterns of
        names such as ``"*.pkl"``.
    :param offline: do not contact origins over the network.
    :param ref_ttl: seconds for which a resolved revision or tag is considered current.
    :param start_jitter: upper bound in seconds of a random delay before the first request to a remote or origin.
    :param retry_deadline: seconds after the first failure during which a request is retried.
    :param read_timeout: longest silence of a server, in seconds.
    :param token: the token for the Hugging Face Hub; ``False`` to send none.
    :param config: the configuration file to read instead of the default ones.
    :raises InvalidError: a setting is invalid (also a ``ValueError``).
    :raises DirectoryError: the directory cannot be created or used.
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
        layout: Literal["files", "hub"] | None = None,
        extract: Literal["auto", "always", "never"] | None = None,
        keep_archive: bool | None = None,
        remote_mode: Literal["rw", "ro"] | None = None,
        remote_options: Mapping[str, str | int | bool] | None = None,
        on_remote_down: Literal["origin", "fail"] | None = None,
        backfill: Literal["wait", "background", "later", "never"] | None = None,
        require_checksum: bool | None = None,
        forbid: str | Sequence[str] | None = None,
        offline: bool | None = None,
        ref_ttl: float | str | None = None,
        start_jitter: float | str | None = None,
        retry_deadline: float | str | None = None,
        read_timeout: float | str | None = None,
        token: str | bool | None = None,
        config: _StrPath | None = None,
    ) -> None:
        # This must be the first statement, so that `locals()` contains only the arguments.
        arguments: dict[str, Any] = {
            name: value for name, value in locals().items() if name != "self" and not name.startswith("__")
        }
        self._arguments = arguments
        try:
            self._native = self._open(dict(arguments))
        except TypeError as error:
            _arguments.explain(error, "ModelCache", ModelCache.__init__, (self,), arguments)
            raise
        # Opening may have logged warnings about settings.
        _logging.forward_records()
        self._metrics = Metrics(self._native)
        self._files: weakref.WeakSet[CachedFile] = weakref.WeakSet()
        _OPEN[id(self)] = self

    @staticmethod
    def _open(settings: dict[str, Any]) -> _native.Cache:
        config, token = settings.pop("config"), _native_token(settings.pop("token"))
        options = settings.pop("remote_options")
        keys = {"cache_dir": "dir"}
        return _native.Cache(
            {
                keys.get(name, name): (_setting_text(value), name)
                for name, value in settings.items()
                if value is not None
            },
            list(os.environb.items()),
            None if config is None else os.fsdecode(config),
            None if options is None else {name: _setting_text(value) for name, value in dict(options).items()},
            token,
        )

    @property
    def cache_dir(self) -> Path:
        """The local directory."""
        return Path(self._native.dir)

    @property
    def remote(self) -> str | None:
        """The URL of the remote, or ``None`` if there is no remote."""
        return self._native.remote

    @property
    def metrics(self) -> Metrics:
        """The counters of this cache since it was opened."""
        return self._metrics

    @property
    def closed(self) -> bool:
        """True if the cache is closed."""
        return not self._native.is_open

    # -- get ---------------------------------------------------------------------------------------------------------

    @_calls.blocking
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
        extract: Literal["auto", "always", "never"] | None = None,
        timeout: float | None = None,
        progress: ProgressArgument | None = None,
    ) -> Pending[Path]:
        """Download an artifact unless it is on disk, and return its path.

        The artifact comes from the nearest tier that has it and is stored in the nearer ones. Every byte is verified.
        Concurrent calls for the same artifact, in this process or in others, share one download. The artifact is leased
        until the cache is closed.

        :param reference: a name (with ``version``), ``"name@version"``, ``"hf://org/model"``, ``"s3://bucket/prefix"``,
            ``"https://host/file"``, ``"file:///folder"``, ``"models:/name/3"`` or ``"oci://registry/repo:tag"``.
        :param version: the version, or a tag that points to one.
        :param revision: branch, tag or commit, for references that have revisions; for a bare name, its version.
        :param allow_patterns: get only files that match one of these patterns (``fnmatch``; ``*`` also matches ``/``).
        :param ignore_patterns: skip files that match one of these patterns.
        :param local_dir: copy or link the files into this folder and return its path. The folder is replaced as a
            whole; a mount point is filled file by file. It is refused if it has content that did not come from the cache. No lease is kept for it.
        :param token: the Hub token for this call; ``False`` to send none.
        :param local_files_only: use only the local disk, and contact neither remote nor origin.
        :param force_refresh: resolve the revision or tag again, even if the last resolution is still current.
        :param verify: first read the files on disk in full and compare them with their digests.
        :param extract: whether an archive is extracted, and the folder of its files returned; ``None`` for the value of
            the cache.
        :param timeout: seconds after which the call fails. The bytes received are kept for the next call.
        :param progress: ``True`` to show the progress: as a bar in a notebook, as a line on a terminal, and elsewhere
            as lines on standard error. Or a class such as ``tqdm.tqdm``. Or a function that is called with a
            :class:`Progress` about ten times a second on the calling thread; it may use the cache, and an exception in
            it ends the call.
        :returns: the path of the file, or of the folder if the artifact is a folder.
        :raises NotFoundError: no tier has the artifact (also a ``FileNotFoundError``).
        :raises UnauthorizedError: credentials are missing or refused, or the repository is gated.
        :raises UnavailableError: a service failed, or the call took longer than ``timeout``.
        :raises IntegrityError: bytes do not match their digest.
        :raises FullError: the disk has no room for the artifact.
        :raises DirectoryError: the directory cannot be written.
        :raises InvalidError: the reference or an argument is invalid (also a ``ValueError``).
        """
        call = self._get(
            reference, version, revision, allow_patterns, ignore_patterns, local_dir, token, local_files_only,
            force_refresh, verify, extract, timeout, True,
        )  # fmt: skip
        return Pending(call, Path, progress, _reference_text(reference, version))

    aget = _calls.asynchronous(
        get, "Cancelling ends this call. A download that other callers wait for continues."
    )

    @_calls.blocking
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
        extract: Literal["auto", "always", "never"] | None = None,
        timeout: float | None = None,
        progress: ProgressArgument | None = None,
    ) -> Pending[Lease]:
        """Download an artifact unless it is on disk, and return a lease on it: ``with cache.lease(…) as path:``.

        Arguments and errors are those of :meth:`get`.

        :returns: a :class:`Lease`, which the caller releases.
        """
        call = self._get(
            reference, version, revision, allow_patterns, ignore_patterns, None, token, local_files_only,
            False, False, extract, timeout, False,
        )  # fmt: skip
        return Pending(call, Lease, progress, _reference_text(reference, version))

    alease = _calls.asynchronous(lease)

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
        extract: str | None,
        timeout: float | None,
        keep_lease: bool,
    ) -> _native.Call:
        return self._native.get(
            {
                "reference": reference,
                "version": version,
                "revision": revision,
                "include": _patterns(allow_patterns),
                "exclude": _patterns(ignore_patterns),
                "into": None if local_dir is None else os.fsdecode(local_dir),
                "token": _native_token(token),
                "local_files_only": local_files_only,
                "refresh": refresh,
                "verify": verify,
                "extract": extract,
                "timeout_seconds": timeout,
                "keep_lease": keep_lease,
            }
        )

    # -- open ----------------------------------------------------------------------------------------------------------

    @_calls.blocking
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
    ) -> Pending[CachedFile]:
        """Open one file of an artifact for reading, without waiting for its download.

        A read waits only for the bytes that it needs. They are requested first; the rest of the file is downloaded in
        the background. Concurrent calls to get or open the artifact share one download. A complete file is leased until
        it is closed. Closing an incomplete file cancels the download unless other callers wait for it. The bytes
        received are kept for the next download.

        Bytes of an incomplete file are returned only if its parts can be verified one by one. This requires a ladder
        (SHA-256 checkpoints at the part boundaries): one that was verified on this disk, or that of the manifest on the
        remote if the download follows this manifest. Otherwise, for instance in the first download from an origin, a
        read waits until the complete file is verified. While another process downloads the artifact, this call waits
        for it.

        :param reference: as for :meth:`get`.
        :param path: the file within the artifact. Optional if the artifact has one file or the reference names a file.
        :param version: the version of a bare name, or a tag that points to one.
        :param revision: branch, tag or commit, for references that have revisions; for a bare name, its version.
        :param unchecked: return bytes as soon as they are written, before they are verified. If the file fails
            verification, the next read raises :class:`IntegrityError`.
        :param token: the Hub token for this call; ``False`` to send none.
        :param local_files_only: use only the local disk, and contact neither remote nor origin.
        :param force_refresh: resolve the revision or tag again, even if the last resolution is still current.
        :param timeout: seconds after which this call, and each wait of a read, fails.
        :param progress: as for :meth:`get`, during this call. :attr:`CachedFile.progress` reports the download.
        :returns: a :class:`CachedFile`, which the caller closes.
        :raises InvalidError: the artifact has several files and none was named, or an argument is invalid (also a
            ``ValueError``).
        :raises ModelCacheError: as for :meth:`get`.
        """
        call = self._native.open_file(
            {
                "reference": reference,
                "path": path,
                "version": version,
                "revision": revision,
                "unchecked": unchecked,
                "token": _native_token(token),
                "local_files_only": local_files_only,
                "refresh": force_refresh,
                "timeout_seconds": timeout,
            }
        )
        return Pending(call, self._opened, progress, _reference_text(reference, version))

    aopen = _calls.asynchronous(
        open, "Read with ``await file.aread(…)`` and ``await file.apread(…)``."
    )

    def _opened(self, native: _native.File) -> CachedFile:
        file = CachedFile(native)
        self._files.add(file)
        return file

    # -- prewarm -----------------------------------------------------------------------------------------------------

    @_calls.blocking
    def prewarm(
        self, references: Iterable[Reference], *, jobs: int = 4, progress: ProgressArgument | None = None
    ) -> Pending[list[Path]]:
        """Download a list of artifacts ahead of time and lease them until the cache is closed.

        :param references: ``"name@version"``, URIs, or pairs of name and version.
        :param jobs: maximum number of concurrent downloads.
        :param progress: as for :meth:`get`, for the whole list.
        :returns: the paths, in the order of ``references``.
        :raises FullError: the list does not fit on the disk as a whole. Raised before the first download.
        :raises ModelCacheError: some artifacts failed; the others were downloaded. This is the error of the first one.
            Its attribute ``failures`` has all errors by reference.
        """
        wanted = _reference_pairs(references)
        call = self._native.prewarm(wanted, jobs)
        return Pending(call, lambda output: _prewarmed(wanted, output), progress, "prewarm")

    aprewarm = _calls.asynchronous(prewarm)

    # -- put, evict, tag -----------------------------------------------------------------------------------------------

    @_calls.blocking
    def put(
        self,
        name: str,
        version: str,
        path: _StrPath | bytes | SupportsRead,
        *,
        filename: str | None = None,
        tag: str | None = None,
        tier: Literal["all", "remote"] = "all",
        expect: str | None = None,
        sidecar: bool = False,
        ignore_patterns: _Patterns = None,
        follow_links: bool = False,
        force: bool = False,
        progress: ProgressArgument | None = None,
    ) -> Pending[PutReport]:
        """Publish a file or folder on disk and on the remote, if there is one. A published version is immutable.

        Without a remote, the artifact is kept on this disk only (``on_remote`` in the report is false), and is never
        evicted to make room. ``modelcache backfill`` uploads it once a remote is configured.

        :param name: the name of the artifact.
        :param version: the version to publish.
        :param path: the file or folder; or the content of one file, as bytes or as a file that is open for reading in
            binary mode. Such content is first written to a temporary file (below ``TMPDIR``).
        :param filename: the name of the file in the artifact, if ``path`` is its content; by default the last part of
            ``name``.
        :param tag: a tag to point at the version afterwards.
        :param tier: ``"all"``, or ``"remote"`` to keep no copy on this disk.
        :param expect: refuse files of another format than ``"safetensors"``, ``"gguf"``, ``"onnx"``, ``"tar.gz"``, …
        :param sidecar: write ``FILE.sha256`` beside every object on the remote.
        :param ignore_patterns: leave out files of the folder that match one of these patterns.
        :param follow_links: publish what symbolic links to places outside the folder point to. By default such a link
            is refused.
        :param force: replace other content, or a damaged copy, of the version.
        :param progress: as for :meth:`get`.
        :returns: a report with the digest and the bytes uploaded.
        :raises ConflictError: the version has other content, or another writer is publishing it.
        :raises IntegrityError: a file does not have the expected format.
        """

        def begin(file: str) -> _native.Call:
            return self._native.put(
                name, version, file, tag=tag, tier=tier, expect=expect, sidecar=sidecar,
                ignore_patterns=_patterns(ignore_patterns), follow_links=follow_links, force=force,
            )

        call: _native.Call | contextlib.AbstractContextManager[_native.Call]
        if isinstance(path, (str, os.PathLike)):
            if filename is not None:
                raise InvalidError("filename is only for content that is given as bytes or as an open file")
            call = begin(os.fsdecode(path))
        elif not isinstance(path, (bytes, SupportsRead)):
            raise TypeError("path must be a path, bytes or an open file")
        else:
            call = _with_content(path, filename or name.rsplit("/", 1)[-1], begin)
        return Pending(call, PutReport._parse, progress, _reference_text(name, version))

    aput = _calls.asynchronous(put)

    @_calls.blocking
    def evict(
        self,
        name: str,
        version: str | None = None,
        *,
        tier: Literal["all", "disk", "remote"] = "all",
        dry_run: bool = False,
    ) -> Pending[EvictReport]:
        """Remove an artifact from disk and remote, with the tags that point to it. Does not ask for confirmation.

        The remote is shared: pass ``tier="disk"`` to free space on this machine only. ``remote`` in the report is the
        address of the remote from which the artifact was removed.

        The leases that :meth:`get` and :meth:`prewarm` left in this cache are released first.

        :param name: the name of the artifact, or a reference.
        :param version: the version.
        :param tier: ``"all"``, or ``"disk"`` or ``"remote"`` to remove it from one tier only.
        :param dry_run: remove nothing, and report the data that would be removed.
        :returns: a report with the bytes and tags removed.
        :raises NotFoundError: none of the selected tiers has the artifact.
        :raises ConflictError: the artifact is leased by another user, or pinned.
        """
        return Pending(self._native.evict(name, version, tier, dry_run), EvictReport._parse)

    aevict = _calls.asynchronous(evict)

    @_calls.blocking
    def tag(self, name: str, version: str, tag: str) -> Pending[TagReport]:
        """Point a tag on the remote at a version, for a rollout or a rollback.

        :returns: a report with the versions before and after.
        :raises InvalidError: there is no remote, or the tag is the name of a version.
        :raises NotFoundError: the remote does not have the version.
        """
        return Pending(self._native.tag(name, version, tag), TagReport._parse)

    atag = _calls.asynchronous(tag)

    @_calls.blocking
    def untag(self, name: str, tag: str) -> Pending[TagReport]:
        """Remove a tag. The version that it points to stays."""
        return Pending(self._native.untag(name, tag), TagReport._parse)

    auntag = _calls.asynchronous(untag)

    # -- inspect -------------------------------------------------------------------------------------------------------

    @_calls.blocking
    def contains(self, reference: str, version: str | None = None) -> Pending[bool]:
        """Return whether all files of an artifact are on this disk. Contacts neither remote nor origin.

        ``"name@version" in cache`` and ``("name", "version") in cache`` are the same.

        :param reference: as for :meth:`get`.
        :param version: the version, or a tag that points to one.
        """
        return Pending(self._native.contains(reference, version), json.loads)

    acontains = _calls.asynchronous(contains)

    def __contains__(self, reference: object) -> bool:
        if isinstance(reference, tuple) and len(reference) == 2:
            return self.contains(*reference)
        return self.contains(reference)  # type: ignore[arg-type]

    @_calls.blocking
    def inspect(self, reference: str, version: str | None = None) -> Pending[dict[str, Any]]:
        """Return the files of an artifact with their digests and tiers, and the processes that use it.

        :param reference: as for :meth:`get`.
        :param version: the version.
        :returns: the object that ``modelcache inspect --json`` prints, see docs/json.md.
        :raises NotFoundError: neither this disk nor the remote has the artifact.
        """
        return Pending(self._native.inspect(reference, version), json.loads)

    ainspect = _calls.asynchronous(inspect)

    @_calls.blocking
    def stats(self) -> Pending[Stats]:
        """Return the budget, the usage and the free space of the local directory."""
        return Pending(self._native.stats(), Stats._parse)

    astats = _calls.asynchronous(stats)

    @_calls.blocking
    def list_artifacts(self, *, remote: bool = False) -> Pending[list[CachedArtifact]]:
        """List the artifacts on disk, sorted by name and version.

        :param remote: list the artifacts on the remote instead.
        """
        return Pending(self._native.artifacts(remote), CachedArtifact._parse_list)

    alist_artifacts = _calls.asynchronous(list_artifacts)

    @_calls.blocking
    def resolve(
        self,
        reference: str,
        version: str | None = None,
        *,
        revision: str | None = None,
        force_refresh: bool = False,
        local_files_only: bool = False,
    ) -> Pending[ResolvedReference]:
        """Resolve a reference to the version that it stands for now, without downloading files.

        Arguments and errors are those of :meth:`get`.

        :returns: the version, and a pinned reference that always resolves to it.
        """
        call = self._native.resolve(reference, version, revision, force_refresh, local_files_only)
        return Pending(call, ResolvedReference._parse)

    aresolve = _calls.asynchronous(resolve)

    # -- maintain ------------------------------------------------------------------------------------------------------

    @_calls.blocking
    def pin(
        self,
        reference: str,
        version: str | None = None,
        *,
        seconds: float | None = None,
        reason: str | None = None,
    ) -> Pending[PinRecord]:
        """Protect an artifact on disk from eviction by any process.

        :param reference: as for :meth:`get`.
        :param version: the version.
        :param seconds: lifetime of the pin; ``None`` to keep it until :meth:`unpin`.
        :param reason: a text for other users, shown in error messages and listings.
        :returns: the pin.
        :raises NotFoundError: the artifact is not on disk.
        """
        return Pending(self._native.pin(reference, version, seconds, _caller(), reason), _pin_record)

    apin = _calls.asynchronous(pin)

    @_calls.blocking
    def unpin(self, reference: str, version: str | None = None) -> Pending[None]:
        """Remove the pin of an artifact. Has no effect if the artifact is not pinned."""
        return Pending(self._native.unpin(reference, version), _calls.nothing)

    aunpin = _calls.asynchronous(unpin)

    @_calls.blocking
    def prune(
        self,
        *,
        older_than: timedelta | str | None = None,
        to: int | str | None = None,
        only_copies: bool = False,
        dry_run: bool = False,
    ) -> Pending[dict[str, Any]]:
        """Free disk space now: remove leftovers and, as far as requested, artifacts, least recently used first.

        Artifacts in use, pinned artifacts and artifacts that only this disk has stay. Nothing is removed from the
        remote.

        :param older_than: remove artifacts that were not used for this long: a ``timedelta``, ``"12h"`` or ``"30d"``.
        :param to: remove artifacts until at most this is used: a number of bytes, ``"100GB"``, or ``"50%"`` of the
            filesystem.
        :param only_copies: also remove artifacts that only this disk has.
        :param dry_run: remove nothing, and report what would be removed.
        :returns: the object that ``modelcache prune --json`` prints, see docs/json.md. Its field ``reached`` is false
            if more than ``to`` remains, because the rest is in use.
        """
        age = f"{older_than.total_seconds():f}s" if isinstance(older_than, timedelta) else older_than
        size = str(to) if isinstance(to, int) else to
        return Pending(self._native.prune(age, size, only_copies, dry_run), json.loads)

    aprune = _calls.asynchronous(prune)

    @_calls.blocking
    def doctor(self, *, read_only: bool = False) -> Pending[dict[str, Any]]:
        """Check directory, credentials, remote, origins, clock and network.

        To test write access, this writes one small object below the remote's prefix and removes it.

        :param read_only: write nothing to the remote.
        :returns: ``checks``, each with ``severity``, ``message`` and ``fix``, and the number of ``problems`` and
            ``warnings``: the object that ``modelcache doctor --json`` prints, see docs/json.md, without its exit code
            and without the checks of the settings, which ``ModelCache()`` makes.
        """
        return Pending(self._native.doctor(read_only), json.loads)

    adoctor = _calls.asynchronous(doctor)

    @_calls.blocking
    def verify(
        self,
        references: Iterable[str] | str = (),
        *,
        tier: Literal["disk", "remote", "all"] = "disk",
        repair: bool = False,
        bytes_per_second: int | None = None,
        progress: ProgressArgument | None = None,
    ) -> Pending[list[VerifyReport]]:
        """Read stored files in full and compare them with their digests.

        A bad copy on disk is taken out of service. The next get downloads it again.

        :param references: the artifacts to verify; all artifacts of the tier by default.
        :param tier: ``"disk"``, ``"remote"`` or ``"all"``.
        :param repair: replace bad copies at once.
        :param bytes_per_second: limit on the read rate.
        :param progress: as for :meth:`get`.
        :returns: one result for each artifact and tier.
        """
        call = self._native.verify(_references(references), tier, repair, bytes_per_second)
        return Pending(call, VerifyReport._parse_list, progress, "verify")

    averify = _calls.asynchronous(verify)

    # -- close ---------------------------------------------------------------------------------------------------------

    @_calls.blocking
    def close(self, timeout: float = _CLOSE_SECONDS) -> Pending[None]:
        """Close the cache: close its open files, wait for background uploads, and release all leases.

        Pending uploads to the remote are recorded on disk. A later run completes those that do not finish in time.
        Closing again has no effect.

        :param timeout: longest time to wait, in seconds.
        """
        self._close_files()
        return Pending(self._native.close(timeout), _calls.nothing)

    aclose = _calls.asynchronous(close)

    def _close_files(self) -> None:
        # The exit handler does not have to close this cache any more.
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
        """Pickle the arguments only. The other process opens the cache with them and with its own environment."""
        return _reopen, (self._arguments,)

    def __repr__(self) -> str:
        state = "closed " if self.closed else ""
        return f"<{state}ModelCache at {str(self.cache_dir)!r}, remote {_printable(str(self.remote))}>"


def _printable(text: str) -> str:
    """Return ``text`` with control characters and unprintable characters escaped."""
    return repr(text)[1:-1]


_OPEN: dict[int, ModelCache] = {}
"""The open caches by ``id``.

This reference keeps a cache alive that the program no longer references, so that the paths it returned remain leased.
"""


def _close_all() -> None:
    """Close all caches at the end of the interpreter, then stop the threads of the native module."""
    # From here on, no other thread can use the native module.
    _native.begin_shutdown()
    try:
        for cache in list(_OPEN.values()):
            with contextlib.suppress(ModelCacheError):
                cache.close()
    finally:
        _native.shut_down()
        _logging.forward_records()


atexit.register(_close_all)


os.register_at_fork(after_in_child=_native.forked)


def _reopen(arguments: dict[str, Any]) -> ModelCache:
    """Open a cache that was pickled."""
    return ModelCache(**arguments)


def _setting_text(value: object) -> str:
    """Convert an argument to the text form of its setting."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, (bytes, os.PathLike)):
        return os.fsdecode(value)
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return ",".join(_setting_text(each) for each in value)
    raise TypeError(f"a setting must be a string, a number, a path or a list of them, not {type(value).__name__}")


@contextlib.contextmanager
def _with_content(
    content: bytes | SupportsRead, filename: str, begin: Callable[[str], _native.Call]
) -> Iterator[_native.Call]:
    """Write ``content`` to a temporary file, and yield the call that ``begin`` begins with the path of the file."""
    if filename in ("", ".", "..") or "/" in filename:
        raise InvalidError(f"filename={filename!r} is not the name of a file")
    with tempfile.TemporaryDirectory(prefix="modelcache-") as folder:
        path = os.path.join(folder, filename)
        with open(path, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                shutil.copyfileobj(content, file, 1 << 20)
        yield begin(path)


def _native_token(token: str | bool | None) -> str | None:
    """Convert a token for the native module: ``""`` to send none, ``None`` for the configured one."""
    if token is False:
        return ""
    return None if token is None or token is True else token


def _patterns(patterns: _Patterns) -> list[str]:
    if patterns is None:
        return []
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _references(references: Iterable[str] | str) -> list[str]:
    return [references] if isinstance(references, str) else list(references)


def _reference_pairs(references: Iterable[Reference]) -> list[tuple[str, str | None]]:
    """Convert references to pairs of text and version."""
    references = [references] if isinstance(references, str) else references
    return [(each, None) if isinstance(each, str) else each for each in references]


def _reference_text(reference: str, version: str | None) -> str:
    """Return ``reference``, or ``reference@version`` if there is a version."""
    return reference if version is None else f"{reference}@{version}"


def _prewarmed(wanted: list[tuple[str, str | None]], output: str) -> list[Path]:
    """Return the paths in the output of a prewarm, or raise its first error with all errors attached."""
    rows = json.loads(output)
    failures = dict(_failures(wanted, rows))
    if failures:
        first = next(iter(failures.values()))
        first.failures = failures
        raise first
    return [Path(row["path"]) for row in rows]


def _failures(
    wanted: list[tuple[str, str | None]], rows: list[dict[str, Any]]
) -> Iterator[tuple[str, ModelCacheError]]:
    """Yield the reference and the exception of each artifact that failed."""
    for (reference, version), row in zip(wanted, rows, strict=True):
        # Only the row of an error has a kind.
        if "kind" in row:
            details = (row["hint"], row["artifact"], row["tier"], row["retry_after"], row["transient"])
            yield _reference_text(reference, version), from_native(row["kind"], row["message"], details)


def _pin_record(output: str) -> PinRecord:
    return PinRecord._from(json.loads(output)["pin"])


def _caller() -> str | None:
    """Return ``user@host``, which a pin records for other users, or ``None`` if it is unknown."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):
        return None

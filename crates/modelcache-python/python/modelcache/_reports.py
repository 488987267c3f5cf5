"""The results of calls: immutable data classes. Sizes are in bytes, times in seconds.

The native module sends the objects that ``modelcache --json`` prints (docs/json.md). The ``_from`` methods convert
them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from ._hints import in_python

_ReportT = TypeVar("_ReportT", bound="_Report")


def _unix(time: str | None) -> int | None:
    """Convert a time in RFC 3339 to seconds since the Unix epoch."""
    # Python 3.10 does not parse the suffix ``Z``.
    return None if time is None else round(datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp())


_TIMES = {"since", "until", "last_used"}
"""Fields that are seconds in the classes, and RFC 3339 in JSON."""


def _with_times(value: Any) -> Any:
    """Return a JSON document with its times in RFC 3339, the inverse of :func:`_unix`."""
    if isinstance(value, list):
        return [_with_times(each) for each in value]
    if not isinstance(value, dict):
        return value

    def convert(name: str, each: Any) -> Any:
        if name in _TIMES and each is not None:
            return datetime.fromtimestamp(each, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        return _with_times(each)

    return {name: convert(name, each) for name, each in value.items()}


class _Report:
    """Base class of the reports: parses JSON and converts to a dictionary."""

    @classmethod
    def _from(cls: type[_ReportT], values: dict[str, Any]) -> _ReportT:
        # Ignore unknown keys: the native module may report more than this class shows.
        known = {each.name for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def _parse(cls: type[_ReportT], text: str) -> _ReportT:
        return cls._from(json.loads(text))

    @classmethod
    def _parse_list(cls: type[_ReportT], text: str) -> list[_ReportT]:
        return [cls._from(row) for row in json.loads(text)]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary that ``json`` can serialize. Times are RFC 3339, as in ``--json``."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        # A round trip through JSON converts paths and nested values.
        plain: dict[str, Any] = _with_times(json.loads(json.dumps(values, default=str)))
        return plain


@dataclass(frozen=True)
class Progress(_Report):
    """Progress of a call."""

    phase: str
    """The step that the call is in: ``resolve``, ``acquire`` (lookup on disk), ``join`` (waiting for the download of
    another caller), ``plan``, ``download``, ``read`` (by ``put``), ``publish``, ``backfill``, ``materialize`` (copy to
    ``local_dir``) or ``verify``."""
    done_bytes: int
    """Bytes of this phase that are done."""
    total_bytes: int | None
    """Total bytes of this phase; ``None`` while unknown."""
    remote_bytes: int
    """Bytes received from the remote so far."""
    origin_bytes: int
    """Bytes received from origins so far."""
    retries: int = 0
    """Number of requests that failed and were sent again."""
    last_error: str | None = None
    """The error of the last failed request; ``None`` if bytes have arrived since."""

    @classmethod
    def _of(cls, snapshot: tuple[str, int, int, int, int, int, str | None]) -> Progress:
        phase, done, total, remote, origin, retries, last_error = snapshot
        return cls(phase, done, total or None, remote, origin, retries, last_error)


@dataclass(frozen=True)
class PinRecord(_Report):
    """A pin, which protects an artifact from eviction across processes."""

    since: int | None
    """When the pin was set, in seconds since the Unix epoch."""
    until: int | None
    """When the pin expires, in seconds since the Unix epoch; ``None`` if it does not expire."""
    by: str | None
    """``user@host`` of the process that set the pin."""
    reason: str | None

    @classmethod
    def _from(cls, values: dict[str, Any]) -> PinRecord:
        return super()._from({**values, "since": _unix(values["since"]), "until": _unix(values["until"])})


@dataclass(frozen=True)
class CachedArtifact(_Report):
    """One artifact in a listing of the local directory or of the remote."""

    name: str
    version: str
    reference: str
    shape: str
    """``"file"`` or ``"tree"``."""
    files: int
    """Number of files of the artifact."""
    held_files: int
    """Number of files that are present in the listed tier."""
    size: int
    """Bytes of all files."""
    held_bytes: int
    """Bytes of the files that are present in the listed tier."""
    last_used: float | None
    """Time of the last use, in seconds since the Unix epoch. Known on disk only."""
    leased: bool
    """True if a process holds a lease on it. Known on disk only."""
    pin: PinRecord | None
    """The pin, if there is one. Known on disk only."""
    formats: list[str] = field(default_factory=list)
    """The formats of its files that were recognized."""
    tags: list[str] = field(default_factory=list)
    """Tags that point to it. Known on the remote only."""

    @classmethod
    def _from(cls, values: dict[str, Any]) -> CachedArtifact:
        pin, last_used = values["pin"], _unix(values["last_used"])
        converted = {
            "pin": None if pin is None else PinRecord._from(pin),
            "last_used": None if last_used is None else float(last_used),
        }
        return super()._from({**values, **converted})


@dataclass(frozen=True)
class Stats(_Report):
    """The state of the local directory."""

    dir: Path
    lower_dir: Path | None
    lower_artifacts: int
    artifacts: int
    files: int
    leases: int
    """Number of artifacts that are leased."""
    pins: int
    """Number of artifacts that are pinned."""
    budget_bytes: int
    used_bytes: int
    """Bytes that count against the budget: blobs, downloads in progress, quarantine, reservations."""
    staging_bytes: int
    """Part of ``used_bytes``: downloads in progress or abandoned."""
    resumable_bytes: int
    """Bytes of interrupted downloads that a later ``get`` does not download again."""
    quarantine_bytes: int
    """Part of ``used_bytes``: files that failed a check."""
    filesystem_free_bytes: int
    min_free_bytes: int
    """Bytes of the filesystem that the cache always leaves free."""
    pending_backfills: int
    """Number of artifacts whose upload to the remote is pending."""
    pending_backfill_bytes: int
    remote: str | None
    """URL of the remote, if there is one."""

    @classmethod
    def _from(cls, values: dict[str, Any]) -> Stats:
        lower = values.get("lower_dir")
        paths = {"dir": Path(values["dir"]), "lower_dir": None if lower is None else Path(lower)}
        return super()._from({**values, **paths})


@dataclass(frozen=True)
class PutReport(_Report):
    """Result of :meth:`ModelCache.put`."""

    name: str
    version: str
    path: Path | None
    """The file or folder in the local directory; ``None`` if it was published on the remote only."""
    files: int
    size: int
    """Bytes of all files."""
    uploaded_bytes: int
    """Bytes sent to the remote; 0 if the remote already had them or if there is no remote."""
    copied_bytes: int
    """Bytes that were not uploaded because the remote copied them from other versions."""
    on_remote: bool
    """True if there is a remote and it has the artifact."""
    sha256: str
    """Digest of the file, or of the file list of a tree."""

    @classmethod
    def _from(cls, values: dict[str, Any]) -> PutReport:
        path = values.get("path")
        return super()._from({**values, "path": None if path is None else Path(path)})


@dataclass(frozen=True)
class EvictReport(_Report):
    """Result of :meth:`ModelCache.evict`: the data that was removed or, after a dry run, would be removed."""

    name: str
    version: str
    disk_bytes: int | None
    """Bytes freed on disk; ``None`` if the artifact was not on disk or the tier was not selected."""
    shared_bytes: int
    """Bytes of its files that stay on disk, because other artifacts use them."""
    remote_bytes: int | None
    """Bytes removed from the remote; ``None`` if the artifact was not on the remote or the tier was not selected."""
    remote: str | None
    """The address of the remote from which it was removed; ``None`` if nothing was removed there."""
    only_copy: bool
    """True if the copy on disk was removed and no other tier was known to have the artifact."""
    can_be_fetched_again: bool
    """True if a later get can download the artifact again, from an origin or from unmanaged objects that stay on the
    remote."""
    tags: list[str]
    """Tags that pointed to it and were removed."""


@dataclass(frozen=True)
class TagReport(_Report):
    """Result of :meth:`ModelCache.tag` and :meth:`ModelCache.untag`."""

    name: str
    tag: str
    before: str | None
    """The version that the tag pointed to before; ``None`` if the tag is new."""
    after: str | None
    """The version that the tag points to now; ``None`` if the tag was removed."""
    sha256: str | None
    """Digest of that version, if known: of the file, or of the file list of a tree."""

    @classmethod
    def _from(cls, values: dict[str, Any]) -> TagReport:
        return super()._from({**values, "before": values["from"], "after": values["to"]})


@dataclass(frozen=True)
class ResolvedReference(_Report):
    """Result of :meth:`ModelCache.resolve`: the version that a reference stands for now."""

    name: str
    version: str
    pinned: str
    """A reference that always resolves to this version."""
    pinned_with_digest: str | None
    """``pinned`` with ``#sha256=…`` appended; ``None`` if the digest is unknown."""
    revision: str | None
    """The revision or tag that was resolved; ``None`` if the reference names a version."""
    sha256: str | None
    """Digest of the file, or of the file list of a tree; ``None`` if neither disk nor remote knows it."""
    origin: str | None
    """The tier that answered the lookup, which need not be an origin: ``"disk"``, ``"remote"`` or ``"origin"``;
    ``None`` if no lookup was needed."""
    age_seconds: float | None
    """Age of the resolution, in seconds, rounded to a whole number; ``None`` if it is unknown or cannot become
    outdated."""

    @classmethod
    def _from(cls, values: dict[str, Any]) -> ResolvedReference:
        age = values["age_seconds"]
        return super()._from(
            {**values, "origin": values["from"], "age_seconds": None if age is None else float(age)}
        )


@dataclass(frozen=True)
class Finding(_Report):
    """A problem that :meth:`ModelCache.verify` found."""

    path: str | None
    """The file; ``None`` if the problem concerns the whole artifact."""
    problem: str
    """The kind of problem."""
    expected: str | None
    """The expected digest."""
    found: str | None
    """The digest of the bytes found, if they could be read."""
    withdrawn: bool
    """True if the bad copy was taken out of service."""
    repaired_from: str | None
    """The tier that the good bytes came from; ``None`` if the problem was not repaired."""
    remedy: str | None
    """The suggested remedy, or the reason why the repair failed."""

    @classmethod
    def _from(cls, values: dict[str, Any]) -> Finding:
        remedy = values["remedy"]
        return super()._from({**values, "remedy": None if remedy is None else in_python(remedy)})


@dataclass(frozen=True)
class VerifyReport(_Report):
    """Result of verifying one artifact in one tier."""

    reference: str
    """The reference of the artifact, or the path of data that belongs to no known artifact."""
    tier: str
    ok: bool
    """True if no problem was found or all problems were repaired."""
    files: int
    """Number of files checked."""
    bytes: int
    """Bytes read and compared. Content that several artifacts share is read once."""
    findings: list[Finding]
    """The problems; empty if there are none."""

    @classmethod
    def _from(cls, values: dict[str, Any]) -> VerifyReport:
        return super()._from({**values, "findings": [Finding._from(each) for each in values["findings"]]})

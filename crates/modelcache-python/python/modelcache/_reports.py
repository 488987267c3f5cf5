"""What calls report: plain values, sizes in bytes, times in seconds."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

_Report = TypeVar("_Report", bound="_Plain")


class _Plain:
    """A report that can be made from JSON and become a dictionary."""

    @classmethod
    def _from(cls: type[_Report], values: dict[str, Any]) -> _Report:
        known = {each.name for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def _parse(cls: type[_Report], text: str) -> _Report:
        return cls._from(json.loads(text))

    def to_dict(self) -> dict[str, Any]:
        """The report as a dictionary that ``json`` can write."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return plain


@dataclass(frozen=True)
class Progress(_Plain):
    """How far a call is."""

    phase: str
    """``resolve``, ``lend``, ``join`` (waiting for another's fill), ``plan``, ``pour``, ``publish``, ``backfill``,
    ``materialize`` or ``verify``."""
    done_bytes: int
    """Bytes of this phase that are done."""
    total_bytes: int | None
    """Bytes of this phase in all; ``None`` while unknown."""
    remote_bytes: int
    """Bytes received from the remote so far."""
    origin_bytes: int
    """Bytes received from origins so far."""


@dataclass(frozen=True)
class PinRecord(_Plain):
    """An operator's lasting hold. Times are seconds since the Unix epoch."""

    since: int | None
    until: int | None
    by: str | None
    reason: str | None


@dataclass(frozen=True)
class CachedArtifact(_Plain):
    """One artifact as it is listed."""

    name: str
    version: str
    reference: str
    shape: str
    """``"file"`` or ``"tree"``."""
    files: int
    held_files: int
    """Of the files, those that are here."""
    size: int
    """Bytes of all files."""
    held_bytes: int
    """Of the bytes, those that are here."""
    last_used: float | None
    """Seconds since the Unix epoch; on disk only."""
    leased: bool
    """Whether somebody holds it; on disk only."""
    pin: PinRecord | None
    """On disk only."""
    formats: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    """Tags that mean it; on the remote only."""

    @classmethod
    def _from(cls, values: dict[str, Any]) -> CachedArtifact:
        pin = values.get("pin")
        return super()._from({**values, "pin": None if pin is None else PinRecord._from(pin)})


@dataclass(frozen=True)
class Stats(_Plain):
    """The state of the local directory. Sizes are in bytes."""

    dir: Path
    lower_dir: Path | None
    lower_artifacts: int
    artifacts: int
    files: int
    leases: int
    """Artifacts that somebody holds."""
    pins: int
    budget_bytes: int
    used_bytes: int
    """What counts against the budget: blobs, fills in progress, quarantine, reservations."""
    staging_bytes: int
    quarantine_bytes: int
    filesystem_free_bytes: int
    min_free_bytes: int
    pending_backfills: int
    """Artifacts that still have to reach the remote."""
    pending_backfill_bytes: int
    remote: str | None

    @classmethod
    def _from(cls, values: dict[str, Any]) -> Stats:
        lower = values.get("lower_dir")
        paths = {"dir": Path(values["dir"]), "lower_dir": None if lower is None else Path(lower)}
        return super()._from({**values, **paths})


@dataclass(frozen=True)
class PutReport(_Plain):
    """What ``put`` did. Sizes are in bytes."""

    name: str
    version: str
    path: Path | None
    """The file or folder in the local directory; ``None`` if it went to the remote only."""
    files: int
    size: int
    uploaded_bytes: int
    copied_bytes: int
    """Bytes that the remote's server copied from other versions instead."""
    on_remote: bool
    sha256: str
    """Of the file, or of the file list of a tree."""

    @classmethod
    def _from(cls, values: dict[str, Any]) -> PutReport:
        path = values.get("path")
        return super()._from({**values, "path": None if path is None else Path(path)})


@dataclass(frozen=True)
class EvictReport(_Plain):
    """What ``evict`` removed, or would remove."""

    name: str
    version: str
    disk_bytes: int | None
    """Bytes freed on disk; ``None`` if it was not there or not asked for."""
    remote_bytes: int | None
    origin_can_give_back: bool
    tags: list[str]
    """Tags that went with it."""


@dataclass(frozen=True)
class TagReport(_Plain):
    """What ``tag`` or ``untag`` did."""

    name: str
    tag: str
    before: str | None
    """The version that it meant."""
    after: str | None
    """The version that it means now; ``None``: the tag is gone."""
    sha256: str | None


@dataclass(frozen=True)
class Resolved(_Plain):
    """What a reference means now."""

    name: str
    version: str
    pinned: str
    """The reference that means this, and nothing else, from now on."""
    pinned_with_digest: str | None
    revision: str | None
    """The revision or tag that was resolved, if it was one."""
    sha256: str | None
    """Of the file, or of the file list of a tree, as far as disk or remote know it."""
    origin: str | None
    """The tier that gave the answer: ``"disk"``, ``"remote"`` or ``"origin"``."""
    age_seconds: float | None
    """How old the answer is."""


@dataclass(frozen=True)
class Finding(_Plain):
    """Something wrong that ``verify`` found."""

    path: str | None
    """The file; ``None`` where the whole artifact is concerned."""
    problem: str
    expected: str | None
    found: str | None
    withdrawn: bool
    """Whether the bad copy was taken out of service."""
    repaired_from: str | None
    """The tier that the right bytes came from, once it is repaired."""
    remedy: str | None


@dataclass(frozen=True)
class Verified(_Plain):
    """What a check of one artifact in one tier came to."""

    reference: str
    tier: str
    ok: bool
    """Whether nothing is wrong, or nothing any more."""
    files: int
    bytes: int
    findings: list[Finding]

    @classmethod
    def _from(cls, values: dict[str, Any]) -> Verified:
        return super()._from({**values, "findings": [Finding._from(each) for each in values["findings"]]})

"""Downloads a list of artifacts in the background and reports the progress. Independent of web frameworks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ._cache import ModelCache, Reference, _reference_pairs, _reference_text
from ._errors import ModelCacheError
from ._reports import Progress

_LOGGER = logging.getLogger("modelcache.readiness")

_BACKOFF_FIRST_SECONDS = 1.0
"""Pause before the second attempt. It doubles with each further attempt."""
_BACKOFF_MAX_SECONDS = 60.0
"""Upper bound on the pause between two attempts."""
_RETRY_AFTER_MAX = 60
"""Upper bound on the seconds in a ``Retry-After`` header."""


@dataclass
class Artifact:
    """One artifact that the application needs, with its state."""

    name: str
    version: str | None
    state: Literal["waiting", "filling", "loading", "ready", "failed"] = "waiting"
    """``filling`` while it is downloaded, ``loading`` while ``on_ready`` runs, ``failed`` until the next attempt."""
    path: Path | None = None
    """The path of the file or folder, once it is on disk."""
    value: Any = None
    """The return value of ``on_ready``, once the artifact is ready."""
    error: str | None = None
    """The error of the last attempt, if it failed; while it is ``filling``, that of the request that is being sent
    again."""
    retries: int = 0
    """Number of requests and attempts that failed and were tried again since the start."""
    done_bytes: int = 0
    total_bytes: int | None = None
    """``None`` while the size is unknown."""

    @property
    def reference(self) -> str:
        """The reference: ``name@version`` or the URI."""
        return _reference_text(self.name, self.version)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that a readiness probe reports."""
        return {
            "reference": self.reference,
            "state": self.state,
            "done_bytes": self.done_bytes,
            "total_bytes": self.total_bytes,
            "error": self.error,
            "retries": self.retries,
        }


OnReady = Callable[[Artifact], Any]
"""A function that is called in a thread for each artifact on disk. Its return value becomes ``Artifact.value``."""


class Readiness:
    """Downloads and loads a list of artifacts, and reports whether all of them are ready.

    An object of this class belongs to one event loop.

    :param cache: the cache to download into.
    :param references: ``"name@version"``, URIs, or pairs of name and version.
    :param jobs: maximum number of concurrent downloads.
    :param on_ready: function to load an artifact, see :data:`OnReady`.
    """

    def __init__(
        self, cache: ModelCache, references: Iterable[Reference], *, jobs: int = 4, on_ready: OnReady | None = None
    ) -> None:
        self.cache = cache
        self.artifacts = [Artifact(name, version) for name, version in _reference_pairs(references)]
        self._by_reference = {artifact.reference: artifact for artifact in self.artifacts}
        self._on_ready = on_ready
        self._jobs = asyncio.Semaphore(jobs)
        self._tasks: list[asyncio.Task[None]] = []
        self._rate = _Rate()

    @property
    def is_ready(self) -> bool:
        """True if every artifact is ready."""
        return all(artifact.state == "ready" for artifact in self.artifacts)

    def artifact(self, name: str, version: str | None = None) -> Artifact:
        """Return an artifact of the list.

        :raises KeyError: the artifact is not on the list.
        """
        return self._by_reference[_reference_text(name, version)]

    def start(self) -> None:
        """Start the downloads in the background and return at once."""
        self._tasks = [asyncio.create_task(self._make_ready(artifact)) for artifact in self.artifacts]

    async def stop(self) -> None:
        """Cancel the downloads in progress. The bytes received are kept for the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the readiness, the bytes done and in total, and the seconds left, with one row for each artifact."""
        # The total is unknown as long as the size of an unfinished artifact is unknown.
        totals = [artifact.total_bytes for artifact in self.artifacts if artifact.state != "ready"]
        done = sum(artifact.done_bytes for artifact in self.artifacts)
        known = all(total is not None for total in totals)
        total = sum(artifact.total_bytes or 0 for artifact in self.artifacts) if known else None
        return {
            "ready": self.is_ready,
            "done_bytes": done,
            "total_bytes": total,
            "seconds_left": self.seconds_left(),
            "artifacts": [artifact.to_dict() for artifact in self.artifacts],
        }

    def seconds_left(self) -> float | None:
        """Return the estimated seconds until all downloads are done; ``None`` while a size or the rate is unknown."""
        if self.is_ready:
            return 0.0
        rate = self._rate.bytes_per_second
        unfinished = [artifact for artifact in self.artifacts if artifact.state in ("waiting", "filling")]
        if not unfinished or any(artifact.total_bytes is None for artifact in unfinished) or not rate:
            return None
        return sum((artifact.total_bytes or 0) - artifact.done_bytes for artifact in unfinished) / rate

    def retry_after(self) -> int:
        """Return the whole seconds that a client should wait before the next request: from 1 to 60."""
        left = self.seconds_left()
        # 5 seconds if there is no estimate, for instance while `on_ready` runs.
        return 5 if left is None else max(1, min(_RETRY_AFTER_MAX, round(left)))

    async def _make_ready(self, artifact: Artifact) -> None:
        """Download and load one artifact. Retries with exponential backoff until it succeeds."""
        pause = _BACKOFF_FIRST_SECONDS
        while True:
            try:
                async with self._jobs:
                    await self._fill_and_load(artifact)
                return
            except Exception as error:
                # Retry every kind of error: a missing artifact may be published, and a service may recover. The
                # orchestrator does not restart the process in these cases.
                artifact.state, artifact.error = "failed", str(error)
                artifact.retries += 1
                artifact_name = error.artifact if isinstance(error, ModelCacheError) else None
                _LOGGER.error(
                    "%s is not ready, next try in %.0f s: %s", artifact_name or artifact.reference, pause, error,
                    exc_info=not isinstance(error, ModelCacheError),
                )  # fmt: skip
                await asyncio.sleep(pause)
                pause = min(pause * 2, _BACKOFF_MAX_SECONDS)

    async def _fill_and_load(self, artifact: Artifact) -> None:
        # If a previous attempt failed in `on_ready`, the artifact is already on disk.
        if artifact.path is None:
            artifact.state = "filling"
            retries_before = artifact.retries

            def record(progress: Progress) -> None:
                if artifact.retries == 0 and progress.last_error is not None:
                    _LOGGER.warning("%s is not ready, trying again: %s", artifact.reference, progress.last_error)
                if progress.retries:
                    artifact.retries = retries_before + progress.retries
                    artifact.error = progress.last_error
                # In the phase `join` the bytes are those of the other caller's download.
                if progress.phase in ("download", "join") and progress.total_bytes:
                    self._rate.add(progress.done_bytes - artifact.done_bytes)
                    artifact.done_bytes, artifact.total_bytes = progress.done_bytes, progress.total_bytes

            artifact.path = await self.cache.aget(artifact.name, artifact.version, progress=record)
            # Use the size of the files on disk, because the progress does not include bytes that were reused.
            artifact.done_bytes = artifact.total_bytes = await asyncio.to_thread(_size, artifact.path)
        if self._on_ready is not None:
            artifact.state = "loading"
            artifact.value = await asyncio.to_thread(self._on_ready, artifact)
        artifact.state, artifact.error = "ready", None


class _Rate:
    """Average download rate since the first progress report."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._bytes = 0

    def add(self, count: int) -> None:
        if self._started is None:
            self._started = time.monotonic()  # These bytes do not count, because the time they took is unknown.
        else:
            self._bytes += max(count, 0)

    @property
    def bytes_per_second(self) -> float | None:
        if self._started is None or not self._bytes:
            return None
        return self._bytes / max(time.monotonic() - self._started, 0.001)


def _size(path: Path) -> int:
    """Return the size in bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())



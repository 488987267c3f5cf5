"""Filling a list of artifacts in the background, and how far it is. Knows no web framework."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ._cache import ModelCache, Reference
from ._errors import ModelCacheError
from ._reports import Progress

_LOGGER = logging.getLogger("modelcache.readiness")

_RETRY_FIRST = 1.0
_RETRY_MAX = 60.0
_RETRY_AFTER_MAX = 60
"""Seconds that a client is told to wait at most."""


@dataclass
class Artifact:
    """One artifact that the application needs."""

    name: str
    version: str | None
    state: Literal["waiting", "filling", "loading", "ready", "failed"] = "waiting"
    """``loading`` while the hook runs; ``failed`` until the next try."""
    path: Path | None = None
    """Where it lies, once it is local."""
    value: Any = None
    """What the hook returned, once it is ready."""
    error: str | None = None
    """Why the last try failed."""
    done_bytes: int = 0
    total_bytes: int | None = None
    """``None`` while nobody knows."""

    @property
    def reference(self) -> str:
        """``name@version``, or the URI."""
        return self.name if self.version is None else f"{self.name}@{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """For an answer to whoever asks for readiness."""
        return {
            "reference": self.reference,
            "state": self.state,
            "done_bytes": self.done_bytes,
            "total_bytes": self.total_bytes,
            "error": self.error,
        }


OnReady = Callable[[Artifact], Any]
"""Called once for each artifact when it is local, in a thread; what it returns is the artifact's ``value``."""


class Readiness:
    """Whether everything on a list is local and loaded. Used in one event loop."""

    def __init__(
        self, cache: ModelCache, references: Iterable[Reference], *, jobs: int = 4, on_ready: OnReady | None = None
    ) -> None:
        pairs = [(each, None) if isinstance(each, str) else each for each in references]
        self.cache = cache
        self.artifacts = [Artifact(name, version) for name, version in pairs]
        self._by_reference = {artifact.reference: artifact for artifact in self.artifacts}
        self._on_ready = on_ready
        self._jobs = asyncio.Semaphore(jobs)
        self._tasks: list[asyncio.Task[None]] = []
        self._rate = _Rate()

    @property
    def is_ready(self) -> bool:
        """Whether every artifact is ready."""
        return all(artifact.state == "ready" for artifact in self.artifacts)

    def artifact(self, name: str, version: str | None = None) -> Artifact:
        """The artifact on the list.

        :raises KeyError: it is not on the list.
        """
        reference = name if version is None else f"{name}@{version}"
        return self._by_reference[reference]

    def start(self) -> None:
        """Starts filling, and comes back at once."""
        self._tasks = [asyncio.create_task(self._make_ready(artifact)) for artifact in self.artifacts]

    async def stop(self) -> None:
        """Ends the fills that are under way; what they fetched is kept for the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def to_dict(self) -> dict[str, Any]:
        """Whether it is ready, and if not, bytes and seconds to go, in all and by artifact."""
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
        """How long the known rest takes at the present rate; ``None`` while nobody can tell."""
        if self.is_ready:
            return 0.0
        rate = self._rate.bytes_per_second
        unfinished = [artifact for artifact in self.artifacts if artifact.state in ("waiting", "filling")]
        if not unfinished or any(artifact.total_bytes is None for artifact in unfinished) or not rate:
            return None
        return sum((artifact.total_bytes or 0) - artifact.done_bytes for artifact in unfinished) / rate

    def retry_after(self) -> int:
        """Whole seconds that a client should wait before it asks again: from 1 to 60."""
        left = self.seconds_left()
        return 5 if left is None else max(1, min(_RETRY_AFTER_MAX, round(left)))

    async def _make_ready(self, artifact: Artifact) -> None:
        pause = _RETRY_FIRST
        while True:
            try:
                async with self._jobs:
                    await self._fill_and_load(artifact)
                return
            except Exception as error:
                # What is missing may be put, and what is down may come back: nobody restarts us for it.
                artifact.state, artifact.error = "failed", str(error)
                where = error.artifact if isinstance(error, ModelCacheError) else None
                _LOGGER.error(
                    "%s is not ready, next try in %.0f s: %s", where or artifact.reference, pause, error,
                    exc_info=not isinstance(error, ModelCacheError),
                )  # fmt: skip
                await asyncio.sleep(pause)
                pause = min(pause * 2, _RETRY_MAX)

    async def _fill_and_load(self, artifact: Artifact) -> None:
        if artifact.path is None:
            artifact.state = "filling"

            def tell(progress: Progress) -> None:
                # Waiting for another process's fetch shows that one's bytes.
                if progress.phase in ("pour", "join") and progress.total_bytes:
                    self._rate.add(progress.done_bytes - artifact.done_bytes)
                    artifact.done_bytes, artifact.total_bytes = progress.done_bytes, progress.total_bytes

            artifact.path = await self.cache.aget(artifact.name, artifact.version, progress=tell)
            artifact.done_bytes = artifact.total_bytes = await asyncio.to_thread(_size, artifact.path)
        if self._on_ready is not None:
            artifact.state = "loading"
            artifact.value = await asyncio.to_thread(self._on_ready, artifact)
        artifact.state, artifact.error = "ready", None


class _Rate:
    """Bytes per second since the first byte."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._bytes = 0

    def add(self, count: int) -> None:
        if self._started is None:
            self._started = time.monotonic()  # What came before it began to look counts for nothing.
        else:
            self._bytes += max(count, 0)

    @property
    def bytes_per_second(self) -> float | None:
        if self._started is None or not self._bytes:
            return None
        return self._bytes / max(time.monotonic() - self._started, 0.001)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())



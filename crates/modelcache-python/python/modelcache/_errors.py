"""The exceptions of this package: one base, one class for each thing that a caller can do about a failure."""

from __future__ import annotations

from typing import Any


class ModelCacheError(Exception):
    """A failure: what failed, of which artifact, in which tier, and what to do about it.

    ``str()`` of it is what the command line prints: the failure in one line and, if anybody knows how to mend it, a
    second line ``hint: …``.
    """

    message: str
    """What failed, in one line, with artifact, tier and cause."""
    hint: str | None = None
    """What to do about it."""
    artifact: str | None = None
    """``name@version`` or the reference, where one is concerned."""
    tier: str | None = None
    """``"disk"``, ``"remote"`` or ``"origin"``, where one failed."""
    retry_after: float | None = None
    """Seconds that a server asked to wait."""
    transient: bool = False
    """Whether the same call may succeed later."""
    code: str = "other"
    """The stable word for the kind of failure, as in the command line's JSON."""
    failures: dict[str, ModelCacheError] | None = None
    """For calls about several references: what failed, by reference."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.message, dict(self.__dict__))


class NotFoundError(ModelCacheError, FileNotFoundError):
    """The artifact, revision or file exists in none of the places asked."""

    code = "not_found"


class UnauthorizedError(ModelCacheError, PermissionError):
    """Credentials are missing, wrong or expired, or lack the right; or the repository is gated."""

    code = "unauthorized"


class IntegrityError(ModelCacheError):
    """Bytes do not match their digest, or a record is damaged. Nothing of it was kept."""

    code = "corrupt"


class FullError(ModelCacheError):
    """The budget or the filesystem has no room."""

    code = "full"


class UnavailableError(ModelCacheError):
    """A service did not answer, answered with an error, or was too slow."""

    code = "unavailable"


class InvalidError(ModelCacheError, ValueError):
    """A name, a reference, an argument or a setting is wrong."""

    code = "invalid"


class ConflictError(ModelCacheError):
    """The key is taken by other content, by another writer, or by somebody who uses it."""

    code = "conflict"


class DirectoryError(ModelCacheError):
    """The cache directory cannot be used."""

    code = "directory"


_CLASSES: dict[str, type[ModelCacheError]] = {
    kind.code: kind
    for kind in (
        NotFoundError,
        UnauthorizedError,
        IntegrityError,
        FullError,
        UnavailableError,
        InvalidError,
        ConflictError,
        DirectoryError,
    )
}


def from_native(
    kind: str,
    message: str,
    about: tuple[str | None, str | None, str | None, float | None, bool],
) -> ModelCacheError:
    """The exception for a failure of the native half."""
    hint, artifact, tier, retry_after, transient = about
    error = _CLASSES.get(kind, ModelCacheError)(message, hint=hint)
    error.code = kind
    error.artifact, error.tier = artifact, tier
    error.retry_after, error.transient = retry_after, transient
    return error


def _again(kind: type[ModelCacheError], message: str, fields: dict[str, Any]) -> ModelCacheError:
    error = kind(message)
    error.__dict__.update(fields)
    return error

"""The exceptions of this package: a base class, and one subclass for each kind of error that a caller can act on."""

from __future__ import annotations

from typing import Any

from ._hints import in_python


class ModelCacheError(Exception):
    """Base class of all errors that this package raises.

    ``str()`` of an error is the message in one line, as the command line prints it, and, if there is a remedy, a second
    line ``hint: …``, in the words of this package.
    """

    message: str
    """The error in one line, with artifact, tier and cause."""
    hint: str | None = None
    """The suggested remedy."""
    artifact: str | None = None
    """The artifact, as ``name@version`` or by its reference, if the error concerns one."""
    tier: str | None = None
    """The tier that failed: ``"disk"``, ``"remote"`` or ``"origin"``."""
    retry_after: float | None = None
    """Seconds after which the server asked to retry."""
    transient: bool = False
    """True if the same call may succeed later."""
    code: str = "other"
    """Stable identifier of the kind of error, as in the JSON of the command line."""
    failures: dict[str, ModelCacheError] | None = None
    """For calls with several references: the error of each reference that failed."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, dict(self.__dict__))


class NotFoundError(ModelCacheError, FileNotFoundError):
    """The artifact, revision or file was not found in any tier that was searched."""

    code = "not_found"


class UnauthorizedError(ModelCacheError, PermissionError):
    """Credentials are missing, wrong, expired or lack permission, or the repository is gated."""

    code = "unauthorized"


class IntegrityError(ModelCacheError):
    """Bytes do not match their digest, or a metadata record is corrupt. The bad bytes were not kept."""

    code = "corrupt"


class FullError(ModelCacheError):
    """The disk budget or the filesystem is full."""

    code = "full"


class UnavailableError(ModelCacheError):
    """A service did not answer, answered with a server error, or exceeded a timeout."""

    code = "unavailable"


class InvalidError(ModelCacheError, ValueError):
    """A name, reference, argument or setting is invalid."""

    code = "invalid"


class ConflictError(ModelCacheError):
    """The version already has other content, another writer is publishing it, or it is in use or pinned."""

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
    details: tuple[str | None, str | None, str | None, float | None, bool],
) -> ModelCacheError:
    """Build the exception for an error of the native module. Called by the native module."""
    hint, artifact, tier, retry_after, transient = details
    error = _CLASSES.get(kind, ModelCacheError)(message, hint=None if hint is None else in_python(hint))
    error.code = kind
    error.artifact, error.tier = artifact, tier
    error.retry_after, error.transient = retry_after, transient
    return error


def _rebuild(kind: type[ModelCacheError], message: str, fields: dict[str, Any]) -> ModelCacheError:
    """Rebuild a pickled error."""
    error = kind(message)
    error.__dict__.update(fields)
    return error

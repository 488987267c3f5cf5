"""A tiered, verifying cache for model artifacts: local disk, object store, origin.

    from modelcache import ModelCache

    cache = ModelCache()                     # settings from the environment, as for the command line
    path = cache.get("fraud-detector", "3")  # a pathlib.Path, leased until the cache is closed

Every error is a subclass of :class:`ModelCacheError`. Log records go to the logger ``modelcache``. The module
``modelcache.fastapi`` integrates the cache with FastAPI and Starlette.
"""

from __future__ import annotations

from ._cache import Lease, ModelCache
from ._errors import (
    ConflictError,
    DirectoryError,
    FullError,
    IntegrityError,
    InvalidError,
    ModelCacheError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
)
from ._file import CachedFile
from ._metrics import Metrics
from ._native import VERSION as __version__
from ._reports import (
    CachedArtifact,
    EvictReport,
    Finding,
    PinRecord,
    Progress,
    PutReport,
    ResolvedReference,
    Stats,
    TagReport,
    VerifyReport,
)

__all__ = [
    "CachedArtifact",
    "CachedFile",
    "ConflictError",
    "DirectoryError",
    "EvictReport",
    "Finding",
    "FullError",
    "IntegrityError",
    "InvalidError",
    "Lease",
    "Metrics",
    "ModelCache",
    "ModelCacheError",
    "NotFoundError",
    "PinRecord",
    "Progress",
    "PutReport",
    "ResolvedReference",
    "Stats",
    "TagReport",
    "UnauthorizedError",
    "UnavailableError",
    "VerifyReport",
    "__version__",
]

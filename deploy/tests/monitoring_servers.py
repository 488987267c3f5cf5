"""Programs that the tests of the monitoring run: stand-ins for the Hub and S3, the daemon, and Prometheus."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import yaml
from monitoring_expressions import ROOT, RULES

PROGRAMS = ROOT / "target/debug"
# Without a proxy of the environment: all servers are on this machine.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def optional_program(variable: str, name: str) -> str:
    """Returns a program of Debian's package prometheus. Skips the test if it is not installed."""
    path = os.environ.get(variable) or shutil.which(name)
    if not path:
        pytest.skip(
            f"{name} is not on the PATH, and {variable} is not set; on Debian and Ubuntu: apt-get install prometheus"
        )
    return path


def own_program(name: str) -> str:
    """Returns a program of this repository. Without it the tests fail, because nothing else tests them."""
    path = os.environ.get(f"MODELCACHE_TEST_{name.upper()}") or str(PROGRAMS / name)
    assert Path(path).is_file(), f"there is no {path}; build it: cargo build -p modelcache-cli -p modelcache-testkit"
    return path


def first_match(lines: IO[str], pattern: str) -> str:
    """Returns the group of the first line that matches. The other lines are read in the background."""
    seen = []
    for line in lines:
        seen.append(line)
        if found := re.search(pattern, line):
            threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
            return found[1]
    raise AssertionError(f"the program ended without {pattern!r}: {''.join(seen)}")


def wait_until(what: str, condition: Callable[[], object], timeout_s: float = 60) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


# The variable that a stand-in prints last.
LAST_VARIABLE = {"s3": "AWS_EC2_METADATA_DISABLED", "hub": "HF_ENDPOINT"}


class StandIn:
    """`testkit hub` or `testkit s3`. `env` has the variables that it prints."""

    def __init__(self, *arguments: str) -> None:
        command = [own_program("testkit"), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.env: dict[str, str] = {}
        while LAST_VARIABLE[arguments[0]] not in self.env:
            line = self.process.stdout.readline()
            assert line, f"{command} ended before it printed all variables"
            if line.startswith("export "):
                name, _, value = shlex.split(line)[1].partition("=")
                self.env[name] = value

    def stop(self) -> None:
        """Ends the server."""
        self.process.kill()
        self.process.wait()


class Daemon:
    """`modelcache serve` on a free port."""

    def __init__(self, environment: dict[str, str], *prewarm: str) -> None:
        environment = environment | {"MODEL_CACHE_LISTEN": "127.0.0.1:0"}
        command = [own_program("modelcache"), "serve", *prewarm]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        self.url = first_match(self.process.stderr, r"serving .* at (http://\S+)")

    def request(self, path: str, body: object = None) -> tuple[int, bytes]:
        """Returns status and body of a response."""
        request = urllib.request.Request(self.url + path)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with OPENER.open(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def metrics(self) -> str:
        """Returns the text of `/metrics`."""
        return self.request("/metrics")[1].decode()

    def value(self, sample: str) -> float:
        """Returns the present value of a sample, such as `modelcache_gets_total{from="disk"}`; 0 if it is absent."""
        found = re.search(rf"^{re.escape(sample)} (\S+)$", self.metrics(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def stop(self) -> None:
        """Ends the daemon."""
        self.process.kill()
        self.process.wait()


class Prometheus:
    """Prometheus with the rules of this repository, which asks a daemon every second."""

    def __init__(self, program: str, folder: Path, daemon: Daemon) -> None:
        target = daemon.url.removeprefix("http://")
        configuration = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [{"job_name": "modelcache", "static_configs": [{"targets": [target]}]}],
        }
        file = folder / "prometheus.yaml"
        file.write_text(yaml.safe_dump(configuration))
        # Prometheus does not tell which port it was given.
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "prometheus.log"
        command = [program, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
        with self.log.open("w") as log:
            listen = f"--web.listen-address=127.0.0.1:{port}"
            self.process = subprocess.Popen([*command, listen], stdout=log, stderr=log)
        wait_until("Prometheus has reached the daemon", lambda: self.is_up() and self.query("up == 1"))

    def is_up(self) -> bool:
        """Returns true once Prometheus answers."""
        assert self.process.poll() is None, f"Prometheus ended: {self.log.read_text()}"
        try:
            with OPENER.open(f"{self.url}/-/ready", timeout=10) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def get(self, path: str) -> Any:
        """Returns the data of an answer of the HTTP API."""
        try:
            with OPENER.open(f"{self.url}/api/v1/{path}", timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"Prometheus refuses {path}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Returns the present samples of an expression."""
        data = self.get("query?" + urllib.parse.urlencode({"query": expression}))
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        result: list[dict[str, Any]] = data["result"]
        return result

    def stop(self) -> None:
        """Ends Prometheus."""
        self.process.kill()
        self.process.wait()

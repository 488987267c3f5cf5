"""Runs the command lines of containers with the real programs, without a container.

Paths of the container become paths below a temporary folder, and its ports become free ports. Everything else is used
as the manifest has it: the command, the arguments, the environment and the configuration files.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

# Seconds until a program is started or stopped. It is long, because the test machine may be busy.
PATIENCE = 60
# Ports of the manifests.
HTTP, ADMIN = 8917, 8918


@dataclass
class Programs:
    """Paths of the built programs."""

    modelcache: Path
    testkit: Path


class Hub:
    """A stand-in for the Hugging Face Hub that serves the folders `org/name` of a folder."""

    def __init__(self, programs: Programs, folder: Path) -> None:
        self.folder = folder
        command = [str(programs.testkit), "hub", "--folder", str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        lines = iter(self.process.stdout.readline, "")
        found = next(filter(None, (re.search(r"HF_ENDPOINT=(\S+)", line) for line in lines)))
        self.endpoint = found[1]

    def file(self, name: str) -> bytes:
        """Returns the bytes of the only file of a repository."""
        return (self.folder / name / "model.safetensors").read_bytes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Container:
    """The command, the environment and the files of a container, as a manifest has them."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    # Files that volumes bring into the container, by absolute path.
    files: dict[str, str] = field(default_factory=dict)


def is_nearly_full(folder: Path) -> bool:
    """Returns true if the filesystem has less free space than the manifests keep, which is a quarter."""
    usage = shutil.disk_usage(folder)
    return usage.free < usage.total * 0.26


class Run:
    """A container that runs as a process below `root`."""

    def __init__(
        self, programs: Programs, container: Container, root: Path, cache_bytes: int = 0, **environment: str
    ) -> None:
        """With `cache_bytes`, `/cache` is a filesystem of this size, which needs root. Otherwise it is on the disk of this
        machine. If that is nearly full, the free space that the manifest keeps is not kept.
        """
        if not cache_bytes and is_nearly_full(root):
            environment.setdefault("MODEL_CACHE_MIN_FREE_BYTES", "1MB")
        self.root = root
        self.ports = dict(zip((HTTP, ADMIN), free_ports(2), strict=True))
        for path, text in container.files.items():
            self.path(path).parent.mkdir(parents=True, exist_ok=True)
            # In the files, paths are strings in quotes.
            self.path(path).write_text(self.with_ports(text).replace('"/', f'"{root}/'))
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        of_container = {name: self.translated(value) for name, value in container.environment.items()}
        self.environment = kept | of_container | environment
        assert container.command[0] == "modelcache"
        self.command = [str(programs.modelcache), *map(self.translated, container.command[1:])]
        if cache_bytes:
            mount = f'mount -t tmpfs -o size={cache_bytes} tmpfs "$0" && exec "$@"'
            self.path("/cache").mkdir()
            self.command = ["unshare", "--mount", "sh", "-c", mount, str(self.path("/cache")), *self.command]
        self.log = root / f"{self.ports[HTTP]}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def path(self, path: str) -> Path:
        """Returns the path on this machine of a path in the container."""
        return self.root / path.lstrip("/")

    def with_ports(self, text: str) -> str:
        for port, free in self.ports.items():
            text = re.sub(rf":{port}\b", f":{free}", text)
        return text

    def translated(self, text: str) -> str:
        return str(self.path(text)) if text.startswith("/") else self.with_ports(text)

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Runs the program to its end."""
        return subprocess.run(
            self.command, env=self.environment, cwd=self.root, capture_output=True, text=True, timeout=PATIENCE
        )

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, cwd=self.root, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """Sends SIGTERM, as the kubelet, ECS and Docker do, and returns the exit code."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def url(self, path: str, port: int = HTTP) -> str:
        return f"http://127.0.0.1:{self.ports[port]}{path}"

    def wait_until_ok(self, path: str, port: int) -> None:
        """Waits until a probe answers 200."""
        assert self.process
        deadline = time.monotonic() + PATIENCE
        while (answer := self.get(path, port)[0]) != 200:
            ended = self.process.poll()
            assert ended is None, f"ended with {ended}: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"{path} answers {answer}: {self.log.read_text()}"
            time.sleep(0.1)

    def get(self, path: str, port: int = HTTP, token: str | None = None) -> tuple[int, bytes]:
        """Returns status and body; status 0 if there is no answer. Follows redirects, as clients of the Hub do."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(self.url(path, port), headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def warnings(self) -> list[str]:
        """Returns the lines of the log that are warnings or errors."""
        found = re.compile(r" (WARN|ERROR) |\b(warning|error): ")
        return [line for line in self.log.read_text().splitlines() if found.search(line)]


def free_ports(count: int) -> list[int]:
    """Returns different ports that no program uses."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def of_pod(container: dict[str, Any], secrets: dict[str, dict[str, str]] | None = None) -> Container:
    """Returns a container of a pod. `secrets` has the text of secrets by name and key."""

    def value(variable: dict[str, Any]) -> str:
        if "valueFrom" not in variable:
            text: str = variable["value"]
            return text
        key = variable["valueFrom"]["secretKeyRef"]
        return (secrets or {})[key["name"]][key["key"]]

    environment = {variable["name"]: value(variable) for variable in container.get("env", [])}
    return Container([*container["command"], *container.get("args", [])], environment)

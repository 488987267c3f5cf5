"""Servers for tests: the S3 and Hub stand-ins of this repository, and a proxy that counts and limits bytes."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CHUNK = 16 << 10


class StandIn:
    """A process that runs `testkit s3` or `testkit hub`. `env` has the variables that it prints."""

    def __init__(self, *arguments: str) -> None:
        binary = os.environ.get("TESTKIT", str(ROOT / "target/debug/testkit"))
        self.process = subprocess.Popen([binary, *arguments], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.env: dict[str, str] = {}
        # The server prints this variable last.
        last = {"s3": "AWS_EC2_METADATA_DISABLED", "hub": "HF_ENDPOINT"}[arguments[0]]
        while last not in self.env:
            line = self.process.stdout.readline()
            assert line, f"{binary} exited before it printed all variables"
            if line.startswith("export "):
                for pair in shlex.split(line)[1:]:
                    name, _, value = pair.partition("=")
                    self.env[name] = value

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class SlowProxy:
    """A proxy in front of a local server that counts and limits the bytes sent to clients.

    `bytes_per_second` limits the rate over all connections, :meth:`let_through` the amount.
    """

    def __init__(self, target: int, *, port: int = 0) -> None:
        self.target = target
        self.bytes_per_second: float | None = None
        self.bytes_to_clients = 0
        self._lock = threading.Lock()
        self._limit: int | None = None
        self._limit_moved = threading.Condition(self._lock)
        self._free_at = 0.0
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def let_through(self, count: int | None) -> None:
        """Let at most `count` more bytes through, in whole chunks, and then block; ``None`` removes the limit."""
        with self._limit_moved:
            self._limit = None if count is None else self.bytes_to_clients + count
            self._limit_moved.notify_all()

    def stop(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            upload = threading.Thread(target=self._copy, args=(client, server, False), daemon=True)
            upload.start()
            self._copy(server, client, True)

    def _copy(self, source: socket.socket, target: socket.socket, to_client: bool) -> None:
        try:
            while chunk := source.recv(CHUNK):
                if to_client:
                    self._wait_for_turn(len(chunk))
                target.sendall(chunk)
        except OSError:
            pass
        finally:
            for end in (source, target):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def _wait_for_turn(self, count: int) -> None:
        """Wait until `count` bytes may be sent, and count them."""
        with self._limit_moved:
            self._limit_moved.wait_for(lambda: self._limit is None or self.bytes_to_clients + count <= self._limit)
            self.bytes_to_clients += count
            rate = self.bytes_per_second
            now = time.monotonic()
            # Connections share the rate: each chunk reserves the next free time slot.
            self._free_at = max(self._free_at, now)
            pause = 0.0 if rate is None else self._free_at - now
            if rate is not None:
                self._free_at += count / rate
        time.sleep(pause)

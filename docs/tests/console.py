"""Runs the console blocks of a page in one shell, and compares their output.

In a block, a line that begins with `$ ` is a command. It continues on the next line if it ends in a backslash. The
lines below it are its output: `…` stands for any text of a line, a line `…` for any number of lines. The output of a
command without such lines is not compared. A command that ends in `&` starts a server, and the next command waits for its port.

A block with a title (```python title="engine.py") is written to the file of that name. A block below the comment
`<!-- not run: REASON -->` is not run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TIMEOUT_S = 90
MARK = "end-of-command"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
BLOCK = re.compile(r"^```(\w*)(?: title=\"(.+?)\")?[^\n]*\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: ([^>]+) -->\s*\Z")


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    # The file that the block shows.
    title: str | None
    text: str
    line: int
    # Why the block is not run.
    reason: str | None


@dataclass
class Command:
    """A command of a console block, with the lines that it should print."""

    text: str
    line: int
    output: list[str] = field(default_factory=list)


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found = []
    for match in BLOCK.finditer(page):
        reason = NOT_RUN.search(page[: match.start()])
        line = page.count("\n", 0, match.start()) + 1
        found.append(Block(match[1], match[2], match[3], line, reason[1] if reason else None))
    return found


def commands(block: Block) -> list[Command]:
    """Return the commands of a console block."""
    found: list[Command] = []
    continues = False
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if continues:
            found[-1].text += "\n" + line
        elif line.startswith("$ "):
            found.append(Command(line[2:], number))
        else:
            assert found, f"line {number}: a console block begins with `$ `"
            found[-1].output.append(line)
        continues = (continues or line.startswith("$ ")) and line.endswith("\\")
    return found


def matches(expected: list[str], printed: list[str]) -> bool:
    """Compare lines, with `…` as a wildcard."""
    if not expected:
        return not printed
    if expected[0].strip() == "…":
        return any(matches(expected[1:], printed[skipped:]) for skipped in range(len(printed) + 1))
    pattern = ".*".join(re.escape(part) for part in expected[0].rstrip().split("…"))
    return bool(printed) and re.fullmatch(pattern, printed[0]) is not None and matches(expected[1:], printed[1:])


class Shell:
    """A shell in a folder, with a loopback network of its own if the system permits it."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [*own_network(), "bash", "--noprofile", "--norc"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout

    def run(self, command: str) -> tuple[int, list[str]]:
        """Run a command. Returns its exit code and the lines that it printed, on standard output and standard error."""
        servers = self._listening() if command.rstrip().endswith("&") else None
        self._input.write(f"{{ {command}\n}} </dev/null\nprintf '\\n{MARK} %d\\n' $?\n".encode())
        self._input.flush()
        timer = threading.Timer(TIMEOUT_S, self.close)
        timer.start()
        lines = []
        for line in iter(self._output.readline, b""):
            lines.append(ESCAPES.sub("", line.decode(errors="replace")).rstrip())
            if lines[-1].startswith(MARK):
                break
        else:
            lines.append(f"no answer within {TIMEOUT_S} s")
            return 1, lines
        timer.cancel()
        code = int(lines.pop().split()[1])
        while lines and not lines[-1]:
            lines.pop()
        if servers is not None:
            self._wait_for_server(servers)
        return code, lines

    def _listening(self) -> set[str]:
        """Return the TCP addresses that are listened on in the network of the shell."""
        found: set[str] = set()
        for name in ("tcp", "tcp6"):
            rows = [line.split() for line in Path(f"/proc/{self._process.pid}/net/{name}").read_text().splitlines()[1:]]
            found.update(row[1] for row in rows if row[3] == "0A")
        return found

    def _wait_for_server(self, before: set[str]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self._listening() <= before:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)
        # Time for the lines that a server prints once it listens.
        time.sleep(0.3)

    def close(self) -> None:
        """Kill the shell and the programs that it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def own_network() -> list[str]:
    """Return the command that starts a program in a network of its own, or nothing if that is not possible here."""
    up = (
        "import fcntl, os, socket, struct, sys;"
        "fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sH14s', b'lo', 0x41, b''));"  # SIOCSIFFLAGS: up, running
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    for unshare in (["unshare", "--net"], ["unshare", "--map-current-user", "--net"]):
        prefix = [*unshare, sys.executable, "-c", up]
        try:
            if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
                return prefix
        except FileNotFoundError:
            break
    return []

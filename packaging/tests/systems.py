"""Root filesystems in which the files of a release are used, and where these files are."""

import errno
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

DIST = Path(os.environ["TEST_DIST"])
# A debug build is packed without the wheel.
IS_RELEASE = any(DIST.glob("*.whl"))
# Size of the only file of the repository org/model.
MODEL_BYTES = 1 << 20
# The number of the first system call on x86_64 that Linux 4.4 does not have: copy_file_range.
FIRST_NEWER_CALL = 326
# Time until a program must have ended. It is long, because the test machine may be busy.
TIMEOUT_S = 120


def package(variable: str) -> Path:
    """Returns the folder of an unpacked Debian package. Skips the test if it is not on this machine."""
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set: the Debian packages could not be downloaded")
    return Path(os.environ[variable])


def file(pattern: str) -> Path:
    """Returns the release file that matches the pattern."""
    (found,) = DIST.glob(pattern)
    return found


def refuse_system_calls_from(number: int) -> bytes:
    """Returns a seccomp filter that answers ENOSYS to all system calls from this number on."""
    instructions = [
        (0x20, 0, 0, 0),  # load the number of the call
        (0x35, 0, 1, number),  # skip the next instruction if it is lower
        (0x06, 0, 0, 0x00050000 | errno.ENOSYS),
        (0x06, 0, 0, 0x7FFF0000),  # allow the call
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


@dataclass
class Root:
    """A root filesystem in a folder. Its programs see no other files, and no network unless `network` is set."""

    folder: Path
    network: bool = False
    # User and group ID of the programs. Only user 0 may change the folder.
    uid: int = 0

    def command(self, *command: str, environment: Mapping[str, str] | None = None) -> list[str]:
        """Returns the command that runs a program in the root filesystem."""
        bind = "--bind" if self.uid == 0 else "--ro-bind"
        sandbox = [
            str(package("TEST_BUBBLEWRAP") / "usr/bin/bwrap"),
            "--unshare-all",
            "--die-with-parent",
            "--clearenv",
        ]
        sandbox += ["--uid", str(self.uid), "--gid", str(self.uid), bind, str(self.folder), "/"]
        sandbox += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--bind", str(self.cache), "/cache"]
        variables = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/home/u"} | dict(environment or {})
        for name, value in variables.items():
            sandbox += ["--setenv", name, value]
        if self.network:
            sandbox.append("--share-net")
        return [*sandbox, *command]

    def run(
        self,
        *command: str,
        check: bool = True,
        oldest_kernel: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program in the root filesystem to its end, with `oldest_kernel` as on Linux 4.4 of January 2016."""
        line = self.command(*command, environment=environment)
        with tempfile.TemporaryFile() as program:
            program.write(refuse_system_calls_from(FIRST_NEWER_CALL))
            program.seek(0)
            if oldest_kernel:
                line[1:1] = ["--seccomp", str(program.fileno())]
            done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT_S, pass_fds=[program.fileno()])
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def __post_init__(self) -> None:
        for name in ("proc", "dev", "tmp", "home/u", "cache"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    @property
    def cache(self) -> Path:
        """The folder /cache of the programs, which they may write."""
        cache = self.folder.parent / f"{self.folder.name}-cache"
        cache.mkdir(exist_ok=True)
        return cache

    def write(self, path: str, text: str) -> None:
        target = self.folder / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def get_model(self, hub: str, **options: bool) -> None:
        """Downloads the repository of the stand-in for the Hub by the name hub.example, and checks its size."""
        self.network = True
        self.write("/etc/hosts", "127.0.0.1 hub.example\n")
        variables = {"MODEL_CACHE_DIR": "/cache", "HF_ENDPOINT": re.sub(r"//[^:]+", "//hub.example", hub)}
        done = self.run("modelcache", "get", "hf://org/model@main", environment=variables, **options)
        path = Path(done.stdout.strip()).relative_to("/cache") / "model.safetensors"
        assert (self.cache / path).stat().st_size == MODEL_BYTES


def damage(path: Path) -> None:
    """Changes one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

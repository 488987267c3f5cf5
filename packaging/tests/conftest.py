"""Fixtures of the tests of the release files: systems to install them in, and a stand-in for the Hub."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from systems import MODEL_BYTES, Root, file, package


@pytest.fixture
def busybox(tmp_path: Path) -> Root:
    """A system with busybox and musl, without glibc, as Alpine is."""
    folder = tmp_path / "busybox"
    shutil.copytree(package("TEST_BUSYBOX"), folder, symlinks=True)
    root = Root(folder)
    (folder / "usr/bin").mkdir(parents=True, exist_ok=True)
    root.run("/bin/busybox", "--install", "-s", "/usr/bin")
    (folder / "bin/sh").symlink_to("busybox")
    return root


@pytest.fixture
def debian(tmp_path: Path) -> Root:
    """A small Debian system, with an empty list of installed packages."""
    folder = tmp_path / "debian"
    shutil.copytree(package("TEST_DEBIAN"), folder, symlinks=True)
    root = Root(folder)
    (folder / "bin/sh").unlink(missing_ok=True)
    (folder / "bin/sh").symlink_to("dash")
    for path in ("var/lib/dpkg/status", "var/lib/dpkg/available"):
        root.write(path, "")
    for path in ("updates", "info", "triggers"):
        (folder / "var/lib/dpkg" / path).mkdir(parents=True, exist_ok=True)
    return root


@pytest.fixture(params=["debian", "busybox"])
def system(request: pytest.FixtureRequest) -> Root:
    """Each of the systems."""
    root: Root = request.getfixturevalue(request.param)
    return root


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a stand-in for the Hugging Face Hub with the repository org/model."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "org/model").mkdir(parents=True)
    (folder / "org/model/model.safetensors").write_bytes(bytes(MODEL_BYTES))
    command = [os.environ["TEST_TESTKIT"], "hub", "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    found = next(filter(None, (re.search(r"HF_ENDPOINT=(\S+)", line) for line in iter(process.stdout.readline, ""))))
    yield found[1]
    process.kill()
    process.wait()


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """The contents of the release archive."""
    subprocess.run(["tar", "-xzf", str(file("modelcache-*-linux.tar.gz")), "-C", str(tmp_path)], check=True)
    (folder,) = tmp_path.glob("modelcache-*-linux")
    return folder

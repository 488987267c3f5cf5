"""The wheel: installed without a network into a clean environment of every CPython that this machine has."""

import re
import subprocess
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from systems import IS_RELEASE, file

pytestmark = pytest.mark.skipif(not IS_RELEASE, reason="a debug build is packed without the wheel")

# The oldest glibc of the platform tag manylinux2014.
OLDEST_GLIBC = (2, 17)
USE = """
import pathlib, sys, modelcache
folder = pathlib.Path(sys.argv[1])
(folder / "model.bin").write_bytes(b"weights")
cache = modelcache.ModelCache(folder / "cache")
cache.put("model", "1", folder / "model.bin")
assert cache.get("model", "1").read_bytes() == b"weights"
"""


def interpreters() -> list[Path]:
    """Returns the Python interpreters of this machine, one for each version."""
    folders = [Path("/usr/bin"), Path("/usr/local/bin"), *(Path.home() / ".pyenv/versions").glob("*/bin")]
    found: dict[str, Path] = {}
    for folder in folders:
        for path in folder.glob("python3.*"):
            if re.fullmatch(r"python3\.\d+", path.name):
                found.setdefault(path.name, path)
    return [found[name] for name in sorted(found, key=lambda name: int(name.partition(".")[2]))]


def install(interpreter: Path, folder: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Makes an environment and installs the wheel. Returns the folder of its programs, and how pip ended."""
    made = subprocess.run([interpreter, "-m", "venv", folder / "venv"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"{interpreter} makes no environments: {made.stdout}{made.stderr}")
    programs = folder / "venv/bin"
    pip: list[str | Path] = [programs / "python", "-m", "pip", "install", "--no-index", "--disable-pip-version-check"]
    return programs, subprocess.run([*pip, file("*.whl")], capture_output=True, text=True)


@pytest.mark.parametrize("interpreter", interpreters(), ids=lambda path: path.name)
def test_each_python_installs_and_uses_it(interpreter: Path, tmp_path: Path) -> None:
    programs, done = install(interpreter, tmp_path)
    if int(interpreter.name.partition(".")[2]) < 10:
        assert done.returncode != 0, "versions before 3.10 are refused"
        return
    assert done.returncode == 0, done.stderr
    subprocess.run([programs / "python", "-c", USE, tmp_path], check=True)
    version = subprocess.run([programs / "modelcache", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.split() == ["modelcache", file("*.whl").name.split("-")[1]]


def test_it_needs_no_newer_glibc_than_its_tag_says() -> None:
    assert "-cp310-abi3-manylinux2014_" in file("*.whl").name
    with zipfile.ZipFile(file("*.whl")) as wheel:
        native = wheel.read("modelcache/_native.abi3.so")
    versions = {(int(major), int(minor)) for major, minor in re.findall(rb"GLIBC_(\d+)\.(\d+)", native)}
    assert versions and max(versions) <= OLDEST_GLIBC


def test_the_wheel_has_the_metadata_that_pypi_shows() -> None:
    with zipfile.ZipFile(file("*.whl")) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
        assert {"modelcache/py.typed", "modelcache/_native.pyi"} <= set(wheel.namelist())
        (sbom,) = (name for name in wheel.namelist() if "/sboms/" in name)
        assert "pkg:cargo/pyo3@" in wheel.read(sbom).decode() and "file://" not in wheel.read(sbom).decode()
    assert metadata["Name"] == "modelcache"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT OR Apache-2.0"
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    assert "from modelcache import ModelCache" in metadata.get_payload()
    assert set(metadata.get_all("License-File") or []) == {"LICENSE-APACHE", "LICENSE-MIT", "LICENSE-THIRD-PARTY"}

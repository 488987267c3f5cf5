"""The release archive: its contents, and the program in root filesystems that have little or nothing else."""

import platform
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from systems import DIST, IS_RELEASE, Root, file

REPOSITORY = Path(__file__).resolve().parents[2]
# A program that succeeds if the system call statx is missing.
STATX_IS_MISSING = """#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(void) { return syscall(SYS_statx, 0, 0, 0, 0, 0) == -1 && errno == ENOSYS ? 0 : 1; }
"""
# A plug-in of glibc that ends every program that loads it.
PLUGIN = "#include <unistd.h>\n__attribute__((constructor)) static void trap(void) { _exit(99); }\n"


def compile(source: str, target: Path, *flags: str) -> None:
    """Compiles a C program."""
    subprocess.run(["cc", *flags, "-x", "c", "-o", target, "-"], input=source, text=True, check=True)


def test_the_digests_are_those_of_the_files() -> None:
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=DIST, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    named = {line.partition(":")[0] for line in done.stdout.splitlines()}
    assert named == {path.name for path in DIST.iterdir()} - {"SHA256SUMS", "install.sh"}


def test_the_archive_has_the_program_its_pages_and_all_licences(unpacked: Path) -> None:
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    pages = {name for name in names if name.startswith("man/")}
    assert {"man/modelcache.1", "man/modelcache-get.1", "man/modelcache-storage-initializer.1"} <= pages
    assert names - pages == {
        "modelcache",
        "completions/modelcache.bash",
        "completions/_modelcache",
        "completions/modelcache.fish",
        "README.md",
        "CHANGELOG.md",
        "LICENSE-APACHE",
        "LICENSE-MIT",
        "THIRD-PARTY-LICENSES",
    }
    licences = (unpacked / "THIRD-PARTY-LICENSES").read_text()
    assert re.search(r"^rustls \S+ \(.*MIT.*\)$", licences, re.MULTILINE)
    assert "GNU LESSER GENERAL PUBLIC LICENSE" in licences, "the program has glibc in it"
    assert "criterion" not in licences, "a package that only tests use"


def test_owner_and_time_in_the_archive_are_not_those_of_the_build_machine() -> None:
    with tarfile.open(file("modelcache-*-linux.tar.gz")) as archive:
        entries = archive.getmembers()
    assert {(entry.uid, entry.gid, entry.uname, entry.gname) for entry in entries} == {(0, 0, "", "")}
    assert len({entry.mtime for entry in entries}) == 1
    assert {entry.mode for entry in entries} == {0o644, 0o755}


@pytest.mark.skipif(not IS_RELEASE, reason="a debug build has the paths of its sources")
def test_the_program_has_no_path_of_the_build_machine(unpacked: Path) -> None:
    program = (unpacked / "modelcache").read_bytes()
    for path in (str(REPOSITORY), str(Path.home())):
        assert path.encode() not in program


def test_the_program_runs_where_nothing_else_is(unpacked: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(unpacked / "modelcache", folder)
    root = Root(folder)
    assert root.run("/modelcache", "--version").stdout.startswith("modelcache ")
    root.write("/model/weights.bin", "weights")
    variables = {"MODEL_CACHE_DIR": "/cache"}
    root.run("/modelcache", "put", "model@1", "/model", environment=variables)
    path = root.run("/modelcache", "get", "model@1", environment=variables).stdout.strip()
    assert (root.cache / Path(path).relative_to("/cache") / "weights.bin").read_text() == "weights"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="system calls have other numbers here")
def test_the_program_needs_no_system_call_of_the_last_ten_years(unpacked: Path, debian: Root, hub: str) -> None:
    shutil.copy(unpacked / "modelcache", debian.folder / "usr/bin/modelcache")
    compile(STATX_IS_MISSING, debian.folder / "usr/bin/probe")
    debian.run("probe", oldest_kernel=True)
    assert debian.run("probe", check=False).returncode == 1, "this machine has the call"
    debian.get_model(hub, oldest_kernel=True)
    variables = {"MODEL_CACHE_DIR": "/cache"}
    debian.write("/model/weights.bin", "weights")
    for command in (
        ["put", "model@1", "/model"],
        ["get", "model@1", "--verify"],
        ["stats"],
        ["evict", "model@1", "--yes"],
    ):
        debian.run("modelcache", *command, oldest_kernel=True, environment=variables)


def test_each_system_downloads_by_a_host_name(unpacked: Path, system: Root, hub: str) -> None:
    shutil.copy(unpacked / "modelcache", system.folder / "usr/bin/modelcache")
    system.get_model(hub)


def test_the_program_loads_no_plugin_of_the_machines_glibc(unpacked: Path, debian: Root, hub: str) -> None:
    libraries = next((debian.folder / "lib").glob("*-linux-gnu"))
    compile(PLUGIN, libraries / "libnss_trap.so.2", "-shared", "-fPIC")
    debian.write("/etc/nsswitch.conf", "hosts: trap files dns\npasswd: trap files\n")
    debian.write("/etc/hosts", "127.0.0.1 hub.example\n")
    shutil.copy(unpacked / "modelcache", debian.folder / "usr/bin/modelcache")
    # A program of the system itself loads the plug-in, so the trap works.
    assert debian.run("getent", "hosts", "hub.example", check=False).returncode == 99
    debian.get_model(hub)


def test_the_sbom_is_valid_and_has_what_is_linked() -> None:
    text = file("*.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert '"purl": "pkg:cargo/modelcache-cli@' in text
    assert '"purl": "pkg:cargo/rustls@' in text
    assert '"name": "glibc"' in text, "the program is linked with it"
    for other in ("criterion", "ring"):
        assert f"pkg:cargo/{other}@" not in text, "a package that only tests use, or no feature of the program"
    assert str(REPOSITORY) not in text

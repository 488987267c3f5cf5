"""The install script, in small systems and on this machine."""

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from systems import DIST, TIMEOUT_S, Root, damage, file

SCRIPT = DIST / "install.sh"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy of the archive in a folder of its own."""
    folder = tmp_path / "files"
    folder.mkdir()
    shutil.copy(file("modelcache-*-linux.tar.gz"), folder)
    return folder


@pytest.fixture
def server(files: Path) -> Iterator[str]:
    """The address of an HTTP server with the files."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(files))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def install(
    *arguments: str | Path, path: str = os.environ["PATH"], **variables: str
) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(SCRIPT), *map(str, arguments)]
    environment = {"PATH": path} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


def refused(done: subprocess.CompletedProcess[str], prefix: Path, *words: str) -> None:
    """Checks that the script failed with these words, and installed and left nothing."""
    assert done.returncode == 1, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
    assert not [path for path in prefix.rglob("*") if path.is_file()]
    assert not list(prefix.glob(".modelcache-install*"))


def test_each_system_installs_with_one_command(system: Root) -> None:
    shutil.copytree(DIST, system.folder / "opt/release")
    done = system.run("sh", "/opt/release/install.sh", "--from", "/opt/release", "--prefix", "/usr/local")
    assert done.stdout.strip().endswith("as /usr/local/bin/modelcache")
    assert system.run("modelcache", "--version").stdout.split()[1] in SCRIPT.read_text()
    installed = {
        path.relative_to(system.folder / "usr/local").as_posix() for path in (system.folder / "usr/local").rglob("*")
    }
    assert {
        "share/man/man1/modelcache.1",
        "share/man/man1/modelcache-get.1",
        "share/bash-completion/completions/modelcache",
        "share/zsh/site-functions/_modelcache",
        "share/fish/vendor_completions.d/modelcache.fish",
    } <= installed


def test_the_commands_of_the_page_work_as_printed(debian: Root) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/install.md").read_text()
    commands = re.findall(r"^\$ (.*)$", page, re.MULTILINE)
    # Python packages have tests of their own, and this system has no compiler.
    commands = [command for command in commands if not command.startswith(("pip ", "cargo "))]
    assert [command.split()[0] for command in commands] == ["sh", "dpkg", "sha256sum"]
    shutil.copytree(DIST, debian.folder / "opt/release")
    for command in commands:
        debian.run("sh", "-c", f"cd /opt/release && {command}")
        debian.run("sh", "-c", "PATH=$HOME/.local/bin:$PATH modelcache --version")


def test_it_downloads_to_the_home_folder_and_names_the_path(server: str, tmp_path: Path) -> None:
    home = tmp_path / "home dir"
    done = install("--from", server, HOME=str(home))
    program = home / ".local/bin/modelcache"
    assert f'add it to the PATH: export PATH="{home}/.local/bin:$PATH"' in done.stdout, done.stderr
    assert subprocess.run([program, "--version"], capture_output=True, check=True).stdout.startswith(b"modelcache ")
    assert not list((home / ".local").glob(".modelcache-install*"))


def test_a_program_that_runs_is_replaced(files: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    assert install("--from", files, "--prefix", prefix).returncode == 0
    variables = {
        "PATH": os.environ["PATH"],
        "MODEL_CACHE_DIR": str(tmp_path / "cache"),
        "MODEL_CACHE_LISTEN": "127.0.0.1:0",
    }
    running = subprocess.Popen([prefix / "bin/modelcache", "serve"], env=variables, stderr=subprocess.DEVNULL)
    try:
        done = install("--from", files, "--prefix", prefix)
        assert done.returncode == 0, done.stderr
        assert running.poll() is None
    finally:
        running.kill()
        running.wait()


def test_a_damaged_archive_installs_nothing(files: Path, tmp_path: Path) -> None:
    (archive,) = files.iterdir()
    damage(archive)
    refused(install("--from", files, "--prefix", tmp_path / "p"), tmp_path / "p", "SHA-256", "nothing was installed")


def test_an_incomplete_download_installs_nothing(files: Path, server: str, tmp_path: Path) -> None:
    (archive,) = files.iterdir()
    os.truncate(archive, archive.stat().st_size // 2)
    refused(install("--from", server, "--prefix", tmp_path / "p"), tmp_path / "p", "SHA-256")


def test_an_archive_that_is_not_there_is_named(server: str, tmp_path: Path) -> None:
    refused(install("--from", f"{server}/missing", "--prefix", tmp_path / "p"), tmp_path / "p", "cannot download")
    refused(install("--from", tmp_path / "missing", "--prefix", tmp_path / "p"), tmp_path / "p", "cannot read")


def test_machines_without_an_archive_are_refused(files: Path, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for system, machine, message in [("Linux", "riscv64", "no archive for riscv64"), ("Darwin", "x86_64", "Darwin")]:
        uname = programs / "uname"
        uname.write_text(f'#!/bin/sh\n[ "$1" = -s ] && echo {system} || echo {machine}\n')
        uname.chmod(0o755)
        done = install("--from", files, "--prefix", tmp_path / "p", path=f"{programs}:{os.environ['PATH']}")
        refused(done, tmp_path / "p", message)


def test_wrong_arguments_are_refused(files: Path, tmp_path: Path) -> None:
    for arguments, message in [(["--force"], "unknown argument --force"), (["--from"], "--from needs a value")]:
        refused(install(*arguments, HOME=str(tmp_path / "h")), tmp_path / "h", message)
    (tmp_path / "file").write_text("")
    done = install("--from", files, "--prefix", tmp_path / "file")
    assert done.returncode == 1 and "choose another" in done.stderr


def test_a_name_that_is_a_folder_is_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "p/bin/modelcache").mkdir(parents=True)
    done = install("--from", files, "--prefix", tmp_path / "p")
    assert done.returncode == 1 and "p/bin/modelcache is a folder; remove it" in done.stderr


def test_without_a_home_folder_the_prefix_is_required(files: Path) -> None:
    for arguments in (["--from", files], ["--from", files, "--prefix", ""]):
        done = install(*arguments)
        assert done.returncode == 1 and "choose a folder with --prefix" in done.stderr


def test_relative_and_odd_folders_are_what_they_look_like(files: Path, tmp_path: Path) -> None:
    for prefix in ("-p", "a:b", "back\\slash", "two words"):
        command = ["sh", str(SCRIPT), "--from", os.path.relpath(files, tmp_path), "--prefix", prefix]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        subprocess.run([tmp_path / prefix / "bin/modelcache", "--version"], check=True, capture_output=True)


def test_other_users_may_use_what_is_installed_whatever_the_umask(files: Path, tmp_path: Path) -> None:
    command = ["sh", "-c", 'umask 077; exec sh "$@"', "sh", str(SCRIPT), "--from", files, "--prefix", tmp_path / "p"]
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "p").rglob("*"))


def test_a_script_that_arrives_incomplete_through_a_pipe_does_nothing(files: Path, tmp_path: Path) -> None:
    script = SCRIPT.read_bytes()
    # Without its last line, the call of the main function.
    for length in (len(script) // 2, script.rindex(b"\nmain ")):
        command = ["sh", "-s", "--", "--from", str(files), "--prefix", str(tmp_path / "p")]
        subprocess.run(command, input=script[:length], capture_output=True, timeout=TIMEOUT_S)
        assert not (tmp_path / "p").exists()
    done = subprocess.run(["sh", "-s", "--", "--help"], input=script, capture_output=True, timeout=TIMEOUT_S)
    assert done.returncode == 0 and b"--prefix FOLDER" in done.stdout

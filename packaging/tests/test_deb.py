"""The Debian package: installed, replaced, removed and purged by dpkg in a small Debian system."""

import shutil
import stat
from pathlib import Path

import pytest

from systems import Root, damage, file

ENVIRONMENT = "etc/modelcache/modelcache.env"


@pytest.fixture
def installed(debian: Root) -> Root:
    shutil.copy(file("*.deb"), debian.folder / "modelcache.deb")
    debian.run("dpkg", "--install", "/modelcache.deb")
    return debian


def test_the_installed_program_runs_and_its_files_have_their_places(installed: Root) -> None:
    assert installed.run("modelcache", "--version").stdout.startswith("modelcache ")
    assert installed.run("dpkg", "--verify", "modelcache").stdout == ""
    listed = set(installed.run("dpkg", "--listfiles", "modelcache").stdout.split())
    assert {
        "/usr/bin/modelcache",
        "/usr/share/man/man1/modelcache.1.gz",
        "/usr/share/man/man1/modelcache-serve.1.gz",
        "/usr/share/bash-completion/completions/modelcache",
        "/usr/share/zsh/vendor-completions/_modelcache",
        "/usr/share/fish/vendor_completions.d/modelcache.fish",
        "/usr/lib/systemd/system/modelcache.service",
        "/usr/lib/systemd/system/modelcache.socket",
        "/usr/share/doc/modelcache/copyright",
        "/usr/share/doc/modelcache/changelog.gz",
        f"/{ENVIRONMENT}",
    } <= listed
    assert stat.S_IMODE((installed.folder / ENVIRONMENT).stat().st_mode) == 0o600
    status = installed.run("dpkg", "--status", "modelcache").stdout
    assert "Status: install ok installed" in status
    assert "Depends:" not in status, "the program is linked statically"


def test_the_unit_starts_the_installed_program(installed: Root) -> None:
    unit = (installed.folder / "usr/lib/systemd/system/modelcache.service").read_text()
    started = [line.split("=", 1)[1].split() for line in unit.splitlines() if line.startswith("ExecStart")]
    assert [words[0] for words in started] == ["/usr/bin/modelcache"] * 2
    # The check that runs before the daemon, with the settings of the unit.
    installed.run(*started[0], environment={"MODEL_CACHE_DIR": "/cache"})


def test_settings_survive_an_update_and_removal_but_not_a_purge(installed: Root) -> None:
    settings = installed.folder / ENVIRONMENT
    settings.write_text("MODEL_CACHE_MAX_BYTES=1GB\n")
    installed.run("dpkg", "--install", "/modelcache.deb")
    assert settings.read_text() == "MODEL_CACHE_MAX_BYTES=1GB\n"
    installed.run("dpkg", "--remove", "modelcache")
    assert settings.exists()
    left = [path for path in (installed.folder / "usr").rglob("*modelcache*") if path.is_file()]
    assert left == []
    installed.run("dpkg", "--purge", "modelcache")
    assert not settings.exists()


def test_a_systemd_that_does_not_answer_hinders_nothing(installed: Root) -> None:
    (installed.folder / "run/systemd/system").mkdir(parents=True)
    installed.write("/usr/bin/systemctl", "#!/bin/sh\nexit 1\n")
    (installed.folder / "usr/bin/systemctl").chmod(0o755)
    for command in (["--install", "/modelcache.deb"], ["--remove", "modelcache"], ["--purge", "modelcache"]):
        installed.run("dpkg", *command)


def test_the_package_says_what_it_is(debian: Root) -> None:
    shutil.copy(file("*.deb"), debian.folder / "modelcache.deb")
    fields = debian.run("dpkg-deb", "--field", "/modelcache.deb").stdout
    assert "Package: modelcache\n" in fields
    assert "Recommends: ca-certificates\n" in fields
    assert file("*.deb").name.removesuffix(".deb").split("_")[1] == fields.split("Version: ")[1].split("\n")[0]


def test_a_damaged_package_is_refused(debian: Root) -> None:
    target = debian.folder / "modelcache.deb"
    shutil.copy(file("*.deb"), target)
    damage(target)
    assert debian.run("dpkg", "--install", "/modelcache.deb", check=False).returncode != 0
    assert not Path(debian.folder / "usr/bin/modelcache").exists()

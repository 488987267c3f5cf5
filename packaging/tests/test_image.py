"""The container image: unpacked by umoci, which did not build it, and run without a container runtime."""

import hashlib
import json
import os
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

import layout
from systems import MODEL_BYTES, TIMEOUT_S, Root, file, package

DOCKERFILE = Path(layout.__file__).with_name("Dockerfile")
LICENCES = ("LICENSE-APACHE", "LICENSE-MIT", "THIRD-PARTY-LICENSES")
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The image as a folder in the OCI layout."""
    with tarfile.open(file("*-image.tar")) as archive:
        archive.extractall(tmp_path / "image", filter="data")
    return tmp_path / "image"


@pytest.fixture
def bundle(image: Path, tmp_path: Path) -> Path:
    """The image, unpacked for a container runtime: the folder `rootfs` and `config.json`."""
    umoci = package("TEST_UMOCI") / "usr/bin/umoci"
    rights = [] if os.geteuid() == 0 else ["--rootless"]
    tag = json.loads((image / "index.json").read_text())["manifests"][0]["annotations"][
        "org.opencontainers.image.ref.name"
    ]
    subprocess.run([umoci, "unpack", *rights, "--image", f"{image}:{tag}", tmp_path / "bundle"], check=True)
    return tmp_path / "bundle"


def process(bundle: Path) -> dict[str, Any]:
    """Returns the process that a runtime would start."""
    found: dict[str, Any] = json.loads((bundle / "config.json").read_text())["process"]
    return found


def container(bundle: Path, network: bool = True) -> Root:
    """The root filesystem, read-only, for the user of the image."""
    return Root(bundle / "rootfs", network=network, uid=process(bundle)["user"]["uid"])


def variables(bundle: Path) -> dict[str, str]:
    return dict(variable.split("=", 1) for variable in process(bundle)["env"])


def test_the_dockerfile_has_no_finding_of_the_linter() -> None:
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_blob_has_its_digest(image: Path) -> None:
    blobs = list((image / "blobs/sha256").iterdir())
    assert len(blobs) == 5, "three layers, the configuration and the manifest"
    for blob in blobs:
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name


def test_docker_finds_the_same_image_as_other_tools(image: Path) -> None:
    (loaded,) = json.loads((image / "manifest.json").read_text())
    index = json.loads((image / "index.json").read_text())["manifests"][0]
    manifest = json.loads((image / "blobs" / index["digest"].replace(":", "/")).read_text())
    paths = [f"blobs/{blob['digest'].replace(':', '/')}" for blob in (manifest["config"], *manifest["layers"])]
    assert [loaded["Config"], *loaded["Layers"]] == paths
    assert loaded["RepoTags"] == [f"modelcache:{index['annotations']['org.opencontainers.image.ref.name']}"]


def test_the_image_has_the_program_and_no_shell(bundle: Path) -> None:
    root = bundle / "rootfs"
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}
    licences = {f"usr/share/doc/modelcache/{name}" for name in LICENCES}
    assert files == {"usr/bin/modelcache", CERTIFICATES, "etc/passwd", "etc/group"} | licences
    assert oct((root / "tmp").stat().st_mode)[-4:] == "1777"
    started = process(bundle)
    assert started["args"] == ["modelcache", "serve"]
    assert (started["user"]["uid"], started["user"]["gid"]) == (1000, 1000)


def test_the_cache_folder_belongs_to_the_user_of_the_image(image: Path) -> None:
    entries: dict[str, tuple[int, int, str]] = {}
    for blob in (image / "blobs/sha256").iterdir():
        if tarfile.is_tarfile(blob):
            with tarfile.open(blob) as layer:
                entries |= {entry.name: (entry.uid, entry.gid, oct(entry.mode)) for entry in layer}
    assert entries["cache"] == (1000, 1000, "0o750")
    assert entries["usr/bin/modelcache"] == (0, 0, "0o755")


def test_the_daemon_serves_from_a_read_only_root(bundle: Path, hub: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    root = container(bundle)
    environment = variables(bundle) | {"MODEL_CACHE_LISTEN": address, "HF_ENDPOINT": hub}
    daemon = subprocess.Popen(root.command(*process(bundle)["args"], environment=environment))
    try:
        assert len(answer(f"http://{address}/org/model/resolve/main/model.safetensors")) == MODEL_BYTES
    finally:
        # The processes of the sandbox end with its first one.
        daemon.kill()
        daemon.wait()
    assert list(root.cache.rglob("model.safetensors"))


def answer(url: str) -> bytes:
    """Returns what the daemon answers, as soon as it answers."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:
            assert time.monotonic() < deadline, error
            time.sleep(0.1)


@pytest.fixture
def https(tmp_path: Path) -> Iterator[tuple[str, trustme.CA]]:
    """The address of an HTTPS server, and the authority of its certificate."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    (tmp_path / "web").mkdir()
    (tmp_path / "web/model.bin").write_bytes(b"model")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://localhost:{server.server_port}", authority
        server.shutdown()


def test_servers_are_trusted_by_the_certificates_of_the_image(bundle: Path, https: tuple[str, trustme.CA]) -> None:
    url, authority = https
    root = container(bundle)
    root.write("/etc/hosts", "127.0.0.1 localhost\n")
    command = ["modelcache", "get", f"{url}/model.bin"]
    failed = root.run(*command, check=False, environment=variables(bundle))
    assert failed.returncode != 0 and "certificate" in failed.stderr
    with (root.folder / CERTIFICATES).open("ab") as bundled:
        bundled.write(authority.cert_pem.bytes())
    root.run(*command, environment=variables(bundle))


def test_instructions_that_the_builder_does_not_know_are_refused(tmp_path: Path) -> None:
    for line, message in [
        ("RUN true", "RUN is unknown"),
        ("COPY one /file", "only folders"),
        ("FROM debian:13", "without a base"),
    ]:
        (tmp_path / "Dockerfile").write_text(f"{line}\n")
        with pytest.raises((ValueError, AssertionError), match=message):
            layout.build(tmp_path, tmp_path / "image.tar", "name:tag", "x86_64", 0)

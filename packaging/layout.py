"""Build a container image from a Dockerfile, without Docker.

The image is an OCI layout in a tar file, which `docker load`, `podman load` and `skopeo copy oci-archive:` read. Equal
inputs make equal bytes.

This is no general builder. It knows the instructions of the Dockerfile next to it, and refuses any other. The formats:
https://github.com/opencontainers/image-spec, version 1.0.
"""

import gzip
import hashlib
import io
import json
import shlex
import tarfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def neutral(entry: tarfile.TarInfo, epoch: int) -> tarfile.TarInfo:
    """Returns the entry of an archive without owner, time and umask of this machine."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = epoch
    entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
    return entry


class Image:
    """The layers and the configuration that the instructions have made so far."""

    def __init__(self, folder: Path, epoch: int) -> None:
        self.folder = folder
        self.epoch = epoch
        # Each is an uncompressed tar archive.
        self.layers: list[bytes] = []
        self.config: dict[str, Any] = {"Env": []}
        self.history: list[str] = []

    def apply(self, instruction: str, arguments: str) -> None:
        match instruction:
            case "FROM":
                assert arguments == "scratch", "only images without a base"
                return
            case "COPY":
                self.copy(shlex.split(arguments))
            case "ENV":
                self.config["Env"] += shlex.split(arguments)
            case "USER":
                self.config["User"] = arguments
            case "EXPOSE":
                self.config.setdefault("ExposedPorts", {})[f"{arguments}/tcp"] = {}
            case "ENTRYPOINT" | "CMD":
                self.config[instruction.capitalize()] = json.loads(arguments)
            case _:
                raise ValueError(f"the instruction {instruction} is unknown")
        self.history.append(f"{instruction} {arguments}")

    def copy(self, words: list[str]) -> None:
        """Adds a layer with the contents of a folder, as `COPY [--chown=UID:GID] [--chmod=MODE] SOURCE/ TARGET/`."""
        options = dict(word.removeprefix("--").split("=") for word in words if word.startswith("--"))
        source, target = (word for word in words if not word.startswith("--"))
        assert source.endswith("/") and target.endswith("/"), f"{source} {target}: only folders are copied"
        uid, gid = (int(part) for part in options.pop("chown", "0:0").split(":"))
        mode = options.pop("chmod", None)
        assert not options, f"unknown options of COPY: {options}"
        root = self.folder / source
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for path in sorted([root, *root.rglob("*")]):
                name = (target + path.relative_to(root).as_posix()).lstrip("/").removesuffix("/.")
                if name == ".":
                    continue
                entry = neutral(tar.gettarinfo(path, arcname=name), self.epoch)
                entry.uid, entry.gid = uid, gid
                if mode is not None:
                    entry.mode = int(mode, 8)
                if entry.isfile():
                    with path.open("rb") as file:
                        tar.addfile(entry, file)
                else:
                    tar.addfile(entry)
        self.layers.append(layer.getvalue())


def read(dockerfile: str) -> list[tuple[str, str]]:
    """Returns the instructions of a Dockerfile, each with its arguments."""
    lines = [line for line in dockerfile.splitlines() if line and not line.startswith("#")]
    return [(instruction, arguments) for instruction, _, arguments in (line.partition(" ") for line in lines)]


def write(image: Image, archive: Path, name: str, architecture: str) -> None:
    """Writes the image as an OCI layout in a tar file."""
    files: dict[str, bytes] = {}

    def blob(content: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        files[f"blobs/sha256/{digest}"] = content
        kind = f"application/vnd.oci.image.{media_type}"
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}

    def document(value: Any) -> bytes:
        return json.dumps(value, sort_keys=True).encode()

    created = datetime.fromtimestamp(image.epoch, timezone.utc).isoformat().replace("+00:00", "Z")
    platform = {"architecture": ARCHITECTURES[architecture], "os": "linux"}
    history = [
        {"created": created, "created_by": line} | ({} if line.startswith("COPY ") else {"empty_layer": True})
        for line in image.history
    ]
    config = platform | {
        "created": created,
        "config": image.config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(x).hexdigest()}" for x in image.layers]},
        "history": history,
    }
    layers = [blob(gzip.compress(layer, mtime=0), "layer.v1.tar+gzip") for layer in image.layers]
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "config": blob(document(config), "config.v1+json"),
        "layers": layers,
    }
    manifest["mediaType"] = "application/vnd.oci.image.manifest.v1+json"
    reference = blob(document(manifest), "manifest.v1+json") | {
        "platform": platform,
        # The first is the tag within the layout, the second the name that `docker load` gives to the image.
        "annotations": {
            "org.opencontainers.image.ref.name": name.rpartition(":")[2],
            "io.containerd.image.name": f"docker.io/library/{name}",
        },
    }
    # For the classic image store of Docker, which does not read index.json.
    paths = [f"blobs/sha256/{one['digest'].removeprefix('sha256:')}" for one in (manifest["config"], *layers)]
    files["manifest.json"] = document([{"Config": paths[0], "RepoTags": [name], "Layers": paths[1:]}])
    files["index.json"] = document({"schemaVersion": 2, "manifests": [reference]})
    files["oci-layout"] = document({"imageLayoutVersion": "1.0.0"})
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for path, content in sorted(files.items()):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mtime = len(content), image.epoch
            tar.addfile(entry, io.BytesIO(content))


def build(folder: Path, archive: Path, name: str, architecture: str, epoch: int) -> None:
    """Builds the image of `folder/Dockerfile`. `name` is its name and tag, `epoch` the time of all files."""
    image = Image(folder, epoch)
    for instruction, arguments in read((folder / "Dockerfile").read_text()):
        image.apply(instruction, arguments)
    write(image, archive, name, architecture)

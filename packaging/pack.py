"""Pack built programs into the files of a release.

    python pack.py release PROGRAM WORK FOLDER
    python pack.py licences PACKAGE FILE
    python pack.py sbom PACKAGE FILE

`release` writes the archive, the Debian package, the container image and the SBOM (list of components) of the program,
then SHA256SUMS of these files and of a wheel in FOLDER, and last the install script, which has the digest of the
archive. The other two write a part of the wheel. Equal inputs make equal bytes: all files in the archives get the time
of the environment variable SOURCE_DATE_EPOCH, and modes that do not depend on the umask.
"""

import argparse
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import certifi

import layout

ROOT = Path(__file__).resolve().parents[1]
PACKAGING = ROOT / "packaging"
PACKAGE = "modelcache-cli"
ARCHITECTURE = platform.machine()
COMPLETIONS = {"bash": "modelcache.bash", "zsh": "_modelcache", "fish": "modelcache.fish"}
LICENCES = ("LICENSE-APACHE", "LICENSE-MIT")
LGPL = PACKAGING / "LGPL-2.1"
NO_TEXT = "The package has no file with its licence. LICENSE-APACHE and LICENSE-MIT have the texts."
OTHER_PARTS = """The program contains these packages, each under its licence. It also contains the standard library of
Rust (MIT OR Apache-2.0).

"""
GLIBC = """The program is linked statically with the GNU C Library (https://www.gnu.org/software/libc/). To link it with
another version of that library, build modelcache from its sources on a machine with that version.
"""
# File names under which packages have their licences.
LICENCE_FILES = re.compile(r"(licen[cs]e|copying|notice|unlicense|copyright)(?!.*\.(rs|py|go|sh|c|h)$)", re.IGNORECASE)


def run(*command: str | Path, **environment: str) -> str:
    """Runs a command in the root of the repository, and returns what it prints."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def cargo(*arguments: str) -> str:
    return run(os.environ.get("CARGO", "cargo"), *arguments, "--locked")


def rust(field: str) -> str:
    """Returns a value of `rustc -vV`, such as `host` or `release`."""
    found = re.search(rf"^{field}: (.*)$", run("rustc", "-vV"), re.MULTILINE)
    assert found is not None
    return found[1]


class Workspace:
    """The packages of the workspace and of crates.io, as cargo resolves them on this platform."""

    def __init__(self) -> None:
        found = json.loads(cargo("metadata", "--format-version", "1", "--filter-platform", rust("host")))
        self.packages: dict[str, dict[str, Any]] = {package["id"]: package for package in found["packages"]}
        self._dependencies = {node["id"]: node["deps"] for node in found["resolve"]["nodes"]}

    def package(self, name: str) -> dict[str, Any]:
        """Returns a package of this workspace."""
        return next(one for one in self.packages.values() if one["name"] == name and one["source"] is None)

    def parts(self, name: str) -> list[dict[str, Any]]:
        """Returns a package and its ordinary dependencies, sorted by name. Procedural macros are among them."""
        # Unlike the metadata, the tree has only the features that this package enables.
        tree = cargo("tree", "--edges", "normal", "--prefix", "none", "--format", "{p}", "--package", name)
        used = {tuple(line.split()[:2]) for line in tree.splitlines() if line}
        parts = [one for one in self.packages.values() if (one["name"], f"v{one['version']}") in used]
        return sorted(parts, key=lambda package: (package["name"], package["version"]))

    def dependencies(self, package: dict[str, Any]) -> list[str]:
        """Returns the ids of the dependencies of a package, without those for its build script and its tests."""
        dependencies = self._dependencies[package["id"]]
        return [one["pkg"] for one in dependencies if any(kind["kind"] is None for kind in one["dep_kinds"])]


def third_party_licences(packages: list[dict[str, Any]], is_static: bool) -> str:
    """Returns the licences of the packages of others, and with `is_static` that of glibc. Equal texts appear once."""
    users: dict[str, list[str]] = {}
    for package in packages:
        if package["source"] is None:
            continue
        folder = Path(package["manifest_path"]).parent
        # Parts of a package may be under other licences, which are in folders of their own.
        files = [path for path in sorted(folder.rglob("*")) if LICENCE_FILES.match(path.name) and path.is_file()]
        texts = [path.read_text(errors="replace").strip() for path in files]
        title = f"{package['name']} {package['version']} ({package['license'] or 'see the text'})"
        if not texts and not re.search("Apache-2.0|MIT", package["license"] or ""):
            raise SystemExit(f"{title} has no file with its licence, and neither Apache-2.0 nor MIT applies")
        users.setdefault("\n\n".join(texts) or NO_TEXT, []).append(title)
    line = "-" * 80
    sections = [f"{line}\n" + "\n".join(names) + f"\n{line}\n\n{text}\n" for text, names in users.items()]
    if is_static:
        sections.append(f"{line}\nGNU C Library\n{line}\n\n{GLIBC}\n{LGPL.read_text()}")
    return OTHER_PARTS + "\n".join(sections)


def make_archive_folder(folder: Path, program: Path, licences: str) -> None:
    """Makes the folder that the archive has: the program, completions, manual pages, licences."""
    (folder / "completions").mkdir(parents=True)
    installed = folder / "modelcache"
    shutil.copyfile(program, installed)
    installed.chmod(0o755)
    for shell, file in COMPLETIONS.items():
        (folder / "completions" / file).write_text(run(installed, "completions", shell))
    run(installed, "man", "--output", folder / "man")
    for file in ("README.md", "CHANGELOG.md", *LICENCES):
        shutil.copyfile(ROOT / file, folder / file)
    (folder / "THIRD-PARTY-LICENSES").write_text(licences)


def tar(folder: Path, target: Path, epoch: int) -> None:
    """Packs a folder. Owner and time of the files are not those of this machine."""
    with (
        target.open("wb") as file,
        gzip.GzipFile("", "wb", 9, file, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.GNU_FORMAT) as packed,
    ):
        # In sorted order, also below the folder.
        packed.add(folder, folder.name, filter=lambda entry: layout.neutral(entry, epoch))


def debian_package(unpacked: Path, work: Path, folder: Path, version: str) -> None:
    """Makes the Debian package from the folder of the archive."""
    (work / "man").mkdir(parents=True)
    for page in (unpacked / "man").iterdir():
        (work / "man" / f"{page.name}.gz").write_bytes(gzip.compress(page.read_bytes(), mtime=0))
    (work / "changelog.gz").write_bytes(gzip.compress((unpacked / "CHANGELOG.md").read_bytes(), mtime=0))
    texts = [(unpacked / name).read_text() for name in (*LICENCES, "THIRD-PARTY-LICENSES")]
    (work / "copyright").write_text("modelcache: MIT OR Apache-2.0\n\n" + "\n".join(texts))
    nfpm = Path(sys.executable).parent / "nfpm"
    variables = {
        "VERSION": version,
        "DEB_ARCHITECTURE": layout.ARCHITECTURES[ARCHITECTURE],
        "ARCHIVE": str(unpacked),
        "DEB": str(work),
    }
    run(nfpm, "package", "--config", PACKAGING / "nfpm.yaml", "--packager", "deb", "--target", folder, **variables)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def image(unpacked: Path, folder: Path, target: Path, version: str, epoch: int) -> None:
    """Makes the container image, and the folder from which `docker build` makes one with the same files."""
    root = folder / "rootfs"
    documents = root / "usr/share/doc/modelcache"
    for made in (root / "usr/bin", root / "etc/ssl/certs", documents, folder / "empty"):
        made.mkdir(parents=True)
    shutil.copy(unpacked / "modelcache", root / "usr/bin/modelcache")
    for name in (*LICENCES, "THIRD-PARTY-LICENSES"):
        shutil.copyfile(unpacked / name, documents / name)
    shutil.copyfile(certifi.where(), root / "etc/ssl/certs/ca-certificates.crt")
    # The names of the users, for programs that look into the container.
    (root / "etc/passwd").write_text("root:x:0:0::/:\nmodelcache:x:1000:1000::/:\n")
    (root / "etc/group").write_text("root:x:0:\nmodelcache:x:1000:\n")
    shutil.copyfile(PACKAGING / "Dockerfile", folder / "Dockerfile")
    layout.build(folder, target, f"modelcache:{version}", ARCHITECTURE, epoch)


def install_script(folder: Path, target: Path, version: str, url: str) -> None:
    """Writes the install script, with the digests of the archives."""
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    values = {
        "@VERSION@": version,
        "@URL@": url,
        "@DIGESTS@": "\n".join(line for line in sums if line.endswith("-linux.tar.gz")),
    }
    text = (PACKAGING / "install.sh").read_text()
    for name, value in values.items():
        assert name in text, f"{name} is not in install.sh"
        text = text.replace(name, value)
    target.write_text(text)
    target.chmod(0o755)


def sbom(workspace: Workspace, name: str, parts: list[dict[str, Any]], epoch: int, is_static: bool) -> str:
    """Returns the SBOM of a package with these parts as CycloneDX JSON, with `is_static` also with glibc as a part."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    entry = re.compile(r'name = "(.*)"\nversion = "(.*)"\nsource = ".*"\nchecksum = "(.*)"')
    checksums = {(name, version): sum for name, version, sum in entry.findall((ROOT / "Cargo.lock").read_text())}
    factory = LicenseFactory()

    def component(package: dict[str, Any]) -> Component:
        checksum = checksums.get((package["name"], package["version"]))
        expression = (package["license"] or "").replace("/", " OR ")
        return Component(
            name=package["name"],
            version=package["version"],
            type=ComponentType.APPLICATION if package["name"] == name else ComponentType.LIBRARY,
            bom_ref=f"{package['name']} {package['version']}",
            description=package["description"],
            purl=PackageURL("cargo", name=package["name"], version=package["version"]),
            licenses=[factory.make_from_string(expression)] if expression else [],
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=checksum)] if checksum else [],
        )

    made = {package["id"]: component(package) for package in parts}
    bom = Bom()
    bom.metadata.timestamp = datetime.fromtimestamp(epoch, timezone.utc)
    for package in parts:
        one = made[package["id"]]
        if package["name"] == name:
            bom.metadata.component = one
        else:
            bom.components.add(one)
        bom.register_dependency(one, [made[other] for other in workspace.dependencies(package) if other in made])
    others = [("rust-std", rust("release"), "MIT OR Apache-2.0")]
    if is_static:
        others.append(("glibc", (os.confstr("CS_GNU_LIBC_VERSION") or "").split()[1], "LGPL-2.1-or-later"))
    for other, version, licence in others:
        licences = [factory.make_from_string(licence)]
        bom.components.add(Component(name=other, version=version, bom_ref=f"{other} {version}", licenses=licences))
    # Derived from names and versions, so that equal lists have equal bytes.
    bom.serial_number = uuid5(NAMESPACE_URL, " ".join(sorted(f"{one.name} {one.version}" for one in bom.components)))
    return JsonV1Dot6(bom).output_as_string(indent=2)


def release(program: Path, work: Path, folder: Path, epoch: int) -> None:
    """Writes all files of a release into `folder`, except the wheel, which may be there already."""
    workspace = Workspace()
    package = workspace.package(PACKAGE)
    version = package["version"]
    unpacked = work / f"modelcache-{version}-{ARCHITECTURE}-linux"
    parts = workspace.parts(PACKAGE)
    make_archive_folder(unpacked, program, third_party_licences(parts, is_static=True))
    tar(unpacked, folder / f"{unpacked.name}.tar.gz", epoch)
    debian_package(unpacked, work / "deb", folder, version)
    packed = folder / f"modelcache-{version}-{ARCHITECTURE}-image.tar"
    image(unpacked, work / "image", packed, version, epoch)
    (folder / f"modelcache-{version}.cdx.json").write_text(sbom(workspace, PACKAGE, parts, epoch, is_static=True))

    sums = [f"{digest(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums))
    # Where the files of a release are, if the repository is known.
    url = f"{package['repository']}/releases/download/v{version}" if package["repository"] else ""
    install_script(folder, folder / "install.sh", version, url)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:>12,}  {path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    task = tasks.add_parser("release")
    task.add_argument("program", type=Path)
    task.add_argument("work", type=Path, help="a folder for the parts of the files")
    task.add_argument("folder", type=Path, help="the folder of the files; a wheel in it is kept")
    for name in ("licences", "sbom"):
        task = tasks.add_parser(name)
        task.add_argument("package")
        task.add_argument("file", type=Path)
    arguments = parser.parse_args()
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    os.umask(0o022)
    if arguments.task == "release":
        release(arguments.program.resolve(), arguments.work.resolve(), arguments.folder.resolve(), epoch)
        return
    workspace = Workspace()
    parts = workspace.parts(arguments.package)
    if arguments.task == "licences":
        arguments.file.write_text(third_party_licences(parts, is_static=False))
    else:
        arguments.file.write_text(sbom(workspace, arguments.package, parts, epoch, is_static=False))


if __name__ == "__main__":
    main()

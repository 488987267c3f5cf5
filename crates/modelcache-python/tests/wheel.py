"""Pack a wheel for tests from a native module that cargo has built.

    python wheel.py NATIVE_MODULE FOLDER

Maturin builds the wheel that is shipped. It compiles the package alone, with other features of the dependencies, so
that most dependencies are built a second time. Here, cargo has built the module together with the workspace instead.
"""

from __future__ import annotations

import re
import sys
import sysconfig
import zipfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
TAG = f"cp310-abi3-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def main(native: Path, folder: Path) -> None:
    project = (PACKAGE / "pyproject.toml").read_text()
    scripts = project.split("[project.scripts]\n")[1].split("\n\n")[0].replace('"', "")
    match = re.search(r'^version = "(.*)"', (PACKAGE.parents[1] / "Cargo.toml").read_text(), re.MULTILINE)
    assert match is not None
    version = match[1]
    info = f"modelcache-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: modelcache\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: false\nTag: {TAG}\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{scripts}\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"modelcache-{version}-{TAG}.whl", "w") as wheel:
        for source in sorted((PACKAGE / "python").rglob("*")):
            if source.suffix in {".py", ".pyi"} or source.name == "py.typed":
                wheel.write(source, source.relative_to(PACKAGE / "python"))
        wheel.write(native, "modelcache/_native.abi3.so")
        for name, text in files.items():
            wheel.writestr(name, text)
        record = f"{info}/RECORD"
        wheel.writestr(record, "".join(f"{name},,\n" for name in [*wheel.namelist(), record]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

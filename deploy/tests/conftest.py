"""Fixtures of the tests below deploy/: the built programs, and a stand-in for the Hugging Face Hub."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from programs import Hub, Programs

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", Path(__file__).resolve().parents[2] / "target"))


@pytest.fixture(scope="session")
def programs() -> Programs:
    """The programs that `cargo xtask deploy` has built."""
    return Programs(
        modelcache=Path(os.environ.get("MODELCACHE", TARGET / "debug/modelcache")),
        testkit=Path(os.environ.get("TESTKIT", TARGET / "debug/testkit")),
    )


@pytest.fixture(scope="session")
def hub(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A stand-in for the Hub. It has the models of the examples, with other content."""
    folder = tmp_path_factory.mktemp("hub")
    for name in ("sentence-transformers/all-MiniLM-L6-v2", "Qwen/Qwen3-8B"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(random.Random(name).randbytes(300_000))
    with Hub(programs, folder) as hub:
        yield hub

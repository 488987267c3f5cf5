"""The page docs/python.md: all Python blocks in it run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from conftest import write_model
from servers import ROOT


def test_every_block_of_the_page_runs(
    s3: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/python.md").read_text()
    blocks = [block.split("\n```")[0] for block in page.split("\n```python\n")[1:]]
    assert len(blocks) > 8
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("MODEL_CACHE_REMOTE")
    monkeypatch.setenv("MODEL_CACHE_S3_BUCKET", "models")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    write_model(work / "model", 100_000)
    # The hand-written cache on the page handles only files at the top of the folder.
    (work / "model/tokenizer/vocab.txt").unlink()
    (work / "model/tokenizer").rmdir()
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for block in blocks:
            exec(compile(block, "docs/python.md", "exec"), names)
        from starlette.testclient import TestClient

        with TestClient(names["app"]) as client:
            deadline = time.monotonic() + 60
            while client.get("/readyz").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert client.get("/model").json() == '{"hidden_size": 384}'
    finally:
        names["cache"].close()

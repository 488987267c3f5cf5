"""Errors: classes, messages and hints. Log records."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import modelcache
import pytest
from conftest import write_model
from modelcache import ModelCacheError, NotFoundError


def test_errors_derive_from_one_base_and_from_builtin_exceptions() -> None:
    for name in modelcache.__all__:
        kind = getattr(modelcache, name)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            assert issubclass(kind, ModelCacheError)
    assert issubclass(NotFoundError, FileNotFoundError)
    assert issubclass(modelcache.InvalidError, ValueError)
    assert issubclass(modelcache.UnauthorizedError, PermissionError)


def test_an_error_has_code_artifact_message_and_hint(open_cache: Any) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        open_cache().get("absent", "1")
    error = caught.value
    assert isinstance(error, NotFoundError)
    assert (error.code, error.artifact) == ("not_found", "absent@1")
    assert error.hint
    assert str(error) == f"{error.message}\nhint: {error.hint}"
    assert error.message.startswith("absent@1: ")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.artifact) == (str(error), "absent@1")


def test_a_server_without_answer_is_unavailable(s3: str, open_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 (discard): connections are refused.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(modelcache.UnavailableError) as caught:
        open_cache(retry_deadline=0).get("m", "1")
    assert caught.value.tier == "remote"


def test_wrong_credentials_are_unauthorized(s3: str, open_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PermissionError) as caught:
        open_cache(retry_deadline=0).get("m", "1")
    assert isinstance(caught.value, modelcache.UnauthorizedError)
    # The message must not expose the secret.
    assert "wrong" not in str(caught.value)


def test_other_content_under_a_version_is_a_conflict(tmp_path: Path, open_cache: Any) -> None:
    cache, model = open_cache(), write_model(tmp_path / "model", 1000)
    cache.put("m", "1", model)
    (model / "config.json").write_text("{}")
    with pytest.raises(modelcache.ConflictError):
        cache.put("m", "1", model)
    with pytest.raises(modelcache.IntegrityError, match="safetensors"):
        cache.put("m", "2", model, expect="safetensors")
    with pytest.raises(modelcache.InvalidError, match="no tier"):
        cache.put("m", "2", model, tier="elsewhere")


def test_an_artifact_larger_than_the_budget_is_refused(tmp_path: Path, open_cache: Any) -> None:
    with pytest.raises(modelcache.FullError):
        open_cache(max_bytes=10_000).put("m", "1", write_model(tmp_path / "model", 100_000))


def test_arguments_of_the_wrong_type_raise_type_error(open_cache: Any) -> None:
    cache = open_cache()
    for arguments in ({"reference": 3}, {"reference": "m", "version": 3}, {"reference": "m@1", "timeout": "soon"}):
        with pytest.raises(TypeError):
            cache.get(**arguments)


def test_log_records_go_to_logging(s3: str, tmp_path: Path, open_cache: Any, caplog: pytest.LogCaptureFixture) -> None:
    cache = open_cache(max_bytes=150_000)
    for version in ("1", "2"):
        model = write_model(tmp_path / version, 100_000)
        (model / "config.json").write_text(version)
        (model / "weights.bin").write_bytes(version.encode() * 100_000)
        with caplog.at_level(logging.INFO, "modelcache"):
            cache.put("m", version, model)
    [record] = [record for record in caplog.records if "evicted" in record.getMessage()]
    assert record.name.startswith("modelcache.")
    assert record.levelno == logging.INFO
    assert "m@1" in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.ERROR, "modelcache"):
        cache.put("m", "3", write_model(tmp_path / "3", 90_000))
    assert caplog.records == []

"""Errors: classes, messages and hints. Log records."""

from __future__ import annotations

import asyncio
import inspect
import logging
import pickle
from pathlib import Path
from typing import Any

import modelcache
import pytest
from conftest import write_model
from modelcache import ModelCacheError, NotFoundError
from modelcache._hints import in_python
from modelcache._native import keyword_of_flag


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
    for arguments, message_part in (
        ({"reference": 3}, "get() argument 'reference' must be str, not int"),
        ({"reference": "m", "version": 1}, "get() argument 'version' must be str or None, not int"),
        ({"reference": "m@1", "timeout": "soon"}, "get() argument 'timeout' must be float or None, not str"),
        ({"reference": "m@1", "verify": "yes"}, "get() argument 'verify' must be bool, not str"),
        ({"reference": "m@1", "local_dir": 3}, "get() argument 'local_dir' must be str, PathLike or None, not int"),
        ({"reference": "m@1", "allow_patterns": 3}, "'allow_patterns' must be str, a list of str or None, not int"),
        ({"reference": "m@1", "ignore_patterns": [3]}, "a list of str or None, not a list with int"),
        ({"reference": "m@1", "token": 3}, "get() argument 'token' must be str, bool or None, not int"),
        ({"reference": "m@1", "progress": 3}, "get() argument 'progress' must be a function, bool or None, not int"),
        ({"reference": "m@1", "colour": 3}, "unexpected keyword argument 'colour'"),
        ({}, "missing 1 required positional argument: 'reference'"),
    ):
        for call in (cache.get, lambda **arguments: asyncio.run(cache.aget(**arguments))):
            with pytest.raises(TypeError) as caught:
                call(**arguments)
            assert message_part in str(caught.value)
    for call, message_part in (
        (lambda: cache.put("m", 1, "."), "put() argument 'version' must be str, not int"),
        (lambda: cache.evict("m", 1), "evict() argument 'version' must be str or None, not int"),
        (lambda: cache.evict("m", "1", tier=1), "evict() argument 'tier' must be 'all', 'disk' or 'remote', not int"),
        (lambda: cache.prewarm([("m", 1)]), "must be a list of str or a pair of str, not a list with tuple"),
        (lambda: cache.prewarm(["m@1"], jobs="4"), "prewarm() argument 'jobs' must be int, not str"),
        (lambda: cache.verify(tier=3), "verify() argument 'tier' must be 'disk', 'remote' or 'all', not int"),
        (lambda: cache.open("m@1", 3), "open() argument 'path' must be str or None, not int"),
        (lambda: 3 in cache, "contains() argument 'reference' must be str, not int"),
        (lambda: open_cache(max_bytes={}), "ModelCache() argument 'max_bytes' must be"),
        (lambda: open_cache(remote_options=3), "ModelCache() argument 'remote_options' must be"),
        (lambda: open_cache(token=3), "ModelCache() argument 'token' must be str, bool or None, not int"),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        assert message_part in str(caught.value)


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        ("`modelcache ls` and `modelcache ls --remote` list the artifacts",
         "`cache.list_artifacts()` and `cache.list_artifacts(remote=True)` list the artifacts"),
        ("`modelcache verify --tier remote --repair` uploads it again",
         '`cache.verify(tier="remote", repair=True)` uploads it again'),
        ("the copy is damaged; `modelcache put --force` replaces it",
         "the copy is damaged; `cache.put(…, force=True)` replaces it"),
        ("put the artifact again: modelcache put NAME@VERSION PATH",
         "put the artifact again: cache.put(NAME, VERSION, PATH)"),
        ("remove the pin first: modelcache unpin 'a b@1'", 'remove the pin first: cache.unpin("a b@1")'),
        ("name the version: `modelcache tag m@3 prod`", 'name the version: `cache.tag("m", "3", "prod")`'),
        # Commands without a counterpart, and those of other programs, stay.
        ("`modelcache tag --remove m@3` removes the tag", "`modelcache tag --remove m@3` removes the tag"),
        ("run `aws s3 rm --recursive`, with --serve-artifacts", "run `aws s3 rm --recursive`, with --serve-artifacts"),
    ],
)  # fmt: skip
def test_commands_in_hints_become_method_calls(hint: str, expected: str) -> None:
    assert in_python(hint) == expected


def test_the_hint_of_an_error_is_in_the_words_of_the_package(tmp_path: Path, open_cache: Any) -> None:
    cache, model = open_cache(), write_model(tmp_path / "model", 1000)
    cache.put("m", "1", model)
    with pytest.raises(modelcache.InvalidError) as caught:
        cache.get("m@1/config.json", allow_patterns="*")
    assert "--" not in str(caught.value.hint)
    (model / "config.json").write_text("{}")
    with pytest.raises(modelcache.ConflictError) as conflict:
        cache.put("m", "1", model)
    assert "force=True" in str(conflict.value.hint)
    assert "--force" not in str(conflict.value)
    with pytest.raises(modelcache.InvalidError) as offline:
        cache.get("hf://org/model", force_refresh=True, local_files_only=True)
    assert offline.value.hint == (
        "leave out force_refresh=True, or leave out offline=True, local_files_only=True and ModelCache(offline=True) "
        "to be online"
    )
    with pytest.raises(modelcache.FullError) as full:
        open_cache(max_bytes=500).put("m", "2", model)
    assert "raise ModelCache(max_bytes=…)" in str(full.value.hint)


def test_keywords_of_options_are_parameters_of_the_package() -> None:
    parameters = {
        name
        for method in vars(modelcache.ModelCache).values()
        if callable(method)
        for name in inspect.signature(method).parameters
    }
    flags = ["config", "exclude", "expect", "follow-links", "force", "include", "into", "local-files-only", "offline"]
    flags += ["read-only", "refresh", "remote", "repair", "revision", "sidecar", "tier"]
    for flag in flags:
        keyword = keyword_of_flag(f"--{flag}")
        assert keyword is not None and keyword[0] in parameters, flag
    assert keyword_of_flag("--iam-policy") is None


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

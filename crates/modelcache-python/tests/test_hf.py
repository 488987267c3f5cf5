"""``modelcache.hf``: the functions of huggingface_hub, served by the cache. Each test runs in a process of its own."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from modelcache import InvalidError, hf


def python(script: str, **variables: str) -> Any:
    """Run a script in a new interpreter, and return what it prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


COLLECT = """
import json
found = {}
def attempt(name, call, *args, **kwargs):
    try:
        found[name] = str(call(*args, **kwargs))
    except Exception as error:
        found[name] = [kind.__name__ for kind in type(error).__mro__]
"""


def test_the_signatures_accept_every_argument_of_huggingface_hub() -> None:
    for name in ("snapshot_download", "hf_hub_download"):
        theirs = inspect.signature(getattr(huggingface_hub, name)).parameters
        ours = inspect.signature(getattr(hf, name)).parameters
        known = set(ours) | hf._TRANSPORT | {"cache_dir", "endpoint", "dry_run"}
        assert set(theirs) <= known
        named = [parameter for parameter in ours.values() if parameter.kind is not parameter.VAR_KEYWORD]
        for parameter in named:
            assert parameter.kind is theirs[parameter.name].kind
            assert parameter.default == theirs[parameter.name].default
    with pytest.raises(TypeError, match="allow_pattern'"):
        hf.snapshot_download("org/model", allow_pattern="*")
    with pytest.raises(InvalidError, match="MODEL_CACHE_DIR"):
        hf.snapshot_download("org/model", cache_dir="/somewhere")
    with pytest.raises(InvalidError, match="dataset"):
        hf.snapshot_download("org/model", repo_type="models")


def test_files_and_snapshots_have_the_paths_of_a_hugging_face_cache(hub: Path, tmp_path: Path) -> None:
    script = COLLECT + """
from modelcache import hf
attempt("snapshot", hf.snapshot_download, "org/model", max_workers=4, etag_timeout=5)
attempt("part", hf.snapshot_download, "org/model", allow_patterns="*.json")
attempt("file", hf.hf_hub_download, "org/model", "config.json")
attempt("again", hf.hf_hub_download, "org/model", "config.json", force_download=True)
attempt("local", hf.hf_hub_download, "org/model", "config.json", local_files_only=True)
attempt("no file", hf.hf_hub_download, "org/model", "none.json")
attempt("no revision", hf.snapshot_download, "org/model", revision="none")
attempt("no repository", hf.snapshot_download, "org/none")
attempt("not local", hf.snapshot_download, "org/none", local_files_only=True)
attempt("offline reader", __import__("huggingface_hub").try_to_load_from_cache, "org/model", "config.json",
        cache_dir=found["snapshot"].split("/models--")[0])
print(json.dumps(found))
"""
    found = python(script)
    snapshot = Path(found["snapshot"])
    assert snapshot.parent == tmp_path / "cache/hub/models--org--model/snapshots"
    assert found["part"] == str(snapshot)
    assert (snapshot / "config.json").read_bytes() == (hub / "config.json").read_bytes()
    for name in ("file", "again", "local", "offline reader"):
        assert found[name] == str(snapshot / "config.json")
    for name, kind in {
        "no file": "EntryNotFoundError",
        "no revision": "RevisionNotFoundError",
        "no repository": "RepositoryNotFoundError",
        "not local": "LocalEntryNotFoundError",
    }.items():
        assert kind in found[name], (name, found[name])


def test_a_patched_program_downloads_through_the_cache(hub: Path, tmp_path: Path) -> None:
    script = COLLECT + """
import os
import huggingface_hub.constants
before = huggingface_hub.constants.HF_HUB_CACHE
from modelcache import hf
hf.patch()
hf.patch()
from huggingface_hub import hf_hub_download as imported_after
from huggingface_hub import HfApi, snapshot_download
attempt("snapshot", snapshot_download, "org/model")
attempt("file", imported_after, "org/model", "config.json", cache_dir=before)
attempt("method", HfApi().hf_hub_download, "org/model", "config.json")
attempt("cached", huggingface_hub.try_to_load_from_cache, "org/model", "config.json")
attempt("missing", imported_after, "org/model", "none.json")
attempt("elsewhere", snapshot_download, "org/model", cache_dir=os.environ["HOME"] + "/elsewhere")
print(json.dumps(found))
"""
    found = python(script)
    snapshot = Path(found["snapshot"])
    assert snapshot.parent == tmp_path / "cache/hub/models--org--model/snapshots"
    for name in ("file", "method", "cached"):
        assert found[name] == str(snapshot / "config.json"), name
    assert "EntryNotFoundError" in found["missing"]
    assert "elsewhere" in found["elsewhere"]


def test_a_patched_child_process_is_patched_itself(hub: Path, tmp_path: Path) -> None:
    script = COLLECT + """
import os, subprocess, sys
if "CHILD" not in os.environ:
    import huggingface_hub
    from modelcache import hf
    hf.patch()
    print(subprocess.run([sys.executable, "-c", os.environ["SCRIPT"]], env=os.environ | {"CHILD": "1"},
                         check=True, capture_output=True, text=True).stdout)
    sys.exit()
from modelcache import hf
hf.patch()
from huggingface_hub import hf_hub_download
found["patched"] = hf_hub_download.__closure__ is not None
attempt("file", hf_hub_download, "org/model", "config.json")
print(json.dumps(found))
"""
    found = python(script, SCRIPT=script)
    assert found["patched"] is True
    assert Path(found["file"]).stat().st_nlink > 1, "a link into the cache"


def test_a_refused_credential_is_not_an_absent_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelcache import UnauthorizedError

    refused = UnauthorizedError("the bucket refuses the credentials")
    assert hf._translated(refused, True, False) is None
    gated = hf._translated(UnauthorizedError("org/model is gated"), True, False)
    assert type(gated).__name__ == "GatedRepoError"


def test_without_huggingface_hub_the_errors_are_those_of_the_cache(hub: Path) -> None:
    script = COLLECT + """
import sys
sys.modules["huggingface_hub"] = None
from modelcache import hf
attempt("file", hf.hf_hub_download, "org/model", "none.json")
attempt("patch", hf.patch)
print(json.dumps(found))
"""
    found = python(script)
    assert found["file"][:2] == ["NotFoundError", "ModelCacheError"]
    assert "ModuleNotFoundError" in found["patch"]

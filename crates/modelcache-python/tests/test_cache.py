"""The cache in one process, with real files and a real S3 server."""

from __future__ import annotations

import asyncio
import gc
import inspect
import io
import json
import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import modelcache
import pytest
from conftest import noise, write_model
from modelcache import ConflictError, InvalidError, ModelCache, NotFoundError, Progress

MODEL_BYTES = 3 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", MODEL_BYTES)


def in_another_process(code: str, **env: str) -> str:
    """Run code in a new interpreter and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_machine_downloads_an_artifact_of_another(s3: str, model: Path, tmp_path: Path, open_cache: Any) -> None:
    put = open_cache().put("team/detector", "3", model)
    assert (put.files, put.uploaded_bytes, put.on_remote) == (3, put.size, True)
    other = open_cache(cache_dir=tmp_path / "other")
    path = other.get("team/detector", "3")
    assert isinstance(path, Path)
    assert (path / "weights.bin").read_bytes() == noise(MODEL_BYTES)
    assert (path / "tokenizer" / "vocab.txt").read_text() == "a\nb\n"
    assert other.get("team/detector@3") == path
    counters = other.metrics.to_dict()
    assert counters["hits"] == {"disk": 1, "remote": 1, "origin": 0}
    assert (counters["misses"], counters["hit_rate"]) == (1, 0.5)
    assert counters["bytes"]["remote"] >= put.size


def test_settings_come_from_arguments_before_the_environment(
    s3: str, tmp_path: Path, open_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_cache().cache_dir == tmp_path / "cache"
    cache = open_cache(cache_dir=tmp_path / "argument", s3_bucket="models", max_bytes=10**9, ref_ttl=5)
    assert (cache.cache_dir, cache.remote) == (tmp_path / "argument", "s3://models")
    assert cache.stats().budget_bytes == 10**9
    assert open_cache(remote="none").remote is None
    with pytest.raises(InvalidError, match="max_bytes = \"lots\" from max_bytes: not a size"):
        ModelCache(max_bytes="lots")
    monkeypatch.setenv("MODEL_CACHE_MAX_BYTES", "plenty")
    with pytest.raises(ValueError, match="from MODEL_CACHE_MAX_BYTES"):
        ModelCache()


@pytest.mark.parametrize("value", [range(3), len, object(), {"a": 1}])
def test_a_setting_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="argument 'cache_dir' must be str, PathLike or None, not"):
        ModelCache(cache_dir=value)


def test_artifacts_stay_leased_until_the_cache_closes(s3: str, model: Path, tmp_path: Path, open_cache: Any) -> None:
    cache, other = open_cache(), open_cache()
    cache.put("m", "1", model)
    path = cache.get("m", "1")
    with pytest.raises(ConflictError, match="in use"):
        other.evict("m", "1", tier="disk")
    assert path.exists()
    with pytest.raises(InvalidError, match="not a valid number of seconds"):
        cache.close(timeout=-1)
    with pytest.raises(ConflictError, match="in use"):
        other.evict("m", "1", tier="disk")
    cache.close()
    cache.close()
    assert cache.closed
    assert other.evict("m", "1", tier="disk").disk_bytes is not None
    assert not path.exists()
    with pytest.raises(InvalidError, match="closed"):
        cache.get("m", "1")


def test_a_path_stays_leased_without_a_reference_to_the_cache(model: Path, open_cache: Any) -> None:
    path = _get_and_drop_cache(model)
    gc.collect()
    with pytest.raises(ConflictError):
        open_cache().evict("m", "1")
    assert path.exists()


def _get_and_drop_cache(model: Path) -> Path:
    """Get a path from a cache that is not referenced after the return."""
    cache = ModelCache()
    cache.put("m", "1", model)
    return cache.get("m", "1")


def test_a_lease_ends_with_its_block(model: Path, open_cache: Any) -> None:
    cache, other = open_cache(), open_cache()
    cache.put("m", "1", model)
    lease = cache.lease("m", "1")
    with lease as path:
        assert (path / "config.json").exists()
        with pytest.raises(ConflictError):
            other.evict("m", "1")
    assert (lease.name, lease.version, lease.report["from"]) == ("m", "1", "disk")
    assert other.evict("m", "1").disk_bytes is not None


def test_evict_releases_the_leases_of_its_own_cache(s3: str, model: Path, open_cache: Any) -> None:
    cache = open_cache()
    cache.put("m", "1", model, tag="prod")
    path = cache.get("m", "1")
    dry_run = cache.evict("m", "1", dry_run=True)
    assert dry_run.tags == ["prod"]
    assert path.exists()
    report = cache.evict("m", "1")
    assert report.remote_bytes
    assert report.remote == s3
    assert report.disk_bytes
    assert not path.exists()
    with pytest.raises(NotFoundError):
        cache.evict("m", "1")
    with pytest.raises(NotFoundError):
        cache.get("m", "1")


def test_get_has_the_arguments_of_snapshot_download() -> None:
    names = set(inspect.signature(ModelCache.get).parameters)
    assert {"revision", "allow_patterns", "ignore_patterns", "local_dir", "token", "local_files_only"} <= names


def test_a_selection_of_a_hub_repository_is_extended_later(hub: Path, tmp_path: Path, open_cache: Any) -> None:
    cache = open_cache()
    path = cache.get("hf://org/model", revision="main", allow_patterns=["*.json", "*.txt"], ignore_patterns="conf*")
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    assert files == ["tokenizer/vocab.txt"]
    whole = cache.get("hf://org/model")
    assert (whole / "weights.bin").read_bytes() == (hub / "weights.bin").read_bytes()
    commit = cache.resolve("hf://org/model").version
    assert len(commit) == 40
    assert cache.get("hf://org/model", revision=commit, local_files_only=True) == whole
    copy = cache.get("hf://org/model", local_dir=tmp_path / "mine", token=False)
    assert copy == tmp_path / "mine"
    assert (copy / "config.json").read_text() == (hub / "config.json").read_text()
    with pytest.raises(NotFoundError, match="local files only"):
        cache.get("hf://org/other", local_files_only=True)


def test_downloads_from_the_hub_are_backfilled_to_s3_in_the_background(
    s3: str, hub: Path, tmp_path: Path, open_cache: Any
) -> None:
    first = open_cache()
    path = first.get("hf://org/model")
    commit = first.resolve("hf://org/model").version
    first.close()
    assert first.closed
    other = open_cache(cache_dir=tmp_path / "other", offline=True)
    same = other.get("hf://org/model", revision=commit)
    assert (same / "weights.bin").read_bytes() == (path / "weights.bin").read_bytes()
    assert other.metrics.to_dict()["hits"]["remote"] == 1


def test_a_bare_name_takes_its_version_as_a_revision_too(model: Path, open_cache: Any) -> None:
    cache = open_cache()
    cache.put("m", "1", model)
    assert cache.get("m", revision="1") == cache.get("m", "1")
    with pytest.raises(InvalidError):
        cache.get("m@1", "2")
    with pytest.raises(InvalidError):
        cache.get("m", "1", revision="2")
    with pytest.raises(InvalidError, match="version"):
        cache.get("m")


def test_tags_move_and_references_resolve(s3: str, model: Path, open_cache: Any) -> None:
    cache = open_cache(ref_ttl=0)
    cache.put("m", "1", model)
    (model / "config.json").write_text("{}")
    cache.put("m", "2", model)
    assert cache.tag("m", "1", "prod").before is None
    first = cache.resolve("m", "prod")
    assert (first.version, first.revision, first.pinned) == ("1", "prod", "m@1")
    assert cache.tag("m", "2", "prod").before == "1"
    assert (cache.get("m", "prod") / "config.json").read_text() == "{}"
    assert cache.untag("m", "prod").after is None
    listed = {row.version: row for row in cache.list_artifacts(remote=True)}
    assert sorted(listed) == ["1", "2"]


def test_a_pin_prevents_eviction_and_gives_its_reason(model: Path, open_cache: Any) -> None:
    cache = open_cache()
    cache.put("m", "1", model)
    pin = cache.pin("m", "1", seconds=3600, reason="the demo")
    assert pin.reason == "the demo"
    assert pin.until is not None
    assert pin.since is not None
    assert pin.until - pin.since == 3600
    with pytest.raises(ConflictError, match="the demo"):
        cache.evict("m", "1")
    [row] = cache.list_artifacts()
    assert row.pin == pin
    cache.unpin("m", "1")
    cache.evict("m", "1")


def test_verify_finds_and_repairs_bit_rot(s3: str, model: Path, open_cache: Any) -> None:
    cache = open_cache()
    cache.put("m", "1", model)
    assert [each.ok for each in cache.verify("m@1", tier="all")] == [True, True]
    path = cache.get("m", "1") / "weights.bin"
    before = path.stat()
    # Corrupt the file, but keep its size and times, so that only reading it reveals the damage.
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"\xff" * 8)
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    [found] = [each for each in cache.verify(repair=True) if each.reference == "m@1"]
    assert found.ok
    assert [finding.repaired_from for finding in found.findings] == ["remote"]
    assert (cache.get("m", "1", verify=True) / "weights.bin").read_bytes() == noise(MODEL_BYTES)


def test_prewarm_refuses_a_list_that_does_not_fit_and_reports_each_failure(
    s3: str, model: Path, tmp_path: Path, open_cache: Any
) -> None:
    writer = open_cache()
    for version in ("1", "2"):
        (model / "config.json").write_text(version)
        writer.put("m", version, model)
    cache = open_cache(cache_dir=tmp_path / "other")
    reports: list[Progress] = []
    paths = cache.prewarm([("m", "1"), "m@2"], progress=reports.append)
    assert [(path / "config.json").read_text() for path in paths] == ["1", "2"]
    assert reports
    with pytest.raises(ConflictError):
        open_cache(cache_dir=tmp_path / "other").evict("m", "2", tier="disk")
    with pytest.raises(NotFoundError) as failed:
        cache.prewarm(["m@1", "absent@1", "m@2", "absent@2"])
    assert list(failed.value.failures or {}) == ["absent@1", "absent@2"]
    small = open_cache(cache_dir=tmp_path / "small", max_bytes=MODEL_BYTES)
    with pytest.raises(modelcache.FullError):
        small.prewarm(["m@1", "m@2"])
    assert small.list_artifacts() == []


def test_progress_is_reported_to_functions_and_bars(
    s3: str, model: Path, tmp_path: Path, open_cache: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    open_cache().put("m", "1", model)
    reports: list[Progress] = []
    open_cache(cache_dir=tmp_path / "b").get("m", "1", progress=reports.append)
    assert reports[-1].remote_bytes >= MODEL_BYTES
    from tqdm import tqdm

    open_cache(cache_dir=tmp_path / "c").get("m", "1", progress=tqdm)
    assert "m@1" in capfd.readouterr().err


def test_json_prometheus_and_its_client_report_equal_counters(s3: str, model: Path, open_cache: Any) -> None:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    cache = open_cache()
    cache.put("m", "1", model)
    cache.get("m", "1")
    with pytest.raises(NotFoundError):
        cache.get("absent", "1")
    registry = CollectorRegistry()
    registry.register(cache.metrics)

    def samples(text: str) -> dict[tuple[str, str], float]:
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name, json.dumps(sample.labels, sort_keys=True)] = sample.value
        return found

    own = samples(cache.metrics.text())
    assert own["modelcache_gets_total", '{"from": "disk"}'] == 1
    assert own["modelcache_failures_total", '{"code": "not_found"}'] == 1
    assert own["modelcache_directory_artifacts", "{}"] == 1
    # Phases are those of calls that succeeded.
    assert own["modelcache_phase_seconds_count", '{"phase": "acquire"}'] == 1
    assert own["modelcache_stalls_total", '{"kind": "hedged", "tier": "remote"}'] == 0
    from_client = samples(generate_latest(registry).decode())
    # The free space changes between the two reads, and the fill of the failed get may end between them.
    changing = ("modelcache_directory_filesystem_free_bytes", "modelcache_fills_in_flight")
    assert {key: value for key, value in from_client.items() if key[0] not in changing} == {
        key: value for key, value in own.items() if key[0] not in changing
    }
    counters = cache.metrics.to_dict()
    assert counters["failures"] == {"not_found": 1}
    assert counters["uploaded_bytes"] == own["modelcache_uploaded_bytes_total", "{}"]
    assert counters["phase_seconds"]["acquire"] == own["modelcache_phase_seconds_sum", '{"phase": "acquire"}']
    assert counters["phase_buckets"]["acquire"][-1] == ["+Inf", 1]


def test_evictions_make_room_and_are_counted(s3: str, model: Path, tmp_path: Path, open_cache: Any) -> None:
    cache = open_cache(cache_dir=tmp_path / "small", max_bytes=int(MODEL_BYTES * 1.5))
    for version in ("1", "2"):
        (model / "weights.bin").write_bytes(noise(MODEL_BYTES, seed=int(version)))
        cache.put("m", version, model)
    counters = cache.metrics.to_dict()
    assert counters["evictions"]["count"] == 1
    assert counters["evictions"]["bytes"] >= MODEL_BYTES
    assert [row.version for row in cache.list_artifacts()] == ["2"]


def test_stats_are_plain_values(model: Path, open_cache: Any) -> None:
    cache = open_cache(max_bytes="1GB")
    cache.put("m", "1", model)
    stats = cache.stats()
    assert (stats.artifacts, stats.files, stats.budget_bytes) == (1, 3, 10**9)
    assert stats.used_bytes >= MODEL_BYTES
    assert stats.dir == cache.cache_dir
    assert json.loads(json.dumps(stats.to_dict()))["dir"] == str(cache.cache_dir)


def test_a_cache_can_be_pickled_for_another_process(model: Path, open_cache: Any, tmp_path: Path) -> None:
    cache = open_cache(cache_dir=tmp_path / "argument", max_bytes="1GB")
    cache.put("m", "1", model)
    reopened = pickle.loads(pickle.dumps(cache))
    try:
        assert reopened.get("m", "1") == cache.get("m", "1")
    finally:
        reopened.close()


def test_a_read_only_directory_can_be_read(model: Path, open_cache: Any, tmp_path: Path) -> None:
    cache = open_cache()
    cache.put("m", "1", model)
    cache.close()
    code = (
        "import os\n"
        "from modelcache import ModelCache, DirectoryError\n"
        "os.setuid(65534) if os.getuid() == 0 else None\n"
        "cache = ModelCache()\n"
        "path = cache.get('m', '1') / 'config.json'\n"
        "print(path.read_text())\n"
        "try:\n    cache.put('n', '1', path)\n"
        "except DirectoryError as error:\n    print(bool(error.hint))\n"
    )
    # The process becomes another user, which must have access to the folder.
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    for folder, _, _ in os.walk(cache.cache_dir):
        os.chmod(folder, 0o555)
    out = in_another_process(code)
    assert out.splitlines() == ['{"hidden_size": 384}', "True"]


def test_without_a_home_a_warning_is_logged() -> None:
    code = (
        "import os, logging\n"
        "for name in ('HOME', 'MODEL_CACHE_DIR', 'XDG_CACHE_HOME'): os.environ.pop(name, None)\n"
        "from modelcache import ModelCache\n"
        "print(ModelCache().cache_dir)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_absolute()
    assert "HOME is not set" in done.stderr


def test_warm_gets_leak_neither_descriptors_nor_memory(model: Path, open_cache: Any) -> None:
    cache = open_cache()
    cache.put("m", "1", model)

    def memory_kib() -> int:
        gc.collect()
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def rounds(count: int) -> tuple[int, int]:
        for _ in range(count):
            cache.get("m", "1")
        return len(os.listdir("/proc/self/fd")), memory_kib()

    # Allocators and caches fill up in the first rounds.
    files, before = rounds(2_000)
    files_after, after = rounds(10_000)
    assert files_after == files
    assert after - before < 2_000, "KiB"


def test_a_cache_contains_the_artifacts_on_its_disk(s3: str, model: Path, tmp_path: Path, open_cache: Any) -> None:
    cache = open_cache()
    assert "m@1" not in cache
    cache.put("m", "1", model, tag="prod")
    assert cache.contains("m", "1")
    assert ("m", "1") in cache
    assert asyncio.run(cache.acontains("m@1"))
    assert not cache.contains("m", "2")
    other = open_cache(cache_dir=tmp_path / "other")
    assert not other.contains("m", "1"), "on the remote only"
    other.get("m", "1", allow_patterns="*.json")
    assert not other.contains("m", "1"), "not all files"
    other.get("m", "1")
    assert "m@1" in other
    assert "hf://org/unknown" not in cache
    with pytest.raises(InvalidError):
        cache.contains("m")
    before = cache.metrics.to_dict()
    assert (sum(before["hits"].values()), before["failures"]) == (0, {})


def test_bytes_and_open_files_can_be_put(s3: str, tmp_path: Path, open_cache: Any) -> None:
    cache = open_cache()
    content = noise(100_000)
    assert cache.put("team/detector", "1", content).size == len(content)
    assert cache.get("team/detector", "1").read_bytes() == content
    assert cache.get("team/detector", "1").name == "detector"
    cache.put("m", "2", io.BytesIO(content), filename="weights.bin")
    assert cache.get("m", "2").name == "weights.bin"
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb") as file:
        put = asyncio.run(cache.aput("m", "3", file, filename="model.onnx"))
    assert (put.size, cache.get("m", "3").name) == (len(content), "model.onnx")
    with pytest.raises(InvalidError, match="filename"):
        cache.put("m", "4", content, filename="../m")
    with pytest.raises(InvalidError, match="filename"):
        cache.put("m", "4", tmp_path / "file", filename="other")
    with pytest.raises(TypeError, match="'path' must be str, PathLike, bytes or SupportsRead, not int"):
        cache.put("m", "4", 5)
    left = tmp_path / "left"
    left.mkdir()
    code = "from modelcache import ModelCache, ModelCacheError\ntry:\n    ModelCache().put('n', '1', b'x', tier='x')\n"
    code += "except ModelCacheError:\n    ModelCache().put('n', '1', b'x')\n"
    in_another_process(code, TMPDIR=str(left))
    assert list(left.iterdir()) == []


def test_inspect_prune_and_doctor_return_the_objects_of_the_command_line(
    s3: str, model: Path, open_cache: Any
) -> None:
    cache = open_cache()
    cache.put("m", "1", model)
    inspected = cache.inspect("m", "1")
    assert inspected == asyncio.run(cache.ainspect("m@1"))
    assert (inspected["reference"], inspected["known_on_remote"]) == ("m@1", True)
    assert [file["path"] for file in inspected["files"]] == ["config.json", "tokenizer/vocab.txt", "weights.bin"]
    with pytest.raises(NotFoundError):
        cache.inspect("m", "2")

    dry_run = cache.prune(older_than=timedelta(0), dry_run=True)
    assert [row["reference"] for row in dry_run["evicted"]] == ["m@1"]
    assert cache.prune(older_than="30d")["evicted"] == []
    assert cache.contains("m@1")
    pruned = asyncio.run(cache.aprune(to=0))
    assert (pruned["reached"], pruned["freed_bytes"] >= MODEL_BYTES) == (True, True)
    assert not cache.contains("m@1")
    for arguments in ({"older_than": "7"}, {"to": "lots"}):
        with pytest.raises(InvalidError, match=next(iter(arguments))):
            cache.prune(**arguments)
    with pytest.raises(TypeError, match="'older_than' must be timedelta, str or None, not int"):
        cache.prune(older_than=7)

    report = cache.doctor(read_only=True)
    assert report["problems"] == sum(check["severity"] == "problem" for check in report["checks"]) == 0
    assert any("can be written" in check["message"] for check in report["checks"])
    assert set(report) == {"checks", "problems", "warnings"} == set(asyncio.run(cache.adoctor()))
    done = subprocess.run(
        [sys.executable, "-m", "modelcache", "doctor", "--json"], capture_output=True, text=True, timeout=60
    )
    assert set(json.loads(done.stdout)) == {*report, "exit"}


def test_metrics_show_their_counters(model: Path, open_cache: Any) -> None:
    cache = open_cache()
    cache.put("m", "1", model)
    cache.get("m", "1")
    assert repr(cache.metrics) == "<Metrics: 1 gets (1 from disk, 0 from remote, 0 from origin), 0 failed>"
    cache.close()
    assert repr(cache.metrics) == "<Metrics of a closed cache>"

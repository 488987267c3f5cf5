"""Tests the Grafana dashboard and the rules for Prometheus.

Every expression is compared with docs/metrics.md. A real Prometheus scrapes a real daemon that works, fails and
recovers, and every query of the dashboard has to return data. Debian's package prometheus has Prometheus and promtool:
MODELCACHE_TEST_PROMETHEUS and MODELCACHE_TEST_PROMTOOL are their paths, if they are not on the PATH.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
from monitoring_expressions import (
    DASHBOARD,
    ROOT,
    RULES,
    Query,
    dashboard_queries,
    documented_metrics,
    excluded_values,
    operands,
    panels,
    problems,
    rule_queries,
    rules,
)
from monitoring_servers import Daemon, Prometheus, StandIn, optional_program, wait_until

MB = 1_000_000
# The budget has room for two artifacts beside the one that is leased.
BUDGET = 9 * MB
SIZES = {"leased": MB, "first": 3 * MB, "second": 3 * MB, "third": 3 * MB}
TOO_LARGE = BUDGET + MB


def names(queries: list[Query]) -> list[str]:
    """Returns the names of parametrized tests."""
    return [query.place for query in queries]


# Files


def test_the_dashboard_is_what_its_script_prints() -> None:
    script = DASHBOARD.with_name("dashboard.py")
    printed = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert DASHBOARD.read_text() == printed, "run: python3 dashboard.py > modelcache.json, in deploy/grafana"


def test_each_panel_has_a_description_a_unit_thresholds_and_a_place_of_its_own() -> None:
    cells: dict[tuple[int, int], str] = {}
    for panel in panels():
        title, defaults = panel["title"], panel["fieldConfig"]["defaults"]
        assert panel["description"].endswith("."), title
        assert defaults["unit"], title
        assert defaults["thresholds"]["steps"], title
        assert {query["datasource"]["uid"] for query in panel["targets"]} == {"${datasource}"}, title
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24, f"{title} is too wide"
                assert (x, y) not in cells, f"{title} and {cells[x, y]} overlap"
                cells[x, y] = title
    ids = [panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("query", dashboard_queries() + rule_queries(), ids=lambda query: query.place)
def test_expressions_use_documented_metrics_and_labels(query: Query) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert problems(query, documented_metrics(), recorded) == []


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("rate(modelcache_hits_total[5m])", "there is no metric modelcache_hits_total"),
        ("rate(modelcache_phase_seconds[5m])", "there is no metric modelcache_phase_seconds"),
        ('rate(modelcache_gets_total{tier="disk"}[5m])', "modelcache_gets_total has no label tier"),
        ("sum by (tier) (rate(modelcache_gets_total[5m]))", "modelcache_gets_total has no label tier to group by"),
        ("modelcache_puts_total > 0", "modelcache_puts_total is a counter, and is not used in rate or increase"),
        (
            "rate(modelcache_directory_used_bytes[5m])",
            "modelcache_directory_used_bytes is a gauge, and is used in rate or increase",
        ),
    ],
)
def test_wrong_expressions_are_found(expression: str, problem: str) -> None:
    assert problems(Query("here", expression), documented_metrics(), set()) == [f"here: {problem}"]


@pytest.mark.parametrize("rule", [rule for rule in rules() if "alert" in rule], ids=lambda rule: rule["alert"])
def test_each_alert_has_a_severity_texts_and_a_runbook_that_exists(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert anchor in anchors, f"{page} has no heading for {anchor}"


def test_each_alert_has_unit_tests_in_which_it_fires_and_in_which_it_does_not() -> None:
    text = RULES.with_name("rules_test.yaml").read_text()
    for rule in (rule for rule in rules() if "alert" in rule):
        name = rule["alert"]
        assert re.search(rf"alertname: {name}\n\s+eval_time: \w+\n\s+exp_alerts:", text), f"{name} never fires"
        assert re.search(rf"alertname: {name}, eval_time: \w+, exp_alerts: \[\]", text), f"{name} fires always"


@pytest.mark.parametrize("check", [("check", "rules", "rules.yaml"), ("test", "rules", "rules_test.yaml")])
def test_promtool_accepts_the_rules_and_their_unit_tests(check: tuple[str, ...]) -> None:
    promtool = optional_program("MODELCACHE_TEST_PROMTOOL", "promtool")
    run = subprocess.run([promtool, *check], cwd=RULES.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


# A real daemon and a real Prometheus


@dataclass
class Live:
    """A daemon that has seen all kinds of events, and the Prometheus that scrapes it."""

    daemon: Daemon
    prometheus: Prometheus


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Starts all servers, and lets the daemon hit, miss, join, evict, repair, fail and lose its origin."""
    prometheus_program = optional_program("MODELCACHE_TEST_PROMETHEUS", "prometheus")
    folder = tmp_path_factory.mktemp("live")
    for name, size in (SIZES | {"too-large": TOO_LARGE}).items():
        repository = folder / "hub/team" / name
        repository.mkdir(parents=True)
        (repository / "model.bin").write_bytes(random.Random(name).randbytes(size))
    (folder / "s3").mkdir()
    started: list[StandIn | Daemon | Prometheus] = []
    try:
        # Slow enough for a second caller to join a fill.
        hub = StandIn("hub", "--folder", str(folder / "hub"), "--rate", "3000000")
        started.append(hub)
        s3 = StandIn("s3", "--folder", str(folder / "s3"), "--bucket", "models")
        started.append(s3)
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        settings = {
            "HOME": str(folder),
            "MODEL_CACHE_DIR": str(folder / "cache"),
            "MODEL_CACHE_MAX_BYTES": str(BUDGET),
            "MODEL_CACHE_MIN_FREE_BYTES": "0",
            "MODEL_CACHE_REMOTE": "s3://models",
            "MODEL_CACHE_RETRY_DEADLINE": "2s",
        }
        daemon = Daemon(kept | hub.env | s3.env | settings, "hf://team/leased")
        started.append(daemon)
        prometheus = Prometheus(prometheus_program, folder, daemon)
        started.append(prometheus)
        live_through_everything(daemon, hub, folder / "cache")
        # Each counter has been scraped at least twice since it changed.
        time.sleep(3)
        yield Live(daemon, prometheus)
    finally:
        for server in reversed(started):
            server.stop()


def get(daemon: Daemon, name: str) -> int:
    """Gets an artifact of the stand-in for the Hub. Returns the status."""
    return daemon.request("/cache/artifacts", {"ref": f"hf://team/{name}"})[0]


def live_through_everything(daemon: Daemon, hub: StandIn, cache: Path) -> None:
    """Lets the daemon see each kind of event that the dashboard shows."""
    wait_until("the prewarm list is on disk", lambda: daemon.request("/readyz")[0] == 200)
    # Misses: one caller fills, the other one joins.
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda _: get(daemon, "first"), range(2))) == [200, 200]
    assert daemon.value("modelcache_waits_total") == 1
    # A hit over the route of the Hub.
    assert daemon.request("/team/first/resolve/main/model.bin")[0] == 200
    # The third artifact evicts the first one, which then comes from the remote.
    assert [get(daemon, name) for name in ("second", "third")] == [200, 200]
    assert daemon.value("modelcache_evictions_total") >= 1
    uploaded = sum(SIZES.values())
    wait_until("all is uploaded", lambda: daemon.value("modelcache_uploaded_bytes_total") >= uploaded)
    assert get(daemon, "first") == 200
    assert daemon.value('modelcache_gets_total{from="remote"}') == 1
    # A file that another program changed is replaced.
    blobs = [path for path in (cache / "blobs").rglob("*") if path.is_file()]
    newest = max(blobs, key=lambda path: path.stat().st_mtime_ns)
    newest.chmod(0o644)
    with newest.open("r+b") as file:
        file.write(b"changed")
    assert get(daemon, "first") == 200
    assert daemon.value('modelcache_corrupt_files_total{tier="disk"}') == 1
    # Prometheus sees an increase only after it has scraped the first request of the route.
    time.sleep(2)
    assert daemon.request("/team/first/resolve/main/model.bin")[0] == 200
    # An error of the caller, and an artifact that has no room.
    assert get(daemon, "absent") in (401, 404)
    assert get(daemon, "too-large") == 507
    # The origin goes down.
    hub.stop()
    assert get(daemon, "lost") == 503
    assert daemon.value('modelcache_tier_up{tier="origin"}') == 0


@pytest.mark.parametrize("query", dashboard_queries(), ids=lambda query: query.place)
def test_each_query_of_the_dashboard_returns_data(live: Live, query: Query) -> None:
    samples = live.prometheus.query(query.expression)
    assert samples, query.expression
    values = [float(sample["value"][1]) for sample in samples]
    assert any(math.isfinite(value) for value in values), f"{query.expression}: {values}"
    for label in re.findall(r"\{\{(\w+)\}\}", query.legend):
        assert all(label in sample["metric"] for sample in samples), f"no label {label}: {query.expression}"


def test_each_documented_metric_is_exported_and_each_exported_one_documented(live: Live) -> None:
    exported = dict(re.findall(r"^# TYPE (\w+) (\w+)$", live.daemon.metrics(), re.MULTILINE))
    assert exported == {metric.name: metric.kind for metric in documented_metrics().values()}


def test_excluded_label_values_exist(live: Live) -> None:
    # The documentation of the metric lists all phases, and the daemon exports the other labels.
    known = {
        ("phase", name) for name in re.findall("`(\\w+)`", documented_metrics()["modelcache_phase_seconds"].meaning)
    }
    known |= set(re.findall(r'(\w+)="([^"]*)"', live.daemon.metrics()))
    for query in dashboard_queries() + rule_queries():
        assert set(excluded_values(query)) <= known, query.place


def test_prometheus_evaluates_all_rules(live: Live) -> None:
    groups = live.prometheus.get("rules")["groups"]
    evaluated = [rule for group in groups for rule in group["rules"]]
    assert len(evaluated) == len(list(rules()))
    assert [(rule["name"], rule.get("lastError")) for rule in evaluated if rule["health"] != "ok"] == []
    for rule in rules():
        if "record" in rule:
            assert live.prometheus.query(rule["record"]), rule["record"]


@pytest.mark.parametrize("rule", [rule for rule in rules() if "alert" in rule], ids=lambda rule: rule["alert"])
def test_each_side_of_each_condition_returns_data(live: Live, rule: dict[str, Any]) -> None:
    for operand in operands(promql.parse(rule["expr"])):
        assert live.prometheus.query(operand.prettify()), operand.prettify()


def test_alerts_fire_for_what_happened_and_for_nothing_else(live: Live) -> None:
    alerts = live.prometheus.get("alerts")["alerts"]
    firing = {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}
    pending = {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "pending"}
    assert firing == {"ModelcacheCorruptFiles", "ModelcacheNoRoom"}
    assert pending <= {"ModelcacheTierDown", "ModelcacheGetsFailing"}

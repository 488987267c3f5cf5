"""Prints the Grafana dashboard of modelcache: `python3 dashboard.py > modelcache.json`.

The dashboard is written here, because a panel is a few lines here and a hundred in JSON. In queries, FLEET selects all
processes of the chosen jobs, and NODE those of the chosen instances.
"""

from __future__ import annotations

import json

SELECTORS = {"FLEET": 'job=~"$job"', "NODE": 'job=~"$job", instance=~"$instance"'}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
# The phases for which a caller of `get` waits: all but the upload to the remote, and the reading by `put`.
WAITED_FOR = 'phase!~"backfill|read"'
# Failures that are the caller's: a wrong name, an invalid reference, a version that is already published.
CALLER_ERRORS = "not_found|invalid|conflict"

Panel = dict[str, object]


def query(expression: str, legend: str = "", *, instant: bool = False) -> dict[str, object]:
    """Returns a query of a panel. The legend may contain labels: `{{instance}}`."""
    for name, selector in SELECTORS.items():
        expression = expression.replace(name, selector)
    return {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": expression,
        "instant": instant,
        "range": not instant,
        "legendFormat": legend,
    }


def thresholds(*steps: tuple[float, str]) -> dict[str, object]:
    """Returns colours from the values on at which they begin. Below the first value it is green."""
    first: list[dict[str, object]] = [{"color": "green", "value": None}]
    return {"mode": "absolute", "steps": first + [{"color": color, "value": value} for value, color in steps]}


def low_is_bad(bad: float, good: float) -> dict[str, object]:
    """Returns colours for values of which few are bad."""
    steps = [(None, "red"), (bad, "yellow"), (good, "green")]
    return {"mode": "absolute", "steps": [{"color": color, "value": value} for value, color in steps]}


def panel(
    kind: str,
    title: str,
    description: str,
    queries: list[dict[str, object]],
    *,
    unit: str,
    width: int,
    height: int,
    colours: dict[str, object] | None = None,
    maximum: float | None = None,
) -> Panel:
    """Returns what panels of all kinds have in common."""
    defaults: dict[str, object] = {"unit": unit, "min": 0, "thresholds": colours or thresholds()}
    if maximum is not None:
        defaults["max"] = maximum
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "targets": [one | {"refId": chr(ord("A") + number)} for number, one in enumerate(queries)],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "gridPos": {"w": width, "h": height},
    }


def stat(
    title: str, description: str, expression: str, *, unit: str, colours: dict[str, object] | None = None
) -> Panel:
    """Returns one number of the chosen time range."""
    one = panel(
        "stat", title, description, [query(expression, instant=True)], unit=unit, width=4, height=4, colours=colours
    )
    calculation = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    one["options"] = {"reduceOptions": calculation, "colorMode": "value", "graphMode": "none", "textMode": "auto"}
    return one


def graph(
    title: str,
    description: str,
    *queries: tuple[str, str],
    unit: str,
    width: int = 8,
    colours: dict[str, object] | None = None,
    maximum: float | None = None,
    stacked: bool = False,
) -> Panel:
    """Returns a graph over time of pairs of an expression and a legend. Thresholds are drawn as lines."""
    given = [query(expression, legend) for expression, legend in queries]
    one = panel(
        "timeseries",
        title,
        description,
        given,
        unit=unit,
        width=width,
        height=8,
        colours=colours,
        maximum=maximum,
    )
    one["fieldConfig"]["defaults"]["custom"] = {  # type: ignore[index]
        "drawStyle": "line",
        "fillOpacity": 40 if stacked else 10,
        "lineWidth": 1,
        "showPoints": "never",
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if colours else "off"},
    }
    one["options"] = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return one


def node_table() -> Panel:
    """Returns the table of all nodes. A click on a node chooses it for the rows below."""
    columns: list[tuple[str, str, str, dict[str, object] | None]] = [
        ("Up", "none", "max by (instance) (up{FLEET})", low_is_bad(1, 1)),
        ("Ready", "none", "max by (instance) (modelcache_ready{FLEET})", low_is_bad(1, 1)),
        (
            "Hit rate",
            "percentunit",
            'sum by (instance) (increase(modelcache_gets_total{FLEET, from="disk"}[$__range])) '
            '/ (sum by (instance) (increase(modelcache_gets_total{FLEET, from="disk"}[$__range])) '
            "+ sum by (instance) (increase(modelcache_misses_total{FLEET}[$__range])))",
            low_is_bad(0.5, 0.8),
        ),
        ("Artifacts", "none", "max by (instance) (modelcache_directory_artifacts{FLEET})", None),
        ("Used", "bytes", "max by (instance) (modelcache_directory_used_bytes{FLEET})", None),
        (
            "Used of budget",
            "percentunit",
            "max by (instance) (modelcache_directory_used_bytes{FLEET} / modelcache_directory_budget_bytes{FLEET})",
            thresholds((1, "red")),
        ),
        ("Free on disk", "bytes", "max by (instance) (modelcache_directory_filesystem_free_bytes{FLEET})", None),
        ("Fills", "none", "sum by (instance) (modelcache_fills_in_flight{FLEET})", None),
        (
            "Evicted",
            "bytes",
            "sum by (instance) (increase(modelcache_evicted_bytes_total{FLEET}[$__range]))",
            None,
        ),
        (
            "Corrupt files",
            "short",
            "sum by (instance) (increase(modelcache_corrupt_files_total{FLEET}[$__range]))",
            thresholds((0.5, "red")),
        ),
        (
            "Throttled",
            "short",
            "sum by (instance) (increase(modelcache_throttled_total{FLEET}[$__range]))",
            thresholds((0.5, "yellow")),
        ),
    ]
    queries = [query(expression, instant=True) | {"format": "table"} for _, _, expression, _ in columns]
    one = panel(
        "table",
        "Nodes",
        "One line for each process. A click on an instance chooses it for the rows below. Rates and sums are those of "
        "the chosen time range.",
        queries,
        unit="none",
        width=WIDTH,
        height=9,
    )
    overrides: list[dict[str, object]] = [
        {
            "matcher": {"id": "byName", "options": "instance"},
            "properties": [
                {"id": "displayName", "value": "Instance"},
                {
                    "id": "links",
                    "value": [
                        {
                            "title": "Show this node",
                            "url": "/d/${__dashboard.uid}?${datasource:queryparam}&${job:queryparam}"
                            "&var-instance=${__value.text}&${__url_time_range}",
                        }
                    ],
                },
            ],
        }
    ]
    for number, (name, unit, _, colours) in enumerate(columns):
        properties: list[dict[str, object]] = [
            {"id": "displayName", "value": name},
            {"id": "unit", "value": unit},
        ]
        if colours:
            properties.append({"id": "thresholds", "value": colours})
            properties.append({"id": "custom.cellOptions", "value": {"type": "color-text"}})
        field = f"Value #{chr(ord('A') + number)}"
        overrides.append({"matcher": {"id": "byName", "options": field}, "properties": properties})
    one["fieldConfig"]["overrides"] = overrides  # type: ignore[index]
    one["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": {"Time": True}}},
    ]
    one["options"] = {"showHeader": True, "cellHeight": "sm"}
    return one


def fleet() -> list[Panel]:
    """Returns the panels about all processes of the chosen jobs."""
    hits = 'sum(increase(modelcache_gets_total{FLEET, from="disk"}[$__range]))'
    misses = "sum(increase(modelcache_misses_total{FLEET}[$__range]))"
    avoided = "sum(increase(modelcache_origin_avoided_bytes_total{FLEET}[$__range]))"
    origin = 'sum(increase(modelcache_bytes_total{FLEET, tier="origin"}[$__range]))'
    failures = f'sum(increase(modelcache_failures_total{{FLEET, code!~"{CALLER_ERRORS}"}}[$__range]))'
    return [
        stat("Processes up", "Processes that Prometheus reaches.", "sum(up{FLEET})", unit="none"),
        stat(
            "Processes down",
            "Processes that are configured in Prometheus and do not answer.",
            "count(up{FLEET} == 0) or vector(0)",
            unit="none",
            colours=thresholds((1, "red")),
        ),
        stat(
            "Not ready",
            "Daemons whose prewarm list is not on disk.",
            "count(modelcache_ready{FLEET} == 0) or vector(0)",
            unit="none",
            colours=thresholds((1, "yellow")),
        ),
        stat(
            "Tiers down",
            "Tiers (remote, origin) that did not answer the last request, counted once for each process.",
            "count(modelcache_tier_up{FLEET} == 0) or vector(0)",
            unit="none",
            colours=thresholds((1, "red")),
        ),
        stat(
            "Failed gets",
            "Share of gets that failed. Errors of the caller, such as a name that does not exist, do not count.",
            f"{failures} / ({failures} + {hits} + {misses})",
            unit="percentunit",
            colours=thresholds((0.01, "yellow"), (0.05, "red")),
        ),
        stat(
            "Corrupt files",
            "Files that failed verification on any tier. They were not served.",
            "sum(increase(modelcache_corrupt_files_total{FLEET}[$__range]))",
            unit="short",
            colours=thresholds((0.5, "red")),
        ),
        stat(
            "Hit rate",
            "Share of gets that the local disk answered.",
            f"{hits} / ({hits} + {misses})",
            unit="percentunit",
            colours=low_is_bad(0.5, 0.8),
        ),
        stat(
            "Bytes avoided",
            "Bytes of gets that came from disk or the remote, so that no origin had to deliver them.",
            avoided,
            unit="bytes",
        ),
        stat(
            "Share avoided",
            "The same as a share of all bytes of gets.",
            f"{avoided} / ({avoided} + {origin})",
            unit="percentunit",
            colours=low_is_bad(0.5, 0.8),
        ),
        stat(
            "Evicted bytes",
            "Bytes of artifacts that were evicted to make room.",
            "sum(increase(modelcache_evicted_bytes_total{FLEET}[$__range]))",
            unit="bytes",
        ),
        stat(
            "Throttled requests",
            "Answers 429 and 503 of the remote and the origins.",
            "sum(increase(modelcache_throttled_total{FLEET}[$__range]))",
            unit="short",
            colours=thresholds((1, "yellow")),
        ),
        stat(
            "Pending uploads",
            "Artifacts that are on disk, and have still to be uploaded to the remote.",
            "sum(modelcache_directory_pending_backfills{FLEET})",
            unit="none",
        ),
        graph(
            "Gets by tier",
            "Successful gets, by the farthest tier that supplied bytes.",
            ("sum by (from) (rate(modelcache_gets_total{FLEET}[$__rate_interval]))", "{{from}}"),
            unit="reqps",
            stacked=True,
        ),
        graph(
            "Hit rate",
            "Share of gets that the local disk answered.",
            (
                'sum(rate(modelcache_gets_total{FLEET, from="disk"}[$__rate_interval])) '
                '/ (sum(rate(modelcache_gets_total{FLEET, from="disk"}[$__rate_interval])) '
                "+ sum(rate(modelcache_misses_total{FLEET}[$__rate_interval])))",
                "hit rate",
            ),
            unit="percentunit",
            maximum=1,
            colours=low_is_bad(0.5, 0.8),
        ),
        graph(
            "Bytes of gets by tier",
            "Bytes of successful gets, by the tier that supplied them. Bytes from disk were not downloaded.",
            ("sum by (tier) (rate(modelcache_bytes_total{FLEET}[$__rate_interval]))", "{{tier}}"),
            ("sum(rate(modelcache_origin_avoided_bytes_total{FLEET}[$__rate_interval]))", "no origin needed"),
            unit="Bps",
        ),
        node_table(),
    ]


def time_to_ready() -> list[Panel]:
    """Returns the panels about the time from a request to the files."""
    return [
        graph(
            "Time of a get by phase",
            "Mean time of a get, by phase: `join` waits for a fill of another caller, `download` receives and verifies "
            "bytes. Uploads to the remote do not count.",
            (
                f"sum by (phase) (rate(modelcache_phase_seconds_sum{{NODE, {WAITED_FOR}}}[$__rate_interval])) "
                "/ ignoring (phase) group_left () "
                '(sum(rate(modelcache_gets_total{NODE, from="disk"}[$__rate_interval])) '
                "+ sum(rate(modelcache_misses_total{NODE}[$__rate_interval])))",
                "{{phase}}",
            ),
            unit="s",
            stacked=True,
        ),
        graph(
            "Download time",
            "Quantiles of the time for which a get downloaded, without gets that were hits.",
            *(
                (
                    f"histogram_quantile({quantile}, sum by (le) "
                    '(rate(modelcache_phase_seconds_bucket{NODE, phase="download"}[$__rate_interval])))',
                    name,
                )
                for quantile, name in ((0.5, "median"), (0.95, "95 %"), (0.99, "99 %"))
            ),
            unit="s",
            colours=thresholds((300, "yellow"), (1000, "red")),
        ),
        graph(
            "95 % of each phase",
            "The time within which 95 of 100 calls leave a phase.",
            (
                "histogram_quantile(0.95, sum by (le, phase) "
                "(rate(modelcache_phase_seconds_bucket{NODE}[$__rate_interval])))",
                "{{phase}}",
            ),
            unit="s",
        ),
        graph(
            "Fills and waiting calls",
            "Fills that are running, and calls that wait for one.",
            ("sum(modelcache_fills_in_flight{NODE})", "fills"),
            ("sum(modelcache_waiting_calls{NODE})", "waiting calls"),
            unit="none",
        ),
        graph(
            "Received bytes",
            "Bytes that downloads receive, by tier, including discarded ones.",
            ("sum by (tier) (rate(modelcache_received_bytes_total{NODE}[$__rate_interval]))", "{{tier}}"),
            unit="Bps",
            stacked=True,
        ),
        graph(
            "Misses and joined fills",
            "Gets for which not all files were on disk, and how many of them waited for a fill of another caller.",
            ("sum(rate(modelcache_misses_total{NODE}[$__rate_interval]))", "misses"),
            ("sum(rate(modelcache_waits_total{NODE}[$__rate_interval]))", "joined another fill"),
            unit="reqps",
        ),
    ]


def disk() -> list[Panel]:
    """Returns the panels about the local directory and its budget."""
    return [
        graph(
            "Used share of the budget",
            "Above 100 % the directory exceeds its budget: files were added by other programs, or the budget was "
            "lowered.",
            ("modelcache_directory_used_bytes{NODE} / modelcache_directory_budget_bytes{NODE}", "{{instance}}"),
            unit="percentunit",
            colours=thresholds((0.95, "yellow"), (1, "red")),
        ),
        graph(
            "Content of the directory",
            "Bytes that count against the budget, and the parts in staging (fills) and quarantine (corrupt files).",
            ("sum(modelcache_directory_used_bytes{NODE})", "used"),
            ("sum(modelcache_directory_staging_bytes{NODE})", "staging"),
            ("sum(modelcache_directory_quarantine_bytes{NODE})", "quarantine"),
            ("sum(modelcache_directory_budget_bytes{NODE})", "budget"),
            unit="bytes",
        ),
        graph(
            "Free space of the filesystem",
            "Free bytes of the filesystem of the directory, and the bytes that the cache leaves free.",
            ("modelcache_directory_filesystem_free_bytes{NODE}", "{{instance}}"),
            ("max(modelcache_directory_min_free_bytes{NODE})", "left free"),
            unit="bytes",
        ),
        graph(
            "Artifacts",
            "Artifacts on disk, and those that are not evicted because they are in use (leased) or pinned.",
            ("sum(modelcache_directory_artifacts{NODE})", "all"),
            ("sum(modelcache_directory_leased_artifacts{NODE})", "leased"),
            ("sum(modelcache_directory_pinned_artifacts{NODE})", "pinned"),
            unit="none",
        ),
        graph(
            "Evicted bytes",
            "Bytes freed to make room. If it is about as much as is received, the budget is too small.",
            ("sum by (instance) (rate(modelcache_evicted_bytes_total{NODE}[$__rate_interval]))", "{{instance}}"),
            unit="Bps",
        ),
        graph(
            "Evicted artifacts, uncached files",
            "Artifacts that were evicted, and files that are larger than the budget and were passed through.",
            ("sum(rate(modelcache_evictions_total{NODE}[$__rate_interval]))", "evicted artifacts"),
            ("sum(rate(modelcache_uncached_files_total{NODE}[$__rate_interval]))", "uncached files"),
            unit="cps",
        ),
    ]


def tiers() -> list[Panel]:
    """Returns the panels about the remote and the origins, and about damaged files."""
    up = graph(
        "Tiers",
        "1 if the tier answered the last request, 0 if it did not. A process that has not yet sent a request to a tier "
        "has no line.",
        ("modelcache_tier_up{NODE}", "{{instance}} {{tier}}"),
        unit="bool_on_off",
        maximum=1,
        colours=low_is_bad(1, 1),
    )
    return [
        up,
        graph(
            "Time since the last request",
            "Seconds since the last request that told whether the tier is up.",
            ("time() - modelcache_tier_last_request_timestamp_seconds{NODE}", "{{instance}} {{tier}}"),
            unit="s",
        ),
        graph(
            "Throttled requests",
            "Answers 429 and 503, by tier. The requests are sent again after a pause.",
            ("sum by (tier) (rate(modelcache_throttled_total{NODE}[$__rate_interval]))", "{{tier}}"),
            unit="reqps",
            colours=thresholds((0.1, "yellow"), (1, "red")),
        ),
        graph(
            "Retries",
            "Requests that failed and were sent again, by tier.",
            ("sum by (tier) (rate(modelcache_retries_total{NODE}[$__rate_interval]))", "{{tier}}"),
            unit="reqps",
            colours=thresholds((1, "yellow"), (10, "red")),
        ),
        graph(
            "Stalls",
            "Slow downloads: `silent` brought no bytes within the read timeout, `stalled` nearly none, `hedged` was "
            "far slower than others.",
            ("sum by (kind, tier) (rate(modelcache_stalls_total{NODE}[$__rate_interval]))", "{{kind}} {{tier}}"),
            unit="cps",
        ),
        graph(
            "Failures",
            "Failed gets and puts, by the kind of error.",
            ("sum by (code) (rate(modelcache_failures_total{NODE}[$__rate_interval]))", "{{code}}"),
            unit="cps",
            stacked=True,
        ),
        graph(
            "Corrupt files and repairs",
            "Files that failed verification, by the tier that held or sent them, and those that were replaced since.",
            ("sum by (tier) (increase(modelcache_corrupt_files_total{NODE}[$__rate_interval]))", "corrupt: {{tier}}"),
            ("sum by (tier) (increase(modelcache_repaired_files_total{NODE}[$__rate_interval]))", "repaired: {{tier}}"),
            unit="short",
        ),
        graph(
            "Corrupt bytes",
            "Bytes that failed verification, by tier.",
            ("sum by (tier) (rate(modelcache_corrupt_bytes_total{NODE}[$__rate_interval]))", "{{tier}}"),
            unit="Bps",
        ),
        graph(
            "Uploads to the remote",
            "Bytes uploaded, and bytes that the object store copied itself.",
            ("sum(rate(modelcache_uploaded_bytes_total{NODE}[$__rate_interval]))", "uploaded"),
            ("sum(rate(modelcache_copied_bytes_total{NODE}[$__rate_interval]))", "copied by the store"),
            unit="Bps",
        ),
        graph(
            "Pending uploads",
            "Artifacts that have still to be uploaded to the remote. Until then this disk may have the only copy.",
            ("sum by (instance) (modelcache_directory_pending_backfills{NODE})", "{{instance}}"),
            unit="none",
        ),
        graph(
            "Bytes of pending uploads",
            "Bytes of the files that have still to be uploaded.",
            ("sum by (instance) (modelcache_directory_pending_backfill_bytes{NODE})", "{{instance}}"),
            unit="bytes",
        ),
    ]


def daemon() -> list[Panel]:
    """Returns the panels about the HTTP server of `modelcache serve`."""
    return [
        graph(
            "Requests by route",
            "Requests to the daemon. The routes of the Hugging Face Hub begin with `hub_`.",
            ("sum by (route) (rate(modelcache_http_requests_total{NODE}[$__rate_interval]))", "{{route}}"),
            unit="reqps",
            stacked=True,
        ),
        graph(
            "Requests by status",
            "Requests to the daemon, by the status of the response.",
            ("sum by (status) (rate(modelcache_http_requests_total{NODE}[$__rate_interval]))", "{{status}}"),
            unit="reqps",
            stacked=True,
        ),
        graph(
            "Time until the response begins",
            "Median and 95 % of the time from a request to the head of its response, for files of the Hub's routes and "
            "for all routes.",
            (
                "histogram_quantile(0.5, sum by (le) "
                '(rate(modelcache_http_request_seconds_bucket{NODE, route="hub_file"}[$__rate_interval])))',
                "hub_file, median",
            ),
            (
                "histogram_quantile(0.95, sum by (le) "
                '(rate(modelcache_http_request_seconds_bucket{NODE, route="hub_file"}[$__rate_interval])))',
                "hub_file, 95 %",
            ),
            (
                "histogram_quantile(0.5, sum by (le) "
                "(rate(modelcache_http_request_seconds_bucket{NODE}[$__rate_interval])))",
                "all, median",
            ),
            (
                "histogram_quantile(0.95, sum by (le) "
                "(rate(modelcache_http_request_seconds_bucket{NODE}[$__rate_interval])))",
                "all, 95 %",
            ),
            unit="s",
        ),
        graph(
            "Requests that wait",
            "Requests whose response has not begun.",
            ("sum by (instance) (modelcache_http_requests_in_flight{NODE})", "{{instance}}"),
            unit="none",
        ),
        graph(
            "Sent bytes",
            "Bytes of files in responses.",
            ("sum by (instance) (rate(modelcache_http_sent_bytes_total{NODE}[$__rate_interval]))", "{{instance}}"),
            unit="Bps",
        ),
        graph(
            "Open connections",
            "Connections that are open.",
            ("sum by (instance) (modelcache_http_connections_open{NODE})", "{{instance}}"),
            unit="none",
        ),
        graph(
            "Connections by outcome",
            "Accepted connections, and those that were refused, evicted or ended by a timeout.",
            ("sum by (outcome) (rate(modelcache_http_connections_total{NODE}[$__rate_interval]))", "{{outcome}}"),
            unit="cps",
        ),
        graph(
            "Cut responses",
            "Responses that were cut because the rest of the file could not be delivered, or had wrong bytes. The "
            "clients try again.",
            ("sum by (instance) (rate(modelcache_http_cut_responses_total{NODE}[$__rate_interval]))", "{{instance}}"),
            unit="cps",
            colours=thresholds((0.01, "yellow"), (1, "red")),
        ),
    ]


def variables() -> list[dict[str, object]]:
    """Returns the choices at the top of the dashboard: data source, job, instance."""
    chosen: list[dict[str, object]] = [
        {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus"}
    ]
    for name, label, values in (
        ("job", "Job", "label_values(modelcache_fills_in_flight, job)"),
        ("instance", "Node", 'label_values(modelcache_fills_in_flight{job=~"$job"}, instance)'),
    ):
        chosen.append(
            {
                "type": "query",
                "name": name,
                "label": label,
                "datasource": DATASOURCE,
                "definition": values,
                "query": {"query": values, "refId": name},
                # Again when the time range changes, because nodes come and go.
                "refresh": 2,
                "sort": 1,
                "multi": True,
                "includeAll": True,
                "allValue": ".+",
                "current": {"text": ["All"], "value": ["$__all"]},
            }
        )
    return chosen


def panels() -> list[Panel]:
    """Returns all rows with their panels, placed from left to right, and numbered."""
    placed: list[Panel] = []
    y = 0
    for title, row in (
        ("Fleet", fleet()),
        ("Time to ready", time_to_ready()),
        ("Disk", disk()),
        ("Tiers and integrity", tiers()),
        ("Daemon", daemon()),
    ):
        head = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        placed.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": head})
        x, y, height = 0, y + 1, 0
        for one in row:
            position: dict[str, int] = one["gridPos"]  # type: ignore[assignment]
            if x + position["w"] > WIDTH:
                x, y, height = 0, y + height, 0
            position |= {"x": x, "y": y}
            x, height = x + position["w"], max(height, position["h"])
            placed.append(one)
        y += height
    return [one | {"id": number} for number, one in enumerate(placed, 1)]


def dashboard() -> dict[str, object]:
    """Returns the dashboard as Grafana imports it."""
    return {
        "uid": "modelcache",
        "title": "modelcache",
        "description": "Hit rate, time to ready, disk, tiers and HTTP server of modelcache, for a fleet and its nodes.",
        "tags": ["modelcache"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": variables()},
        "panels": panels(),
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2, ensure_ascii=False))

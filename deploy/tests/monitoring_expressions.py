"""Finds the PromQL expressions of the dashboard and of the rules, and compares them with the documented metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import promql_parser as promql
import yaml

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy/grafana/modelcache.json"
RULES = ROOT / "deploy/prometheus/rules.yaml"
METRICS_PAGE = ROOT / "docs/metrics.md"

# Labels that Prometheus adds to what it scrapes.
TARGET_LABELS = frozenset({"job", "instance", "pod", "node"})
# The functions that a counter is for.
COUNTER_FUNCTIONS = {"rate", "increase"}
COMPARISONS = {"==", "!=", ">", "<", ">=", "<="}
SET_OPERATORS = {"and", "or", "unless"}
# Grafana replaces these before it sends a query.
GRAFANA_VARIABLES = {
    "$__rate_interval": "5m",
    "$__range": "1h",
    "$job": ".+",
    "$instance": ".+",
}


@dataclass(frozen=True)
class Metric:
    """One row of the generated tables in docs/metrics.md."""

    name: str
    kind: str
    labels: frozenset[str]
    meaning: str


@dataclass(frozen=True)
class Query:
    """An expression of the dashboard or of the rules, with its place for messages."""

    place: str
    expression: str
    legend: str = ""


@dataclass
class Use:
    """One selector in an expression, and what encloses it."""

    name: str
    matchers: list[Any]
    functions: tuple[str, ...] = ()
    grouping: set[str] = field(default_factory=set)


def documented_metrics() -> dict[str, Metric]:
    """Returns the metrics of running processes by name. Those of the metrics file describe commands."""
    page = METRICS_PAGE.read_text().partition("\n## Metrics file\n")[0]
    rows = re.findall(r"^\| `(\w+)(?:\{([\w,]+)\})?` \| (\w+) \|[^|]*\| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 30, "docs/metrics.md has another form than this test expects"
    return {
        name: Metric(name, kind, frozenset(labels.split(",")) - {""}, meaning) for name, labels, kind, meaning in rows
    }


def panels() -> Iterator[dict[str, Any]]:
    """Returns all panels of the dashboard, without the heads of rows."""
    return (panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row")


def rules() -> Iterator[dict[str, Any]]:
    """Returns all rules."""
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from group["rules"]


def dashboard_queries() -> list[Query]:
    """Returns the queries of all panels, with the variables of Grafana replaced."""
    queries = []
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in GRAFANA_VARIABLES.items():
                expression = expression.replace(name, value)
            queries.append(
                Query(f"panel {panel['title']!r}, query {target['refId']}", expression, target["legendFormat"])
            )
    return queries


def rule_queries() -> list[Query]:
    """Returns the expressions of all rules."""
    return [Query(f"rule {rule.get('record') or rule['alert']}", rule["expr"]) for rule in rules()]


def uses(node: Any, functions: tuple[str, ...] = (), grouping: frozenset[str] = frozenset()) -> Iterator[Use]:
    """Returns all selectors below a node of a parsed expression."""
    match node:
        case promql.VectorSelector():
            yield Use(node.name or "", list(node.matchers.matchers), functions, set(grouping))
        case promql.MatrixSelector():
            yield from uses(node.vector_selector, functions, grouping)
        case promql.Call():
            for argument in node.args:
                yield from uses(argument, (*functions, node.func.name), grouping)
        case promql.AggregateExpr():
            labels = node.modifier.labels if node.modifier else []
            yield from uses(node.expr, functions, grouping | set(labels))
        case promql.BinaryExpr():
            # The labels of both sides are known together only, so that they are checked by Prometheus.
            yield from uses(node.lhs, functions, grouping)
            yield from uses(node.rhs, functions, grouping)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from uses(node.expr, functions, grouping)
        case promql.NumberLiteral() | promql.StringLiteral():
            pass
        case _:
            raise AssertionError(f"an unknown kind of expression: {node}")


def problems(query: Query, metrics: dict[str, Metric], recorded: set[str]) -> list[str]:
    """Returns what is wrong with the metrics and labels of an expression, as sentences."""
    found = []
    for use in uses(promql.parse(query.expression)):
        family = re.sub("_(bucket|sum|count)$", "", use.name)
        metric = metrics.get(use.name) or metrics.get(family)
        if use.name == "up":
            metric = Metric("up", "gauge", frozenset(), "")
        elif use.name in recorded:
            continue
        if metric is None or (metric.kind == "histogram") == (use.name == metric.name):
            found.append(f"there is no metric {use.name}")
            continue
        labels = metric.labels | TARGET_LABELS | ({"le"} if use.name.endswith("_bucket") else set())
        for matcher in use.matchers:
            if matcher.name not in labels:
                found.append(f"{use.name} has no label {matcher.name}")
        for label in use.grouping - labels:
            found.append(f"{use.name} has no label {label} to group by")
        is_rate = bool(COUNTER_FUNCTIONS & set(use.functions))
        if is_rate != (metric.kind in ("counter", "histogram")):
            found.append(f"{use.name} is a {metric.kind}, and {'is' if is_rate else 'is not'} used in rate or increase")
    return [f"{query.place}: {problem}" for problem in found]


def excluded_values(query: Query) -> Iterator[tuple[str, str]]:
    """Returns the labels and values that an expression excludes. A wrong one among them would go unnoticed."""
    for use in uses(promql.parse(query.expression)):
        for matcher in use.matchers:
            if matcher.op in (promql.MatchOp.NotEqual, promql.MatchOp.NotRe):
                for value in matcher.value.split("|"):
                    yield matcher.name, value


def operands(node: Any) -> Iterator[Any]:
    """Returns the parts of the condition of an alert that have a value whether it fires or not."""
    match node:
        case promql.BinaryExpr() if str(node.op) in COMPARISONS | SET_OPERATORS:
            yield from operands(node.lhs)
            yield from operands(node.rhs)
        case promql.ParenExpr():
            yield from operands(node.expr)
        case promql.Call() if node.func.name == "absent":
            yield from operands(node.args[0])
        case promql.NumberLiteral():
            pass
        case _:
            yield node

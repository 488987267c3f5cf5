"""The counters of a cache: as a dictionary, in the Prometheus text format, and as a ``prometheus_client`` collector."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import _calls
from ._calls import Pending
from ._native import Cache as _Cache

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


class Metrics:
    """Counters of one cache in this process, since it was opened.

    An object of this class is a collector for ``prometheus_client``: ``REGISTRY.register(cache.metrics)``. Without that
    package, :meth:`text` returns the same numbers in the Prometheus text format.
    """

    def __init__(self, native: _Cache) -> None:
        self._native = native

    def to_dict(self) -> dict[str, Any]:
        """Return the counters. Takes microseconds and sends no request.

        :returns: a dictionary with these keys:

            - ``hits``: gets by the farthest tier that bytes came from (``disk``, ``remote``, ``origin``)
            - ``misses``: gets that needed more than the local disk
            - ``hit_rate``: share of gets that the local disk answered; ``None`` before the first get
            - ``bytes``: by tier
            - ``waits``: ``count`` and ``seconds`` of gets that waited for the download of another caller
            - ``puts``, ``uploaded_bytes``, ``copied_bytes``
            - ``evictions``: ``count`` and ``bytes`` of evictions that made room
            - ``failures``: by kind of error
            - ``phase_seconds``: by phase
            - ``tiers``: for each tier that received a request: ``up`` (whether the last request was answered),
              ``asked_unix`` (time of that request), ``error`` (its error or ``None``)
        """
        counters: dict[str, Any] = json.loads(self._native.metrics())
        return counters

    def __repr__(self) -> str:
        if not self._native.is_open:
            return "<Metrics of a closed cache>"
        counters = self.to_dict()
        hits = ", ".join(f"{counters['hits'][tier]} from {tier}" for tier in ("disk", "remote", "origin"))
        return f"<Metrics: {sum(counters['hits'].values())} gets ({hits}), {sum(counters['failures'].values())} failed>"

    @_calls.blocking
    def text(self) -> Pending[str]:
        """Return the counters and the state of the directory in the Prometheus text format.

        :returns: a page of the content type ``text/plain; version=0.0.4``.
        """
        return Pending(self._native.families(True), json.loads)

    atext = _calls.asynchronous(text)

    def describe(self) -> list[Metric]:
        """Return an empty list, so that ``prometheus_client`` does not call :meth:`collect` at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families. Called by ``prometheus_client``."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for family in json.loads(_calls.wait(self._native.families(False))):
            kind = CounterMetricFamily if family["is_counter"] else GaugeMetricFamily
            samples = family["samples"]
            labels = [samples[0]["label"][0]] if samples and samples[0]["label"] else []
            # The help text ends with a full stop, as in the page of `text`.
            metric = kind(family["name"], family["help"] + ".", labels=labels)
            for sample in samples:
                metric.add_metric([sample["label"][1]] if labels else [], sample["value"])
            yield metric

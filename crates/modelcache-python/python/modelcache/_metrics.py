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
            - ``bytes``: of successful gets, by tier
            - ``origin_avoided_bytes``: bytes of successful gets that came from disk or the remote
            - ``received_bytes``: bytes of files that downloads received, by tier, counted while they arrive
            - ``waits``: ``count`` and ``seconds`` of gets that waited for the download of another caller
            - ``puts``, ``uploaded_bytes``, ``copied_bytes``
            - ``uncached_files``, ``uncached_bytes``: passed through without being stored
            - ``evictions``: ``count`` and ``bytes`` of evictions that made room
            - ``corrupt_files``, ``corrupt_bytes``, ``repaired_files``: by tier
            - ``retries``, ``throttled``: requests that were sent again, and answers 429 and 503, by tier
            - ``stalls``: slow downloads by kind (``silent``, ``stalled``, ``hedged``), then by tier
            - ``fills_in_flight``, ``waiting_calls``: downloads that are running, and calls that wait for one
            - ``failures``: by kind of error
            - ``phase_seconds``: sum by phase
            - ``phase_buckets``: for each phase, pairs of an upper bound in seconds and the number of durations up to it
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
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        for family in json.loads(_calls.wait(self._native.families(False))):
            # The help text ends with a full stop, as in the page of `text`.
            metric: Any = kinds[family["kind"]](family["name"], family["help"] + ".", labels=family["labels"])
            for sample in family["samples"]:
                value = sample["value"]
                if isinstance(value, dict):
                    metric.add_metric(sample["labels"], value["buckets"], value["sum"])
                else:
                    metric.add_metric(sample["labels"], value)
            yield metric

"""The counters of a cache, as a dictionary, for Prometheus, and for ``prometheus_client``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import _calls
from ._native import Cache as _Cache

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


class Metrics:
    """What this cache did since it was opened, in this process.

    Registered with ``prometheus_client`` it is a collector: ``REGISTRY.register(cache.metrics)``. Without that package
    :meth:`text` gives the same numbers in Prometheus's text form.
    """

    def __init__(self, native: _Cache) -> None:
        self._native = native

    def to_dict(self) -> dict[str, Any]:
        """The counters. Costs microseconds and asks nobody.

        ``hits`` by the farthest tier that gave bytes (``disk``, ``remote``, ``origin``), ``misses`` (gets that disk
        could not answer by itself), ``hit_rate`` (share of gets that disk answered; ``None`` before the first),
        ``bytes`` by tier, ``waits`` (``count`` and ``seconds`` of gets that waited while somebody else fetched),
        ``puts``, ``uploaded_bytes``, ``copied_bytes``, ``evictions`` (``count`` and ``bytes``, to make room),
        ``failures`` by kind, ``phase_seconds`` by phase, ``tiers`` (by tier that was ever asked: ``up``, whether it
        answered the last time, ``asked_unix``, when that was, ``error``, how it failed or ``None``).
        """
        counters: dict[str, Any] = json.loads(self._native.metrics())
        return counters

    def text(self) -> str:
        """Counters and the state of the directory in Prometheus's text form (``text/plain; version=0.0.4``)."""
        page: str = json.loads(_calls.wait(self._native.families(True)))
        return page

    async def atext(self) -> str:
        """As :meth:`text`, for asyncio."""
        page: str = json.loads(await _calls.awaited(self._native.families(True)))
        return page

    def describe(self) -> list[Metric]:
        """Nothing: so that registering does not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families, for ``prometheus_client``."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for family in json.loads(_calls.wait(self._native.families(False))):
            kind = CounterMetricFamily if family["is_counter"] else GaugeMetricFamily
            samples = family["samples"]
            labels = [samples[0]["label"][0]] if samples and samples[0]["label"] else []
            metric = kind(family["name"], family["help"] + ".", labels=labels)
            for sample in samples:
                metric.add_metric([sample["label"][1]] if labels else [], sample["value"])
            yield metric

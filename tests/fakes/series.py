"""The series of this process, as Prometheus would see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import prometheus_client
from prometheus_client.registry import Collector

from vllm_pd_plugin.frontend.telemetry.metrics import FrontendMetrics
from vllm_pd_plugin.frontend.telemetry.outcomes import Objectives


@contextmanager
def newly_registered() -> Iterator[None]:
    """Take what is registered within out of the registry again."""
    registry = prometheus_client.REGISTRY
    before: set[Collector] = set(registry._collector_to_names)
    try:
        yield
    finally:
        for collector in set(registry._collector_to_names) - before:
            registry.unregister(collector)


@contextmanager
def counting(slos: Mapping[str, Objectives]) -> Iterator[FrontendMetrics]:
    """A frontend's metrics, as long as they are wanted."""
    with newly_registered():
        yield FrontendMetrics(slos)


def value(name: str, **labels: str) -> float:
    """Return a series' value; it must be there."""
    found = prometheus_client.REGISTRY.get_sample_value(name, labels)
    assert found is not None, (name, labels)
    return found


def reasons(name: str) -> set[str]:
    """Return the values of the label ``reason`` that a name's series have."""
    samples = (each for family in prometheus_client.REGISTRY.collect() for each in family.samples)
    return {sample.labels["reason"] for sample in samples if sample.name == name}


def values(name: str, by: str) -> dict[str, float]:
    """Return the values of a name that are not 0, added up by one label."""
    found: dict[str, float] = {}
    for family in prometheus_client.REGISTRY.collect():
        for sample in family.samples:
            if sample.name == name and sample.value:
                key = sample.labels[by]
                found[key] = found.get(key, 0.0) + sample.value
    return found

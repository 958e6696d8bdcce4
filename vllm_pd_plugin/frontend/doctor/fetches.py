"""What an engine says at ``/metrics`` of the KV that it has fetched; pure."""

from __future__ import annotations

import dataclasses
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

_COUNTS = {
    "pd_fetch_bytes_total": "num_bytes",
    "pd_fetch_kv_bytes_total": "kv_bytes",
    "pd_fetch_stretches_total": "reads",
    "pd_fetch_seconds_sum": "seconds",
    "pd_fetch_seconds_count": "fetches",
}
_CODECS, _FAILURES = "pd_fetches_total", "pd_handoff_failures_total"


@dataclasses.dataclass(frozen=True, slots=True)
class Fetches:
    """Counts over all engine cores and tensor parallel ranks of a server.

    num_bytes: moved. kv_bytes: that they take in the cache. seconds: sum over fetches.
    codecs: fetches by how the KV was written down. failures: handoffs by the reason of their end.
    """

    num_bytes: float = 0.0
    kv_bytes: float = 0.0
    reads: float = 0.0
    seconds: float = 0.0
    fetches: float = 0.0
    codecs: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: Counter[str] = dataclasses.field(default_factory=Counter)

    @classmethod
    def read(cls, text: str) -> Fetches:
        """Read a page of Prometheus' text format. Raises ValueError for what is none."""
        sums = dict.fromkeys(_COUNTS.values(), 0.0)
        codecs: Counter[str] = Counter()
        failures: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for name, labels, value, *_ in family.samples:
                if name in _COUNTS:
                    sums[_COUNTS[name]] += value
                elif name == _CODECS:
                    codecs[labels["codec"]] += int(value)
                elif name == _FAILURES:
                    failures[labels["reason"]] += int(value)
        return cls(**sums, codecs=codecs, failures=failures)

    def since(self, before: Fetches) -> Fetches:
        """Return what has come to it; what has not changed is left out."""
        more = {name: getattr(self, name) - getattr(before, name) for name in _COUNTS.values()}
        return Fetches(
            **more,
            codecs=self.codecs - before.codecs,
            failures=self.failures - before.failures,
        )

    @property
    def has_ended(self) -> bool:
        """Whether a handoff has come to its end, good or bad."""
        return bool(self.fetches or self.failures.total())

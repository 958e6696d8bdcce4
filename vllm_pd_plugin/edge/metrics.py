"""What the connector counts, through vLLM's connector stats, to Prometheus and the log."""

from __future__ import annotations

import dataclasses
from typing import Any

import prometheus_client
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.protocol.export_states import ExportState
from vllm_pd_plugin.transfer.specs import FetchResult

_FETCH_SECONDS_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip


@dataclasses.dataclass
class PdStats(KVConnectorStats):
    """Counts since the last collection. ``data`` holds only JSON-able values, all of which add up
    across ranks and steps; ``open`` (gauges) is replaced by the newer.

    fetches: [bytes on the wire, bytes of KV, descriptors, stretches, packed stretches, seconds] of
        each committed fetch, one row a rank.
    codecs: committed fetches by codec, counted on each rank.
    failures: consumer handoffs that failed, by reason.
    retries: times that a consumer turned to another producer, by the reason that made it.
    ended: producer handoffs that ended, by final state.
    withdrawals: times that a producer was preempted while it computed what it had announced.
    kept_tokens: prompt tokens that a failed fetch brought all the same, and are not recomputed.
    control_bytes: of control messages to and from producers.
    dropped_messages: control messages that were malformed or came from nobody known.
    faults: unexpected errors that were caught, and ended only what they belong to.
    open: handoffs open now, by side.
    """

    data: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "fetches": [], "codecs": {}, "failures": {}, "retries": {}, "ended": {},
            "withdrawals": 0, "kept_tokens": 0, "control_bytes": 0, "dropped_messages": 0,
            "faults": 0, "open": {},
        }
    )  # fmt: skip

    def record_fetch(self, result: FetchResult) -> None:
        self.data["fetches"].append([*dataclasses.astuple(result.counts), result.seconds])
        _add(self.data["codecs"], {result.codec.value: 1})

    def record_failure(self, reason: Reason) -> None:
        _add(self.data["failures"], {reason.value: 1})

    def record_retry(self, reason: Reason) -> None:
        _add(self.data["retries"], {reason.value: 1})

    def record_ended(self, state: ExportState) -> None:
        _add(self.data["ended"], {state.value: 1})

    def record_withdrawal(self) -> None:
        self.data["withdrawals"] += 1

    def record_kept(self, num_tokens: int) -> None:
        self.data["kept_tokens"] += num_tokens

    def record_control(self, num_bytes: int) -> None:
        self.data["control_bytes"] += num_bytes

    def record_dropped(self, count: int) -> None:
        self.data["dropped_messages"] += count

    def record_faults(self, count: int) -> None:
        self.data["faults"] += count

    def record_open(self, handoffs: dict[str, int]) -> None:
        self.data["open"] = handoffs

    def reset(self) -> None:
        self.data = PdStats().data

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> PdStats:
        mine, theirs = self.data, other.data
        mine["fetches"] += theirs["fetches"]
        _add(mine["codecs"], theirs["codecs"])
        _add(mine["failures"], theirs["failures"])
        _add(mine["retries"], theirs["retries"])
        _add(mine["ended"], theirs["ended"])
        mine["withdrawals"] += theirs["withdrawals"]
        mine["kept_tokens"] += theirs["kept_tokens"]
        mine["control_bytes"] += theirs["control_bytes"]
        mine["dropped_messages"] += theirs["dropped_messages"]
        mine["faults"] += theirs["faults"]
        mine["open"] = theirs["open"] or mine["open"]
        return self

    def reduce(self) -> dict[str, int | float]:
        """Summarise for vLLM's periodic log line."""
        rows = self.data["fetches"]
        summary: dict[str, int | float] = {"fetches": len(rows)}
        if rows:
            wire_bytes, kv_bytes, descriptors, stretches, packed, seconds = (
                sum(column) for column in zip(*rows, strict=True)
            )
            summary |= {
                "MiB": round(wire_bytes / 2**20, 2),
                "KV_MiB": round(kv_bytes / 2**20, 2),
                "descriptors": descriptors,
                "stretches": stretches,
                "packed": packed,
                "mean_ms": round(1000 * seconds / len(rows), 2),
            }
        summary |= {f"failed_{reason}": n for reason, n in self.data["failures"].items()}
        summary |= {f"ended_{state}": n for state, n in self.data["ended"].items()}
        return summary


class PdPromMetrics(KVConnectorPromMetrics):
    """The Prometheus series of ``docs/metrics.md``, one set for each engine of the server."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._bytes = self._counter(
            "pd_fetch_bytes", "Bytes that fetches have moved, of those that were committed."
        )
        self._kv_bytes = self._counter(
            "pd_fetch_kv_bytes", "Bytes that their KV takes in the cache, however it was coded."
        )
        self._descriptors = self._counter(
            "pd_fetch_descriptors", "Read descriptors (merged runs of blocks) of those fetches."
        )
        self._stretches = self._counter(
            "pd_fetch_stretches", "Reads of those fetches, one for each stretch."
        )
        self._packed = self._counter(
            "pd_fetch_packed_stretches", "Those reads that were of packed pieces."
        )
        self._codecs = self._counter(
            "pd_fetches", "Committed fetches of each rank, by codec.", ["codec"]
        )
        self._withdrawals = self._counter(
            "pd_withdrawals", "Times that a producer was preempted in the middle of a handoff."
        )
        self._kept = self._counter(
            "pd_kept_tokens", "Prompt tokens not recomputed, although their fetch failed."
        )
        self._seconds = self._histogram_cls(
            name="pd_fetch_seconds",
            documentation="Seconds from a fetch's start on a rank to its commit.",
            buckets=_FETCH_SECONDS_BUCKETS,
            labelnames=self._labelnames,
        )
        self._failures = self._counter(
            "pd_handoff_failures", "Handoffs that failed or were not used, by reason.", ["reason"]
        )
        self._retries = self._counter(
            "pd_handoff_retries",
            "Times that a consumer turned to another producer, by reason.",
            ["reason"],
        )
        self._ended = self._counter(
            "pd_producer_handoffs", "Producer handoffs that ended, by final state.", ["state"]
        )
        self._expired = self._counter(
            "pd_leases_expired", "Producer handoffs whose consumer fell silent."
        )
        self._control = self._counter(
            "pd_control_bytes", "Bytes of control messages to and from producers."
        )
        self._dropped = self._counter(
            "pd_dropped_messages", "Control messages dropped as malformed or misdirected."
        )
        self._faults = self._counter(
            "pd_faults", "Unexpected errors that were caught; each ended only what it belongs to."
        )
        self._open = self._gauge_cls(
            name="pd_handoffs_open",
            documentation="Handoffs open now, by side (producer or consumer).",
            labelnames=[*self._labelnames, "side"],
            multiprocess_mode="mostrecent",
        )
        for index, values in self.per_engine_labelvalues.items():
            for series in (
                self._bytes, self._kv_bytes, self._descriptors, self._stretches, self._packed,
                self._expired,
            ):  # fmt: skip
                series.labels(*values)
            self._seconds.labels(*values)
            self.observe(PdStats().data, index)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values = self.per_engine_labelvalues[engine_idx]
        reads = (self._bytes, self._kv_bytes, self._descriptors, self._stretches, self._packed)
        for *counts, seconds in transfer_stats_data["fetches"]:
            self._seconds.labels(*values).observe(seconds)
            for series, count in zip(reads, counts, strict=True):
                series.labels(*values).inc(count)
        for codec, count in transfer_stats_data["codecs"].items():
            self._codecs.labels(*values, codec).inc(count)
        self._withdrawals.labels(*values).inc(transfer_stats_data["withdrawals"])
        self._kept.labels(*values).inc(transfer_stats_data["kept_tokens"])
        for reason, count in transfer_stats_data["failures"].items():
            self._failures.labels(*values, reason).inc(count)
        for reason, count in transfer_stats_data["retries"].items():
            self._retries.labels(*values, reason).inc(count)
        for state, count in transfer_stats_data["ended"].items():
            self._ended.labels(*values, state).inc(count)
            if state == ExportState.EXPIRED.value:
                self._expired.labels(*values).inc(count)
        self._control.labels(*values).inc(transfer_stats_data["control_bytes"])
        self._dropped.labels(*values).inc(transfer_stats_data["dropped_messages"])
        self._faults.labels(*values).inc(transfer_stats_data["faults"])
        for side in ("producer", "consumer"):
            if (count := transfer_stats_data["open"].get(side)) is not None:
                self._open.labels(*values, side).set(count)

    def _counter(
        self, name: str, documentation: str, labels: list[str] | None = None
    ) -> prometheus_client.Counter:
        labelnames = [*self._labelnames, *(labels or [])]
        counter: prometheus_client.Counter = self._counter_cls(
            name=name, documentation=documentation, labelnames=labelnames
        )
        return counter


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for key, count in more.items():
        total[key] = total.get(key, 0) + count

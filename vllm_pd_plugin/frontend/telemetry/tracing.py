"""OpenTelemetry spans of one request's way, beside vLLM's own ``llm_request``.

They are children of the client's span, where it has one. Made when the request is over, from the
times that were noted: nothing is paid for them while tokens flow.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from vllm.tracing import extract_trace_context, instrument_manual


@dataclasses.dataclass(slots=True)
class Marks:
    """When things happened to a request in its last attempt, in seconds of the frontend's clock;
    0 for what did not happen."""

    arrived_at: float
    routed_at: float = 0.0
    prefilled_at: float = 0.0
    decoding_at: float = 0.0


def spans_of(
    marks: Marks, first_token_at: float, ended_at: float
) -> list[tuple[str, float, float]]:
    """Return the spans of a request: name, start and end."""
    spans = [("pd.route", marks.arrived_at, marks.routed_at)]
    if marks.prefilled_at:
        spans.append(("pd.prefill", marks.routed_at, marks.prefilled_at))
        if marks.decoding_at:
            spans.append(("pd.transfer", marks.prefilled_at, marks.decoding_at))
    if first_token_at:
        spans.append(("pd.first_token", marks.arrived_at, first_token_at))
        spans.append(("pd.decode", marks.decoding_at or first_token_at, ended_at))
    return [(name, start, end) for name, start, end in spans if end >= start > 0]


def record(
    spans: list[tuple[str, float, float]],
    now: float,
    attributes: Mapping[str, str | int],
    trace_headers: Mapping[str, str] | None,
) -> None:
    """Hand spans to the exporter that vLLM has set up."""
    epoch_s = time.time() - now
    context = extract_trace_context(trace_headers)
    for name, start, end in spans:
        instrument_manual(
            name,
            int((start + epoch_s) * 1e9),
            int((end + epoch_s) * 1e9),
            dict(attributes),
            context,
        )

"""The spans of a request's way."""

from __future__ import annotations

from vllm_pd_plugin.frontend.telemetry.tracing import Marks, spans_of


def test_a_request_that_is_handed_off_has_all_spans() -> None:
    marks = Marks(arrived_at=1.0, routed_at=1.1, prefilled_at=2.0, decoding_at=2.3)
    assert spans_of(marks, first_token_at=2.01, ended_at=5.0) == [
        ("pd.route", 1.0, 1.1),
        ("pd.prefill", 1.1, 2.0),
        ("pd.transfer", 2.0, 2.3),
        ("pd.first_token", 1.0, 2.01),
        ("pd.decode", 2.3, 5.0),
    ]


def test_a_request_on_one_engine_has_no_transfer() -> None:
    marks = Marks(arrived_at=1.0, routed_at=1.1)
    assert spans_of(marks, first_token_at=2.0, ended_at=5.0) == [
        ("pd.route", 1.0, 1.1),
        ("pd.first_token", 1.0, 2.0),
        ("pd.decode", 2.0, 5.0),
    ]


def test_what_never_happened_has_no_span() -> None:
    assert spans_of(Marks(arrived_at=1.0), first_token_at=0.0, ended_at=5.0) == []
    routed = Marks(arrived_at=1.0, routed_at=1.5)
    assert spans_of(routed, first_token_at=0.0, ended_at=5.0) == [("pd.route", 1.0, 1.5)]

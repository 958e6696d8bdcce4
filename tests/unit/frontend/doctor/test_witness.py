"""What is remembered of an engine's part in a request."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, FinishReason

    from tests.fakes.links import output_of
    from vllm_pd_plugin.frontend.doctor.witness import Part


def test_an_engine_says_by_its_own_clock_how_long_it_waited_and_computed() -> None:
    part = Part()
    events = [
        EngineCoreEvent(EngineCoreEventType.QUEUED, 5.0),
        EngineCoreEvent(EngineCoreEventType.SCHEDULED, 5.25),
    ]
    part.take(output_of("r", 7, events=events), given_at=6.0, now=1000.0)
    part.take(output_of("r", 8, finish=FinishReason.LENGTH), given_at=6.5, now=1000.5)
    assert (part.queue_s, part.compute_s) == (0.25, 0.75)
    assert (part.times, part.step_s) == ([1000.0, 1000.5], 0.5)


def test_an_end_without_a_token_is_no_token() -> None:
    part = Part()
    part.take(output_of("r", finish=FinishReason.ERROR), given_at=6.0, now=1000.0)
    assert not part.times
    assert part.finish is FinishReason.ERROR
    assert part.compute_s is None

"""What an engine does in a step that computes nothing, while a request of it waits for KV."""

from __future__ import annotations

import secrets
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.bare_engine import BareEngine


@pytest.mark.parametrize("steps_alone", [True, False])
def test_it_rests_unless_other_ranks_wait_for_its_steps(
    steps_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BareEngine("decode", steps_alone)
    try:
        rests: list[float] = []
        monkeypatch.setattr(
            engine.scheduler._has_news, "wait", lambda seconds: bool(rests.append(seconds))
        )
        wants(engine)
        for _ in range(3):
            engine.step()
        assert len(rests) == (3 if steps_alone else 0)
        assert rests == sorted(rests)
    finally:
        engine.close()


def test_what_ended_a_rest_is_taken_in_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two steps in flight, the workers' answer to a step is read when another is scheduled."""
    engine = BareEngine("decode")
    try:
        rests: list[float] = []
        is_news = iter([False, True, False, False, False])

        def wait(seconds: float) -> bool:
            rests.append(seconds)
            return next(is_news)

        monkeypatch.setattr(engine.scheduler._has_news, "wait", wait)
        wants(engine)
        for _ in range(5):
            engine.step()
        assert rests == [0.001, 0.002, 0.0, 0.001, 0.002]
    finally:
        engine.close()


def wants(engine: BareEngine) -> None:
    """A request arrives that will wait for its KV."""
    params = {
        "do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 9,
        "remote_handoff_id": secrets.token_hex(16),
    }  # fmt: skip
    engine.add("r", list(range(40)), params)

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
        engine.add(
            "r",
            list(range(40)),
            {
                "do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 9,
                "remote_handoff_id": secrets.token_hex(16),
            },
        )  # fmt: skip
        for _ in range(3):
            engine.step()
        assert len(rests) == (3 if steps_alone else 0)
        assert rests == sorted(rests)
    finally:
        engine.close()

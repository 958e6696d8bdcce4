"""What a client is told whose request has ended without an answer."""

from __future__ import annotations

import asyncio
import re
import warnings
from http import HTTPStatus
from pathlib import Path

import pytest

from tests.fakes.series import newly_registered

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.links import outputs_of
    from tests.fakes.streaming_server import Client
    from vllm_pd_plugin.engine_port.refusals import refusal
    from vllm_pd_plugin.frontend.api.refusals import PoolError
    from vllm_pd_plugin.frontend.pool.members import MemberState
    from vllm_pd_plugin.frontend.requests.endings import Ending

PAGE = Path(__file__).parents[4] / "docs" / "frontend.md"


def statuses_of_the_page() -> dict[str, int]:
    """By reason, the status that the table of errors has."""
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\d{3}) \|", PAGE.read_text(), re.MULTILINE)
    return {name: int(status) for names, status in rows for name in re.findall(r"\w+", names)}


def test_every_end_without_an_answer_has_the_status_that_is_documented() -> None:
    assert {e.value: int(PoolError(e).http_status) for e in Ending} == statuses_of_the_page()


def test_what_an_engine_refuses_is_told_to_its_client_with_the_engine_s_reason() -> None:
    async def story() -> None:
        client = Client()
        engine = client.engine()
        collector = await client.begin("r")
        there = client.dispatch.pool["d"].link
        refused = refusal("r-1w", "a token that the model does not know")
        client.dispatch.gave_out(there, outputs_of(refused))
        with pytest.raises(PoolError, match="refuse the request: a token that the") as told:
            collector.get_nowait()
        assert told.value.http_status is HTTPStatus.BAD_REQUEST
        assert engine.sent == ["r-1w"], "and not tried again"
        (member,) = client.dispatch.pool
        assert member.state(client.dispatch.now()) is MemberState.UP
        await client.close()

    with newly_registered():
        asyncio.run(story())

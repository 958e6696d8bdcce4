"""One engine under two addresses."""

from __future__ import annotations

import msgspec

from tests.fakes.engine_core import describe
from vllm_pd_plugin.engine_port.claims import Claims

A, B = "http://127.0.0.1:1", "http://localhost:1"
ENGINE = describe()


def test_an_engine_is_that_of_the_link_that_found_it_first() -> None:
    claims = Claims()
    assert claims.take(ENGINE, A) is None
    assert claims.take(ENGINE, A) is None
    assert claims.take(ENGINE, B) == A


def test_when_that_link_has_lost_it_another_may_have_it() -> None:
    claims = Claims()
    claims.take(ENGINE, A)
    claims.release(B)
    assert claims.take(ENGINE, B) == A
    claims.release(A)
    assert claims.take(ENGINE, B) is None


def test_what_differs_in_what_it_says_of_itself_is_another_engine() -> None:
    claims = Claims()
    claims.take(ENGINE, A)
    for change in (
        {"engine_id": "another"},
        {"control_port": ENGINE.control_port + 1},
        {"control_host": "10.0.0.9"},
        {"data_parallel_rank": ENGINE.data_parallel_rank + 1},
    ):
        assert claims.take(msgspec.structs.replace(ENGINE, **change), B) is None

"""An engine's side of frontends, over a fake engine core: who attaches, and for how long."""

from __future__ import annotations

import warnings
from typing import Any

import msgspec
import pytest

from tests.fakes.engines import make_kv
from vllm_pd_plugin.engine_port import messages
from vllm_pd_plugin.ids import Incarnation, new_incarnation
from vllm_pd_plugin.memory.identity import Weights
from vllm_pd_plugin.protocol.framing import PROTOCOL_VERSION, Header

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.request import RequestStatus

    from tests.fakes.engine_core import FakeFrontend, Scheduled, ServingEngine, aborted, added


# --- attaching -------------------------------------------------------------------------------


def test_a_frontend_that_attaches_learns_what_the_engine_is(engine: ServingEngine) -> None:
    engine.core.scheduler.counts, engine.core.scheduler.kv_usage = (3, 2), 0.25
    frontend = engine.frontend()
    frontend.attach()
    (attached,) = frontend.received
    load = messages.EngineLoad(3, 2, 0, 0.25)
    assert attached == messages.Attached(engine.server.description, load)
    assert frontend.senders == [engine.incarnation]


def test_a_frontend_hears_of_kv_that_has_become_another(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    other = make_kv(weights=Weights("unknown:boot, changed 1 times"))
    engine.server.identify(other)
    (attached,) = frontend.received
    assert isinstance(attached, messages.Attached)
    assert attached.description.kv == engine.server.description.kv == other
    late = engine.frontend("late")
    late.attach()
    assert late.received[0].description.kv == other


def test_frontends_are_told_apart_and_not_taken_for_clients_of_vllm(engine: ServingEngine) -> None:
    indices = []
    for name in ("a", "b"):
        frontend = engine.frontend(name)
        frontend.attach()
        frontend.add(name)
        indices.append(frontend.client_index)
    assert len(set(indices)) == 2
    assert min(indices) >= 1_000_000


@pytest.mark.parametrize(
    "message",
    [messages.Add("r"), messages.Abort(("r",)), messages.Ping()],
    ids=["add", "abort", "ping"],
)
def test_a_frontend_that_has_not_attached_is_told_so(
    engine: ServingEngine, message: messages.FromFrontend
) -> None:
    frontend = engine.frontend()
    frontend.say(message)
    assert frontend.received == [messages.Unknown()]
    assert engine.core.input_queue.empty()


def test_a_frontend_that_means_an_engine_before_this_one_is_told_so(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    frontend.say(messages.Ping(), target=new_incarnation())
    assert frontend.received == [messages.Unknown()]


def test_attaching_again_ends_what_was_under_way(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    frontend.add("r")
    before = frontend.client_index
    frontend.attach()
    assert aborted(engine) == [["r"]]
    engine.give(frontend, 50)  # for the index of before
    assert frontend.outputs() == []
    frontend.add("s")
    assert frontend.client_index != before
    engine.give(frontend, 51, request_id="s")
    assert frontend.numbers() == [1]


def test_what_comes_from_another_connection_is_none_of_the_frontend_s(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    frontend.add("r")
    other = engine.frontend("other")
    other.incarnation = frontend.incarnation
    engine.clock.advance(1)
    other.say(messages.Ping())
    other.abort("r")
    other.add("s")
    assert added(engine) == ["r"]
    assert aborted(engine) == []
    assert engine.server.turn() == engine.clock.now - 1 + messages.LEASE_S
    engine.give(frontend, 50)
    assert [output.new_token_ids for output in frontend.outputs()] == [[50]]
    assert other.outputs() == []


def test_there_is_a_most_of_frontends_and_those_there_are_may_attach_again(
    engine: ServingEngine,
) -> None:
    frontends = [engine.frontend(str(number)) for number in range(1025)]
    for frontend in frontends:
        frontend.attach()
    assert frontends[-1].received == [messages.Unknown()]
    assert all(isinstance(f.received[0], messages.Attached) for f in frontends[:-1])
    frontends[0].attach()
    assert isinstance(frontends[0].received[-1], messages.Attached)


# --- pings and leases ------------------------------------------------------------------------


def test_a_ping_is_answered_with_how_busy_the_engine_is(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    frontend.add("r")
    engine.give(frontend, 50)
    scheduler = engine.core.scheduler
    scheduler.counts, scheduler.kv_usage = (2, 1), 0.5
    scheduler.requests = {
        "in the middle": Scheduled(100, 30),
        "decoding": Scheduled(100, 101),
        "fetching": Scheduled(100, 0, RequestStatus.WAITING_FOR_REMOTE_KVS),
        "about to fetch": Scheduled(
            100, 0, RequestStatus.WAITING, kv_transfer_params={"do_remote_prefill": True}
        ),
        "has fetched in part": Scheduled(100, 90, kv_transfer_params={"do_remote_prefill": True}),
        "to be handed off": Scheduled(
            7, 0, RequestStatus.WAITING, kv_transfer_params={"do_remote_decode": True}
        ),
        "nonsense": Scheduled(3, 0, kv_transfer_params="nonsense"),
    }
    frontend.say(messages.Ping())
    assert frontend.received[-1] == messages.State(
        messages.EngineLoad(2, 1, 70 + 10 + 7 + 3, 0.5, num_steps=1),
        1,
        last_add=0,
        num_frontends=1,
    )


def test_a_silent_frontend_s_requests_are_ended(
    engine: ServingEngine, frontend: FakeFrontend
) -> None:
    other = engine.frontend("other")
    frontend.add("r")
    engine.clock.advance(messages.LEASE_S - 1)
    other.attach()
    other.add("theirs")
    assert engine.server.turn() == engine.clock.now + 1
    engine.clock.advance(1)
    assert engine.server.turn() == engine.clock.now + messages.LEASE_S - 1
    engine.settle()
    assert aborted(engine) == [["r"]]
    frontend.say(messages.Ping())
    assert frontend.received[-1] == messages.Unknown()


@pytest.mark.parametrize("what", ["ping", "add", "abort"])
def test_whatever_a_frontend_says_renews_its_lease(
    engine: ServingEngine, frontend: FakeFrontend, what: str
) -> None:
    engine.clock.advance(messages.LEASE_S - 1)
    if what == "add":
        frontend.add("r")
    else:
        frontend.say(messages.Ping() if what == "ping" else messages.Abort(("nothing",)))
    assert engine.server.turn() == engine.clock.now + messages.LEASE_S


def test_without_frontends_there_is_nothing_to_wake_for(engine: ServingEngine) -> None:
    assert engine.server.turn() is None


# --- messages that are none ------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [messages.Outputs(1), messages.State(messages.EngineLoad(), 0), messages.Unknown()],
    ids=["outputs", "state", "unknown"],
)
def test_what_only_an_engine_says_is_dropped(
    engine: ServingEngine, frontend: FakeFrontend, message: Any
) -> None:
    frontend.say(message)
    assert frontend.received == []
    assert engine.server.dropped_messages == 1


def test_a_malformed_message_is_dropped(engine: ServingEngine) -> None:
    engine.server.receive(b"somebody", [b"\xc1", b"\xc1"])
    assert engine.server.dropped_messages == 1


def test_a_frontend_of_another_version_is_answered_in_this_one(engine: ServingEngine) -> None:
    frontend = engine.frontend()
    header = Header(PROTOCOL_VERSION + 1, "attach", frontend.incarnation, Incarnation(""))
    body = msgspec.msgpack.encode(messages.Attach("frontend"))
    engine.server.receive(frontend.identity, [msgspec.msgpack.encode(header), body])
    assert frontend.received == [messages.Unknown()]
    assert engine.server.dropped_messages == 1


def test_the_description_can_be_read_by_others(engine: ServingEngine) -> None:
    encoded = msgspec.json.encode(engine.server.description)
    decoded = msgspec.json.decode(encoded, type=messages.EngineDescription)
    assert decoded == engine.server.description

"""Getting to know a peer, and losing it."""

from __future__ import annotations

import logging

import msgspec
import pytest

from tests.fakes.clock import FakeClock
from tests.fakes.engines import full_group, make_kv_cache, make_layout, memory_of
from tests.fakes.network import FakeNetwork
from tests.fakes.peers import ADDRESS, REGION, TIMEOUT_S, Local, Remote
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import Incarnation, new_handoff_id
from vllm_pd_plugin.memory.layout import RankMemory, Region
from vllm_pd_plugin.protocol import framing, wire

H = new_handoff_id()


@pytest.fixture
def network() -> FakeNetwork:
    return FakeNetwork()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def remote(network: FakeNetwork) -> Remote:
    return Remote(network)


@pytest.fixture
def local(network: FakeNetwork, clock: FakeClock) -> Local:
    return Local(network, clock)


@pytest.fixture
def acquainted(local: Local, remote: Remote, network: FakeNetwork) -> Local:
    """A table that knows the remote."""
    local.table.get(ADDRESS)
    network.deliver()
    return local


def test_an_unknown_address_is_introduced_once(
    local: Local, remote: Remote, network: FakeNetwork
) -> None:
    assert local.table.get(ADDRESS) is None
    assert local.table.get(ADDRESS) is None
    network.deliver()
    assert remote.got == [wire.Hello("local", framing.PROTOCOL_VERSION)]
    assert remote.targets == [""]
    assert network.open_links(ADDRESS) == 1


def test_a_peer_that_answers_is_ready(acquainted: Local, remote: Remote) -> None:
    (peer,) = acquainted.ready
    assert acquainted.table.get(ADDRESS) is peer
    assert (peer.address, peer.incarnation) == (ADDRESS, remote.incarnation)
    assert peer.welcome == remote.welcome()
    assert acquainted.lost == []


def test_a_message_is_meant_for_the_incarnation_that_is_known(
    acquainted: Local, remote: Remote, network: FakeNetwork
) -> None:
    acquainted.table.send(acquainted.peer(), wire.Want(H))
    network.deliver()
    assert remote.got[-1] == wire.Want(H)
    assert remote.targets[-1] == remote.incarnation


def test_a_reply_is_handed_on(acquainted: Local, remote: Remote, network: FakeNetwork) -> None:
    remote.say(wire.Offer(H, 10, b""))
    network.deliver()
    assert acquainted.replies == [wire.Offer(H, 10, b"")]


def test_silence_to_the_introduction_loses_the_peer(
    local: Local, network: FakeNetwork, clock: FakeClock
) -> None:
    local.table.get(ADDRESS)
    assert local.table.tick() == clock() + TIMEOUT_S
    clock.advance(TIMEOUT_S - 0.001)
    local.table.tick()
    assert local.lost == []
    clock.advance(0.001)
    assert local.table.tick() is None
    assert local.reasons() == [Reason.PEER_UNREACHABLE]
    assert "no answer from 127.0.0.1:7000 within 5 s" in str(local.lost[0])
    assert network.open_links(ADDRESS) == 0


def test_silence_to_a_question_loses_the_peer(
    acquainted: Local, network: FakeNetwork, clock: FakeClock
) -> None:
    acquainted.table.send(acquainted.peer(), wire.Want(H))
    clock.advance(TIMEOUT_S)
    acquainted.table.tick()
    assert acquainted.reasons() == [Reason.PEER_UNREACHABLE]


def test_a_second_question_does_not_put_off_the_deadline_of_the_first(
    acquainted: Local, clock: FakeClock
) -> None:
    acquainted.table.send(acquainted.peer(), wire.Want(H))
    clock.advance(TIMEOUT_S - 1)
    acquainted.table.send(acquainted.peer(), wire.Want(H))
    clock.advance(1)
    acquainted.table.tick()
    assert acquainted.reasons() == [Reason.PEER_UNREACHABLE]


def test_an_answer_in_time_keeps_the_peer(
    acquainted: Local, remote: Remote, network: FakeNetwork, clock: FakeClock
) -> None:
    acquainted.table.send(acquainted.peer(), wire.Want(H))
    network.deliver()
    remote.say(wire.Offer(H, 10, b""))
    network.deliver()
    clock.advance(100 * TIMEOUT_S)
    assert acquainted.table.tick() in (None, acquainted.idle_at)
    assert acquainted.lost == []


def test_a_message_that_expects_no_answer_may_be_met_with_silence(
    acquainted: Local, clock: FakeClock
) -> None:
    acquainted.table.send(acquainted.peer(), wire.Cancel(H), expects_answer=False)
    clock.advance(100 * TIMEOUT_S)
    assert acquainted.table.tick() in (None, acquainted.idle_at)
    assert acquainted.lost == []


def test_a_lost_peer_is_introduced_afresh(
    acquainted: Local, network: FakeNetwork, clock: FakeClock
) -> None:
    gone = acquainted.peer()
    acquainted.table.drop(ADDRESS, PeerError(Reason.READ_FAILED, "broken"))
    assert acquainted.reasons() == [Reason.READ_FAILED]
    assert acquainted.table.get(ADDRESS) is None
    network.deliver()
    assert acquainted.peer() is not gone


def test_a_lost_peer_is_sent_nothing(
    acquainted: Local, remote: Remote, network: FakeNetwork, clock: FakeClock
) -> None:
    gone = acquainted.peer()
    acquainted.table.drop(ADDRESS, PeerError(Reason.READ_FAILED, "broken"))
    acquainted.table.send(gone, wire.Want(H))
    acquainted.table.get(ADDRESS)
    network.deliver()
    acquainted.table.send(gone, wire.Want(H))
    network.deliver()
    assert wire.Want(H) not in remote.got
    assert acquainted.table.tick() in (None, acquainted.idle_at)


def test_an_address_that_nobody_asked_for_is_dropped_without_a_word(local: Local) -> None:
    local.table.drop(ADDRESS, PeerError(Reason.READ_FAILED, "broken"))
    assert local.lost == []


def test_a_late_answer_to_a_lost_connection_is_ignored(
    acquainted: Local, remote: Remote, network: FakeNetwork
) -> None:
    remote.say(wire.Offer(H, 10, b""))
    acquainted.table.drop(ADDRESS, PeerError(Reason.READ_FAILED, "broken"))
    network.deliver()
    assert acquainted.replies == []


def test_a_peer_of_another_layout_is_refused(network: FakeNetwork, local: Local) -> None:
    layout = make_layout([full_group("layer.0")])
    remote = Remote(network, make_kv_cache(layout, memory_of(layout)))
    remote.ranks = (RankMemory((REGION,), b"meta"),)
    local.table.get(ADDRESS)
    network.deliver()
    assert local.reasons() == [Reason.PEER_INCOMPATIBLE]
    assert "another model: theirs has 1 layers, ours 2" in str(local.lost[0])
    assert local.ready == []
    assert network.open_links(ADDRESS) == 0


@pytest.mark.parametrize(
    "ranks",
    [(), (RankMemory((REGION,), b""),), (RankMemory((REGION,) * 2, b""),) * 2],
    ids=["no ranks", "a region too few", "a rank too many"],
)
def test_a_peer_that_describes_its_memory_inconsistently_is_refused(
    network: FakeNetwork, local: Local, remote: Remote, ranks: tuple[RankMemory, ...]
) -> None:
    remote.ranks = ranks
    local.table.get(ADDRESS)
    network.deliver()
    assert local.reasons() == [Reason.PEER_INCOMPATIBLE]
    assert local.ready == []


def test_a_peer_of_another_protocol_version_is_refused(
    local: Local, network: FakeNetwork, remote: Remote
) -> None:
    local.table.get(ADDRESS)
    network.deliver_one()
    (packet,) = network.in_flight
    packet.frames[0] = msgspec.msgpack.encode([99, "welcome", remote.incarnation, ""])
    network.deliver()
    assert local.reasons() == [Reason.PEER_INCOMPATIBLE]
    assert "version 99" in str(local.lost[0])


def test_rubbish_is_counted_and_changes_nothing(acquainted: Local, network: FakeNetwork) -> None:
    peer = acquainted.peer()
    (link,) = network.links.values()
    link.on_message([b"rubbish"])
    link.on_message([])
    assert acquainted.table.dropped_messages == 2
    assert acquainted.peer() is peer
    assert acquainted.lost == []


def test_rubbish_is_no_answer(acquainted: Local, network: FakeNetwork, clock: FakeClock) -> None:
    acquainted.table.send(acquainted.peer(), wire.Want(H))
    (link,) = network.links.values()
    link.on_message([b"rubbish"])
    clock.advance(TIMEOUT_S)
    acquainted.table.tick()
    assert acquainted.reasons() == [Reason.PEER_UNREACHABLE]


@pytest.mark.parametrize("target", ["", "somebody else"])
def test_an_answer_to_somebody_else_is_dropped(
    acquainted: Local, remote: Remote, network: FakeNetwork, target: str
) -> None:
    remote.say(wire.Offer(H, 10, b""), target=Incarnation(target))
    network.deliver()
    assert acquainted.replies == []
    assert acquainted.table.dropped_messages == 1


def test_a_reply_before_the_introduction_is_dropped(
    local: Local, remote: Remote, network: FakeNetwork
) -> None:
    local.table.get(ADDRESS)
    network.deliver_one()
    network.lose("welcome")
    remote.say(wire.Offer(H, 10, b""))
    network.deliver()
    assert local.replies == []
    assert local.table.dropped_messages == 1


def test_an_answer_of_another_incarnation_loses_the_peer(
    acquainted: Local, remote: Remote, network: FakeNetwork
) -> None:
    replacement = Remote(network)
    acquainted.table.send(acquainted.peer(), wire.Want(H))
    network.deliver()
    replacement.say(wire.Alive({}))
    network.deliver()
    assert acquainted.reasons() == [Reason.PEER_RESTARTED]
    assert "127.0.0.1:7000 was restarted" in str(acquainted.lost[0])
    assert acquainted.replies == []
    assert network.open_links(ADDRESS) == 0


def test_a_refreshed_peer_that_is_still_the_same_stays(
    acquainted: Local, network: FakeNetwork
) -> None:
    peer = acquainted.peer()
    acquainted.table.refresh(ADDRESS)
    network.deliver()
    assert acquainted.ready == [peer, peer]
    assert acquainted.lost == []


@pytest.mark.parametrize("what", ["memory", "description"])
def test_a_refreshed_peer_that_contradicts_what_it_said_is_lost(
    acquainted: Local, remote: Remote, network: FakeNetwork, what: str
) -> None:
    """What is read from it was planned by what it said before."""
    if what == "memory":
        moved = Region(4096, REGION.num_blocks, REGION.block_bytes, REGION.stride_bytes)
        remote.ranks = (RankMemory((moved, REGION), b"meta"),)
    else:
        remote.kv_cache = msgspec.structs.replace(remote.kv_cache, data_parallel_rank=1)
    acquainted.table.refresh(ADDRESS)
    network.deliver()
    assert acquainted.reasons() == [Reason.PEER_INCOMPATIBLE]
    assert "in another way than before" in str(acquainted.lost[0])
    assert network.open_links(ADDRESS) == 0


def test_a_peer_of_another_incarnation_may_describe_itself_in_another_way(
    acquainted: Local, network: FakeNetwork
) -> None:
    replacement = Remote(network)
    replacement.kv_cache = msgspec.structs.replace(replacement.kv_cache, data_parallel_rank=1)
    acquainted.table.refresh(ADDRESS)
    network.deliver()
    assert acquainted.order == ["ready", "lost", "ready"]
    assert acquainted.reasons() == [Reason.PEER_RESTARTED]


def test_a_refreshed_peer_that_was_replaced_is_lost_and_then_ready(
    acquainted: Local, network: FakeNetwork
) -> None:
    old = acquainted.peer()
    replacement = Remote(network)
    acquainted.table.refresh(ADDRESS)
    network.deliver()
    assert acquainted.order == ["ready", "lost", "ready"]
    assert acquainted.reasons() == [Reason.PEER_RESTARTED]
    assert acquainted.peer() is not old
    assert acquainted.peer().incarnation == replacement.incarnation


def test_a_refreshed_peer_that_is_silent_is_lost(
    acquainted: Local, network: FakeNetwork, clock: FakeClock
) -> None:
    network.silence(ADDRESS)
    acquainted.table.refresh(ADDRESS)
    network.deliver()
    clock.advance(TIMEOUT_S)
    acquainted.table.tick()
    assert acquainted.reasons() == [Reason.PEER_UNREACHABLE]


def test_a_closed_table_closes_its_links_and_hears_nothing(
    acquainted: Local, remote: Remote, network: FakeNetwork
) -> None:
    remote.say(wire.Offer(H, 10, b""))
    acquainted.table.close()
    network.deliver()
    assert network.open_links(ADDRESS) == 0
    assert acquainted.replies == []
    assert acquainted.lost == []


def test_a_lost_peer_is_logged_with_its_address(
    acquainted: Local, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        acquainted.table.drop(ADDRESS, PeerError(Reason.READ_FAILED, "it broke"))
    assert "peer 127.0.0.1:7000 lost: it broke" in caplog.text

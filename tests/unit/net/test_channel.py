"""The real channel: real sockets on loopback, real threads."""

from __future__ import annotations

import os
import queue
import threading

import pytest

from tests.unit.net.conftest import KEYS, PATIENCE_S, MakeEngine
from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.net.channel import CurveKeys, Dealer, Listener, Loop

OTHER_KEYS = CurveKeys.derive("the key of another cluster")


# --- keys ------------------------------------------------------------------------------------


def test_the_same_cluster_key_gives_the_same_pairs() -> None:
    assert CurveKeys.derive("the key of this cluster") == KEYS
    secrets = {KEYS.server_secret, KEYS.client_secret}
    secrets |= {OTHER_KEYS.server_secret, OTHER_KEYS.client_secret}
    assert len(secrets) == 4


def test_secrets_are_never_shown() -> None:
    assert KEYS.server_secret.decode() not in repr(KEYS)
    assert KEYS.client_secret.decode() not in repr(KEYS)


@pytest.mark.parametrize("keys", [None, KEYS], ids=["without a key", "with a key"])
def test_engines_of_one_cluster_talk(make_engine: MakeEngine, keys: CurveKeys | None) -> None:
    here, there = make_engine(keys), make_engine(keys)
    link = here.link(there.listener.port, keys)
    here.send(link, b"header", b"\x00body\xff")
    assert there.requests.get(timeout=PATIENCE_S) == [b"header", b"\x00body\xff"]
    assert here.replies.get(timeout=PATIENCE_S) == [b"re", b"header", b"\x00body\xff"]


STRANGERS = {
    "with another key": OTHER_KEYS,
    "without a key": None,
    "that knows the server's public key only": CurveKeys(
        KEYS.server_public, b"", OTHER_KEYS.client_public, OTHER_KEYS.client_secret
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_nothing_arrives_from_a_stranger(make_engine: MakeEngine, stranger: str) -> None:
    there, here = make_engine(KEYS), make_engine()
    with there.refusing():
        here.send(here.link(there.listener.port, STRANGERS[stranger]), b"from a stranger")
    friend = here.link(there.listener.port, KEYS)
    here.send(friend, b"from a friend")
    assert there.requests.get(timeout=PATIENCE_S) == [b"from a friend"]
    assert there.requests.empty()


def test_nothing_is_said_in_clear_to_a_listener_without_a_key(make_engine: MakeEngine) -> None:
    there, here = make_engine(), make_engine()
    with there.refusing():
        here.send(here.link(there.listener.port, KEYS), b"a secret")
    assert there.requests.empty()


# --- listening and linking -------------------------------------------------------------------


def test_port_0_picks_a_free_one(make_engine: MakeEngine) -> None:
    ports = {make_engine().listener.port for _ in range(2)}
    assert len(ports) == 2
    assert 0 not in ports


def test_a_port_in_use_is_refused_by_name(make_engine: MakeEngine) -> None:
    port = make_engine().listener.port
    loop = Loop("second", lambda: None)
    try:
        with pytest.raises(ConfigError) as caught:
            Listener(loop, ("127.0.0.1", port), None, lambda *_: None)
    finally:
        loop.close()
    assert f"port={port}" in str(caught.value)
    assert "host='127.0.0.1'" in str(caught.value)
    assert "set port to a free one" in str(caught.value)


def test_a_host_that_is_not_of_this_machine_is_refused_by_name() -> None:
    loop = Loop("nowhere", lambda: None)
    try:
        with pytest.raises(ConfigError, match=r"host='192\.0\.2\.1' port=0"):
            Listener(loop, ("192.0.2.1", 0), None, lambda *_: None)
    finally:
        loop.close()


def test_a_call_is_made_where_the_loop_cannot_be_woken_for_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_engine()
    made: list[str] = []

    def fail(*_: int) -> None:
        raise OSError("not now")

    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd_write", fail)
        here.loop.call(lambda: made.append("first"))
    here.on_thread(lambda: made.append("second"))
    assert made == ["first", "second"]
    assert here.loop.contain.faults == 1


def test_many_messages_arrive_in_order(make_engine: MakeEngine) -> None:
    here, there = make_engine(), make_engine()
    link = here.link(there.listener.port)
    expected = [str(number).encode() for number in range(1000)]
    for frame in expected:
        here.send(link, frame)
    assert [there.requests.get(timeout=PATIENCE_S) for _ in expected] == [[f] for f in expected]


def test_a_message_waits_for_a_listener_that_comes_later(make_engine: MakeEngine) -> None:
    here = make_engine()
    loop = Loop("late", lambda: None)
    port = Listener(loop, ("127.0.0.1", 0), None, lambda *_: None).port
    loop.close()
    link = here.link(port)
    here.send(link, b"early")
    late, requests = Loop("late", lambda: None), queue.Queue[list[bytes]]()
    Listener(late, ("127.0.0.1", port), None, lambda _, frames: requests.put(frames))
    late.start()
    try:
        assert requests.get(timeout=PATIENCE_S) == [b"early"]
    finally:
        late.close()


def test_an_answer_to_nobody_is_dropped(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.on_thread(lambda: engine.listener.send(b"nobody", [b"hello"]))
    assert engine.on_thread(lambda: "alive") == "alive"


def test_a_closed_link_hears_nothing_more(make_engine: MakeEngine) -> None:
    here, there = make_engine(), make_engine()
    closed, other = here.link(there.listener.port), here.link(there.listener.port)
    here.on_thread(closed.close)
    here.send(other, b"hello")
    assert here.replies.get(timeout=PATIENCE_S) == [b"re", b"hello"]


def test_a_link_may_be_closed_by_the_message_that_it_brings(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = make_engine(), make_engine()
    links: list[Dealer] = []
    closed = threading.Event()

    def close(_: list[bytes]) -> None:
        links[0].close()
        closed.set()

    def connect() -> Dealer:
        return Dealer(here.loop, ("127.0.0.1", there.listener.port), None, close)

    links.append(here.on_thread(connect))
    here.send(links[0], b"hello")
    assert closed.wait(PATIENCE_S)
    assert here.on_thread(lambda: "alive") == "alive"
    assert here.loop.contain.faults == 0

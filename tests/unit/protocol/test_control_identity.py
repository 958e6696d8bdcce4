"""What an engine's KV is, as the control planes compare it; and versions of the protocol."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest

from tests.fakes.cluster import FakeCluster
from tests.fakes.engines import FakeEngine, Surroundings, make_kv
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Incarnation, Source, new_handoff_id
from vllm_pd_plugin.memory import probe
from vllm_pd_plugin.memory.identity import KvIdentity, Weights
from vllm_pd_plugin.protocol import framing, wire
from vllm_pd_plugin.protocol.events import Lost
from vllm_pd_plugin.protocol.export_states import ExportState

OTHER_WEIGHTS = make_kv(weights=Weights("sampled:2"))


def computing(scale: float, vllm: str = "0.31") -> KvIdentity:
    """An engine of a release line that computes so much of what another does."""
    rows = scale * np.ones((4, 2, 8), np.float32)
    answers = probe.together([{"layer 0 key": probe.sketch(rows)}])
    return make_kv(vllm=vllm, probe=answers)


def hashed(full: str) -> KvIdentity:
    return make_kv(weights=Weights("sampled:1", full=full))


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(lease_s=8.0)


def unlike(kv: KvIdentity) -> FakeCluster:
    """A cluster whose producer's KV is another."""
    cluster = FakeCluster(lease_s=8.0)
    cluster.producer.kill()
    around = Surroundings(cluster.network, cluster.fabric, cluster.clock)
    settings = dataclasses.replace(cluster._settings, kv=kv)
    cluster.producer = FakeEngine("producer", cluster.producer_address, around, settings)
    return cluster


def the_loss(cluster: FakeCluster) -> Lost:
    (lost,) = (event for event in cluster.consumer.events if isinstance(event, Lost))
    return lost


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        (OTHER_WEIGHTS, "weights are sampled:2, expected sampled:1"),
        (make_kv(kv_cache_dtype="fp8_e5m2"), "kv cache dtype is fp8_e5m2, expected bfloat16"),
        (make_kv(rope="{}x"), "rope is {}x, expected {}"),
        (computing(2.0), "answers to the probe prompt are 0.5 in layer 0 key away"),
        (make_kv(vllm="0.31"), "vLLM is 0.31, expected 0.32"),
    ],
)
def test_a_peer_whose_kv_is_another_is_refused_by_name(kv: KvIdentity, words: str) -> None:
    cluster = unlike(kv)
    if kv.vllm:
        cluster.consumer.control.identify(computing(1.0, vllm="0.32"))
    cluster.want("c", cluster.producer.begin("p", 8))
    lost = the_loss(cluster)
    assert lost.reason is Reason.PEER_INCOMPATIBLE
    assert words in lost.message


def test_a_peer_of_another_release_line_that_computes_the_same_is_a_peer() -> None:
    cluster = unlike(computing(1.0))
    cluster.consumer.control.identify(computing(1.0, vllm="0.32"))
    cluster.want("c", cluster.producer.begin("p", 8))
    assert cluster.consumer.offered() == ["c"]


def test_weights_that_only_the_full_hash_tells_apart_are_refused_when_both_have_it(
    cluster: FakeCluster,
) -> None:
    cluster.producer.control.identify(hashed("full:1"))
    cluster.want("before", cluster.producer.begin("p", 8))
    assert cluster.consumer.offered() == ["before"]
    cluster.consumer.control.identify(hashed("full:2"))
    assert cluster.consumer.lost() == {"before": Reason.PEER_INCOMPATIBLE}
    assert "full:1, expected full:2" in the_loss(cluster).message


def test_a_producer_that_comes_to_know_more_is_asked_again_before_its_offer_counts(
    cluster: FakeCluster,
) -> None:
    cluster.consumer.control.identify(hashed("full:2"))
    cluster.want("before", cluster.producer.begin("p", 8))
    cluster.producer.control.identify(hashed("full:1"))
    assert cluster.consumer.lost() == {}
    cluster.want("after", cluster.producer.begin("q", 8))
    assert cluster.consumer.offered() == ["before"]
    # Losing the peer ends what was under way with it.
    assert cluster.consumer.lost() == dict.fromkeys(("before", "after"), Reason.PEER_INCOMPATIBLE)


def test_a_producer_that_comes_to_know_that_it_is_the_same_goes_on(cluster: FakeCluster) -> None:
    cluster.consumer.control.identify(hashed("full:1"))
    cluster.want("before", cluster.producer.begin("p", 8))
    cluster.producer.control.identify(hashed("full:1"))
    cluster.want("after", cluster.producer.begin("q", 8))
    assert cluster.consumer.offered() == ["before", "after"]
    assert cluster.network.delivered.count("hello") == 2


def test_a_producer_that_never_says_what_its_kv_is_is_given_up(cluster: FakeCluster) -> None:
    cluster.want("c", cluster.producer.begin("p", 8))
    cluster.producer.control._exports.revision = 7  # and its Welcome still says 0
    cluster.want("d", cluster.producer.begin("q", 8))
    assert cluster.consumer.lost() == {"d": Reason.PEER_INCOMPATIBLE}


def test_kv_of_before_is_not_handed_off_any_more(cluster: FakeCluster) -> None:
    sealed = cluster.producer.produce("sealed", [1, 2], 8)
    running = cluster.producer.begin("running", 8)
    cluster.want("a", sealed)
    cluster.want("b", running)
    cluster.producer.control.void(make_kv())
    assert cluster.producer.released() == ["sealed"]
    assert cluster.producer.abandoned() == ["running"]
    cluster.consumer.fetch("a", sealed, [5, 6], 8)
    cluster.settle()
    assert cluster.consumer.outcome("a") is Reason.CANCELLED
    cluster.producer.drop("running")
    cluster.want("c", cluster.producer.produce("new", [3, 4], 8))
    assert cluster.consumer.offered()[-1] == "c"


def test_kv_of_before_is_not_taken_any_more(cluster: FakeCluster) -> None:
    source = cluster.producer.produce("p", [1, 2], 8)
    cluster.want("c", source)
    cluster.consumer.control.void(make_kv())
    assert cluster.consumer.lost() == {"c": Reason.KV_CHANGED}
    cluster.settle()
    assert cluster.producer.released() == ["p"]  # the producer need not hold it
    cluster.want("d", cluster.producer.produce("q", [1, 2], 8))
    assert "d" in cluster.consumer.offered()


def test_weights_that_are_changed_in_place_fit_nobody(cluster: FakeCluster) -> None:
    cluster.want("c", cluster.producer.begin("p", 8))
    cluster.producer.control.void(make_kv(weights=Weights("unknown:1234, being changed")))
    cluster.want("d", cluster.producer.begin("q", 8))
    lost = cluster.consumer.lost()
    assert lost["d"] is Reason.PEER_INCOMPATIBLE
    assert ExportState.CANCELLED in {
        event.state for event in cluster.producer.events if hasattr(event, "state")
    }


def test_what_only_waits_goes_on_when_kv_becomes_another(cluster: FakeCluster) -> None:
    """Nothing of it was computed or offered by what is no more."""
    waiting = Source(new_handoff_id(), cluster.producer_address, None)
    cluster.want("c", waiting)
    cluster.consumer.control.void(make_kv())
    assert cluster.consumer.lost() == {}
    table = cluster.producer.control._exports
    table.enqueue(waiting.handoff_id, "p", 8, b"prompt")
    cluster.producer.control.void(make_kv())
    assert cluster.producer.abandoned() == []


# --- versions --------------------------------------------------------------------------------


def test_engines_speak_the_newest_version_that_both_know(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release ahead of us says hello in the oldest version that it knows; we know a newer."""
    ours = framing.PROTOCOL_VERSION
    monkeypatch.setattr(framing, "PROTOCOL_VERSION", ours + 1)
    hello, nobody = wire.Hello("engine", ours + 2), Incarnation("")
    frames = framing.encode(hello, cluster.consumer.identity.incarnation, nobody, ours)
    answers: list[list[bytes]] = []
    cluster.producer.control._outbox._send = lambda who, frames: answers.append(frames)
    cluster.producer.control.receive(b"next", frames)
    header, welcome = framing.decode(answers[0])
    assert header.version == ours + 1
    assert isinstance(welcome, wire.Welcome)


def test_one_that_understands_newer_versions_only_is_spoken_to_in_one_of_these(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer says hello in the oldest version that it knows, and then in the one that it was
    refused in."""
    ours = framing.PROTOCOL_VERSION
    monkeypatch.setattr(framing, "PROTOCOL_VERSION", ours + 1)
    source = cluster.producer.produce("p", [3, 4], 8)
    refused: list[int] = []
    receive, answer = cluster.producer.control.receive, cluster.producer.control._outbox._send

    def of_the_next_release(identity: bytes, frames: list[bytes]) -> None:
        monkeypatch.setattr(framing, "OLDEST_VERSION", ours + 1)
        receive(identity, frames)
        monkeypatch.setattr(framing, "OLDEST_VERSION", ours)

    def note(identity: bytes, frames: list[bytes]) -> None:
        refused.append(framing.decode(frames)[0].version)
        answer(identity, frames)

    cluster.producer.control._outbox._send = note
    cluster.network.listeners[cluster.producer_address] = of_the_next_release
    cluster.want("c", source)
    cluster.settle()
    assert refused[:2] == [ours + 1, ours + 1]  # a refusal, a welcome
    assert cluster.consumer.lost() == {}
    assert "offer" in cluster.network.delivered


def test_one_that_understands_older_versions_answers_in_that_of_the_question(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = framing.PROTOCOL_VERSION
    monkeypatch.setattr(framing, "PROTOCOL_VERSION", ours + 1)
    answers: list[list[bytes]] = []
    cluster.producer.control._outbox._send = lambda who, frames: answers.append(frames)
    source = cluster.producer.begin("p", 8)
    target, sender = cluster.producer.identity.incarnation, cluster.consumer.identity.incarnation
    for message in (wire.Hello("old", ours), wire.Want(source.handoff_id)):
        frames = framing.encode(message, sender, target, ours)
        cluster.producer.control.receive(b"old", frames)
    assert [framing.decode(each)[0].version for each in answers] == [ours, ours]
    # What it is told unasked is in its version, too.
    cluster.producer.drop("p")
    assert framing.decode(answers[-1])[0].version == ours


@pytest.mark.parametrize("version", [framing.OLDEST_VERSION - 1, framing.PROTOCOL_VERSION + 1])
def test_other_versions_are_refused_in_one_line(version: int) -> None:
    header = msgspec.msgpack.encode(framing.Header(version, "hello", "a" * 16, ""))  # type: ignore[arg-type]
    with pytest.raises(framing.VersionError) as refusal:
        framing.decode([header, b""])
    assert f"version {version}" in str(refusal.value)
    assert "run the same release" in str(refusal.value)
    assert "\n" not in str(refusal.value)


# What an engine of release 0.1 (e83b495) sent: a Hello, and its answer to a Hello of ours.
HELLO_OF_4 = bytes.fromhex("9404a568656c6c6fb061616161616161616161616161616161a0")
ALIVE_OF_4 = bytes.fromhex(
    "9404a5616c697665b062626262626262626262626262626262b063636363636363636363636363636363"
)


@pytest.mark.parametrize("header", [HELLO_OF_4, ALIVE_OF_4])
def test_the_release_before_is_refused_by_its_version(header: bytes) -> None:
    with pytest.raises(framing.VersionError, match="version 4"):
        framing.decode([header, b"\x92\xa5hello\xa6engine"])

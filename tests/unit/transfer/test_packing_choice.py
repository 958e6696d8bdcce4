"""Which reads are packed, and which codec is asked for."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from tests.fakes.cluster import FakeCluster
from tests.fakes.engines import FakeEngine, Surroundings, full_group, make_layout
from tests.fakes.streaming import HERE, THERE, TOKENS, StreamingCluster
from vllm_pd_plugin.codecs.codec import Codec, CodecChoice, Part
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.packing.incoming import Packing
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.transfer.rates import PeerRates

AUTO = CodecChoice(None, Codec.INT2)


def fetch(cluster: FakeCluster, index: int, codec: Codec = Codec.RAW) -> int:
    """A whole fetch of sealed KV; return how many of its reads were packed."""
    source = cluster.producer.produce(f"p{index}", THERE, TOKENS)
    cluster.producer.fill(THERE, 1 + index)
    choice = CodecChoice(codec, codec)
    cluster.consumer.fetch(f"c{index}", source, HERE, TOKENS, choice=choice)
    cluster.settle()
    assert cluster.consumer.outcome(f"c{index}") is None
    assert cluster.consumer.holds(HERE, 1 + index)
    return cluster.consumer.result(f"c{index}").counts.packed


# --- packed or as it lies --------------------------------------------------------------------


def test_both_ways_are_tried_where_the_faster_is_wanted() -> None:
    cluster = FakeCluster(packing=Packing.AUTO)
    assert [fetch(cluster, index) for index in range(6)] == [0, 0, 0, 1, 1, 1]


def test_nothing_is_packed_where_that_is_not_wanted() -> None:
    cluster = FakeCluster(packing=Packing.NEVER)
    assert [fetch(cluster, index) for index in range(6)] == [0] * 6


def test_without_staging_memory_blocks_are_read_as_they_lie() -> None:
    cluster = FakeCluster(packing=None)
    assert fetch(cluster, 0) == 0
    assert "pack" not in cluster.network.delivered


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.INT4])
@pytest.mark.parametrize("who_has_none", ["producer", "consumer"])
def test_where_a_side_has_no_staging_memory_blocks_are_read_as_they_lie(
    who_has_none: str, codec: Codec
) -> None:
    """Whatever was asked for: what cannot be packed is not lossy either."""
    cluster = FakeCluster(packing=Packing.ALWAYS)
    without = dataclasses.replace(cluster._settings, packing=None)
    around = Surroundings(cluster.network, cluster.fabric, cluster.clock)
    engine = FakeEngine("without", ("127.0.0.1", 7003), around, without)
    setattr(cluster, who_has_none, engine)
    assert fetch(cluster, 0, codec) == 0
    assert cluster.consumer.result("c0").codec is Codec.RAW
    assert "pack" not in cluster.network.delivered


def test_blocks_too_large_for_the_staging_memory_are_read_as_they_lie() -> None:
    """In 512 bytes, a piece may have none."""
    cluster = FakeCluster(packing=Packing.AUTO, staging_bytes=512)
    assert [fetch(cluster, index) for index in range(5)] == [0] * 5


def test_a_worker_that_its_control_plane_does_not_know_cannot_pack() -> None:
    cluster = FakeCluster(packing=Packing.ALWAYS)
    cluster.producer.control._worker_links.clear()
    source = cluster.producer.produce("p", THERE, TOKENS)
    cluster.consumer.fetch("c", source, HERE, TOKENS)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.INTERNAL
    assert cluster.consumer.incoming.taken_bytes == 0


# --- codecs ----------------------------------------------------------------------------------


def encodable_cluster(packing: Packing = Packing.NEVER) -> FakeCluster:
    """Its KV takes 256 bytes in two layers, and less in int8, as the codecs believe."""
    group = msgspec.structs.replace(
        full_group("layer.0", "layer.1"),
        dtype="bfloat16",
        block_shape=(1, 4, 4),
        parts=(Part.of_rows("key", 1, 0, 4),),
    )
    cluster = FakeCluster(layout=make_layout(groups=[group]), packing=packing)
    incoming = cluster.consumer.plane._peers._rank.local.incoming
    assert incoming is not None
    incoming.coding.update({Codec.INT8: 1e12})
    return cluster


def asked_for(cluster: FakeCluster, choice: CodecChoice) -> Codec | None:
    """The codec of the first piece that is asked for; None when it is read as it lies."""
    source = cluster.producer.produce("p", THERE, TOKENS)
    cluster.consumer.fetch("c", source, HERE, TOKENS, choice=choice)
    while cluster.network.in_flight:
        if packs := cluster.network.under_way("pack"):
            assert isinstance(packs[0], wire.Pack)
            return packs[0].codec
        cluster.network.deliver_one()
        cluster.consumer.turn()
    return None


def know_link(cluster: FakeCluster, bytes_per_s: float) -> None:
    rates = cluster.consumer.plane._peers._rates[cluster.producer_address] = PeerRates(
        cluster.clock
    )
    rates.link.add(bytes_per_s, 1.0)


@pytest.mark.parametrize("codec", [Codec.INT8, Codec.INT4, Codec.INT2])
@pytest.mark.parametrize("packing", Packing)
def test_the_codec_that_was_named_is_asked_for_whatever_is_packed(
    codec: Codec, packing: Packing
) -> None:
    assert asked_for(encodable_cluster(packing), CodecChoice(codec, codec)) is codec


def test_a_slow_link_takes_a_lossy_codec_where_the_choice_is_free() -> None:
    cluster = encodable_cluster()
    know_link(cluster, 1000.0)
    assert asked_for(cluster, AUTO) is Codec.INT8


def test_a_link_that_is_not_known_takes_kv_as_it_is() -> None:
    assert asked_for(encodable_cluster(), AUTO) is None


def test_a_fast_link_takes_kv_as_it_is() -> None:
    cluster = encodable_cluster()
    know_link(cluster, 1e12)
    assert asked_for(cluster, AUTO) is None


def test_nothing_narrower_than_allowed_is_chosen() -> None:
    cluster = encodable_cluster()
    know_link(cluster, 1000.0)
    assert asked_for(cluster, CodecChoice(None, Codec.RAW)) is None


def test_a_lossy_codec_of_a_cache_that_it_does_not_know_is_refused_by_the_producer() -> None:
    cluster = FakeCluster(packing=Packing.ALWAYS)
    source = cluster.producer.produce("p", THERE, TOKENS)
    choice = CodecChoice(Codec.INT8, Codec.INT8)
    cluster.consumer.fetch("c", source, HERE, TOKENS, choice=choice)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.INTERNAL
    assert cluster.producer.outgoing.taken_bytes == 0
    assert cluster.consumer.incoming.taken_bytes == 0


# --- what is observed ------------------------------------------------------------------------


def test_it_is_observed_how_fast_a_prompt_is_computed() -> None:
    cluster = StreamingCluster(packing=Packing.ALWAYS)
    cluster.start()
    for end in (8, TOKENS):
        cluster.clock.advance(2.0)
        cluster.compute(range(end - 8, end))
        cluster.settle()
    prefill = cluster.consumer.plane._peers._rates[cluster.producer_address].prefill
    assert prefill.value == pytest.approx(2 * 2 * 32 / 2.0, rel=1e-3)
    assert prefill.samples == 2


def test_a_producer_that_is_lost_is_observed_anew() -> None:
    cluster = FakeCluster(packing=Packing.ALWAYS)
    fetch(cluster, 0)
    assert cluster.producer_address in cluster.consumer.plane._peers._rates
    cluster.restart_producer()
    source = cluster.producer.produce("p", THERE, TOKENS)
    cluster.consumer.fetch("c", source, HERE, TOKENS)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert (
        cluster.consumer.plane._peers._rates[cluster.producer_address]._way(True, 32.0).samples <= 1
    )

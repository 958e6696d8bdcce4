"""Staging memory that is too small for all that is wanted at once."""

from __future__ import annotations

from tests.fakes.cluster import FakeCluster
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Source
from vllm_pd_plugin.packing.incoming import Packing

LONG = 64
"""Tokens of a prompt whose KV takes 1024 bytes in two layers."""
SMALL = 1024
"""Staging memory in which four pieces of 256 bytes have room."""


def blocks_of(prompt: int) -> list[int]:
    """Sixteen for each of three prompts, scattered."""
    return [1 + prompt + 3 * i for i in range(LONG // 4)]


class ManyPrompts(FakeCluster):
    """Long prompts; prompt 0 is fetched for the request ``c0``, and so on."""

    def __init__(self, packing: Packing = Packing.ALWAYS) -> None:
        super().__init__(packing=packing, staging_bytes=SMALL)

    def start(self, prompt: int) -> Source:
        source = self.producer.begin(f"p{prompt}", LONG)
        self.want(f"c{prompt}", source)
        self.consumer.control.allocated(f"c{prompt}")
        self.consumer.fetch(f"c{prompt}", source, blocks_of(prompt), LONG)
        for layer in range(self.producer.num_layers):
            self.producer.write_kv(prompt, (blocks_of(prompt),), range(LONG), layer)
        self.producer.compute(f"p{prompt}", LONG, blocks_of(prompt))
        return source

    def has_arrived(self, prompt: int) -> bool:
        return self.consumer.holds_kv(prompt, (blocks_of(prompt),), LONG)

    def taken(self) -> list[int]:
        return [self.producer.outgoing.taken_bytes, self.consumer.incoming.taken_bytes]


def test_a_prompt_larger_than_a_piece_takes_several() -> None:
    cluster = ManyPrompts()
    cluster.start(0)
    cluster.settle()
    assert cluster.consumer.outcome("c0") is None
    assert cluster.has_arrived(0)
    counts = cluster.consumer.result("c0").counts
    assert (counts.stretches, counts.packed, counts.descriptors) == (4, 4, 4)
    assert cluster.taken() == [0, 0]


def test_at_most_two_pieces_of_a_fetch_are_under_way() -> None:
    cluster = ManyPrompts()
    cluster.consumer.transport.holds_reads = True
    cluster.start(0)
    cluster.settle()
    assert cluster.taken() == [512, 512]
    assert cluster.network.delivered.count("pack") == 2


def test_fetches_that_have_no_room_together_finish_all_the_same() -> None:
    cluster = ManyPrompts()
    cluster.consumer.transport.holds_reads = True
    for prompt in range(3):
        cluster.start(prompt)
    cluster.settle()
    assert cluster.taken() == [SMALL // 2, SMALL], "of one consumer no more than is left"
    for _ in range(20):
        cluster.consumer.transport.finish_one(0)
        cluster.settle()
        assert max(cluster.taken()) <= SMALL
    for prompt in range(3):
        assert cluster.consumer.outcome(f"c{prompt}") is None
        assert cluster.has_arrived(prompt)
    assert cluster.taken() == [0, 0]


def test_a_fetch_that_waits_for_room_is_told_when_there_is_some() -> None:
    cluster = ManyPrompts()
    room = cluster.consumer.room
    taken = [room.take(("another", 0), 256) for _ in range(4)]
    cluster.start(0)
    cluster.settle()
    assert "pack" not in cluster.network.delivered
    wait = cluster.consumer.plane.turn()
    assert wait is not None
    assert wait > 1.0, "it looks for room by itself"
    for offset in taken:
        assert offset is not None
        room.give_back(offset)
    cluster.consumer.turn()
    cluster.settle()
    assert cluster.consumer.outcome("c0") is None


def test_fetches_get_room_in_the_order_in_which_they_asked_for_it() -> None:
    cluster = ManyPrompts()
    cluster.consumer.transport.holds_reads = True
    for prompt in range(3):
        cluster.start(prompt)
    cluster.settle()
    finished: list[str] = []
    for _ in range(30):
        cluster.consumer.transport.finish_one(0)
        cluster.settle()
        finished = [result.request_id for result in cluster.consumer.results]
    assert finished == ["c0", "c1", "c2"]


def test_a_fetch_that_waits_for_room_can_be_cancelled() -> None:
    cluster = ManyPrompts()
    cluster.consumer.transport.holds_reads = True
    for prompt in range(3):
        cluster.start(prompt)
    cluster.settle()
    cluster.consumer.plane.cancel("c2", Reason.ABORTED)
    assert cluster.consumer.outcome("c2") is Reason.ABORTED
    for _ in range(20):
        cluster.consumer.transport.finish_one(0)
        cluster.settle()
    assert [cluster.consumer.outcome(f"c{prompt}") for prompt in range(2)] == [None, None]
    assert not cluster.consumer.kv_in(0, blocks_of(2)).any()
    assert cluster.taken() == [0, 0]


def test_a_producer_without_room_packs_when_there_is_some_again() -> None:
    cluster = ManyPrompts()
    offsets = [cluster.producer.outgoing.take(256) for _ in range(4)]
    cluster.start(0)
    cluster.settle()
    assert cluster.network.delivered[-1] == "stage"
    assert cluster.producer.announcer.turn() is None  # it sleeps: room comes with a message
    for offset in offsets:
        assert offset is not None
        cluster.producer.outgoing.give_back(offset)
    cluster.producer.announcer.turn()
    cluster.settle()
    assert cluster.consumer.outcome("c0") is None
    assert cluster.has_arrived(0)


def test_a_piece_that_waits_for_room_at_the_producer_is_forgotten_with_its_fetch() -> None:
    cluster = ManyPrompts()
    taken = [cluster.producer.outgoing.take(256) for _ in range(4)]
    cluster.start(0)
    cluster.settle()
    cluster.consumer.plane.cancel("c0", Reason.ABORTED)
    cluster.settle()
    for offset in taken:
        assert offset is not None
        cluster.producer.outgoing.give_back(offset)
    cluster.producer.announcer.turn()
    cluster.settle()
    assert cluster.producer.coder.num_encoded == 0
    assert cluster.taken() == [0, 0]

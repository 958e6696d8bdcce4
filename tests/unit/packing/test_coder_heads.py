"""Pieces of some heads of real caches: what one engine writes down another takes in."""

from __future__ import annotations

import pytest
import torch

from tests.unit.packing.test_coder import (
    HEADS,
    HERE,
    THERE,
    Engine,
    Kind,
    columns_and_rows,
    engine,
    mla,
    rows_of,
    tiles,
    tokens_before_heads,
)
from vllm_pd_plugin.packing.heads import HeadsPiece

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = range(21, 90)
"""From the middle of a block to the middle of one, whichever size they have."""
FLOATS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
Pair = tuple[Engine, Engine]


def piece(one: Engine, regions: tuple[int, ...], heads: range, dtype: str) -> HeadsPiece:
    return HeadsPiece.of(one.layout, 0, regions, heads, TOKENS, dtype)


def narrower(dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    return "bfloat16" if torch.bfloat16 in dtypes else "float32"


def move(pair: Pair, there: HeadsPiece, here: HeadsPiece) -> None:
    """Write a piece down, read it, take it in; its places in staging memory are not the same."""
    producer, consumer = pair
    size = there.num_bytes
    assert here.num_bytes == size
    producer.coder.gather(there, THERE[:1], 512).wait()
    consumer.incoming[256 : 256 + size] = producer.outgoing[512 : 512 + size]
    consumer.coder.scatter(here, HERE[:1], 256).wait()
    assert producer.coder.digest_outgoing(512, size) == consumer.coder.digest_incoming(256, size)
    assert not producer.outgoing[:512].any(), "more was written than the piece has"
    assert not producer.outgoing[512 + size :].any(), "more was written than the piece has"


@pytest.mark.parametrize("dtypes", FLOATS, ids=str)
@pytest.mark.parametrize("blocks", [(16, 48), (48, 16), (16, 16)], ids=str)
@pytest.mark.parametrize(
    "kinds",
    [
        (rows_of, tokens_before_heads), (tokens_before_heads, rows_of),
        (columns_and_rows, rows_of), (rows_of, columns_and_rows), (tiles, tokens_before_heads),
        (rows_of, tiles),
    ],
    ids=lambda kinds: f"{kinds[0].__name__} to {kinds[1].__name__}",
)  # fmt: skip
def test_some_heads_of_some_layers_arrive_in_others_of_another_layout(
    kinds: tuple[Kind, Kind], blocks: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Head 1 there is head 0 here, and layers 1 and 0 there are 0 and 1 here."""
    producer = engine([kinds[0]], [blocks[0]], dtypes[0], 1)
    consumer = engine([kinds[1]], [blocks[1]], dtypes[1], 2)
    before = [cache.clone() for cache in consumer.caches]
    wire = narrower(dtypes)
    there = piece(producer, (1, 0), range(1, 2), wire)
    move((producer, consumer), there, piece(consumer, (0, 1), range(1), wire))
    for layer in range(2):
        untouched = Engine(
            consumer.layout, before, consumer.pieces, consumer.outgoing, consumer.incoming
        )
        for source, target in zip(
            producer.parts_of(1 - layer), consumer.parts_of(layer), strict=True
        ):
            sent = producer.values(1 - layer, source, THERE[0], TOKENS.stop)[1, TOKENS.start :]
            found = consumer.values(layer, target, HERE[0], TOKENS.stop)
            was = untouched.values(layer, target, HERE[0], TOKENS.stop)
            assert torch.equal(found[0, TOKENS.start :], sent.to(dtypes[1]))
            assert torch.equal(found[0, : TOKENS.start], was[0, : TOKENS.start])
            assert torch.equal(found[1], was[1])
        blocks_here = HERE[0][: -(-TOKENS.stop // blocks[1])]
        elsewhere = [block for block in range(len(before[layer])) if block not in blocks_here]
        assert torch.equal(consumer.caches[layer][elsewhere], before[layer][elsewhere])


@pytest.mark.parametrize("blocks", [(16, 48), (48, 16)], ids=str)
def test_a_latent_arrives_in_blocks_of_another_size(blocks: tuple[int, int]) -> None:
    producer = engine([mla], [blocks[0]], torch.bfloat16, 1)
    consumer = engine([mla], [blocks[1]], torch.bfloat16, 0)
    pieces = [piece(one, (0, 1), range(1), "bfloat16") for one in (producer, consumer)]
    move((producer, consumer), *pieces)
    for layer in range(2):
        for part in producer.parts_of(layer):
            sent = producer.values(layer, part, THERE[0], TOKENS.stop)[:, TOKENS.start :]
            found = consumer.values(layer, part, HERE[0], TOKENS.stop)
            assert torch.equal(found[:, TOKENS.start :], sent)
            assert not found[:, : TOKENS.start].any()


def test_ranks_of_a_consumer_take_their_heads_from_one_page() -> None:
    """Each of two has one of the producer's two heads, as its only one."""
    producer = engine([rows_of], [16], torch.bfloat16, 1)
    for head in range(HEADS):
        consumer = engine([rows_of], [16], torch.bfloat16, 0)
        there = piece(producer, (0, 1), range(head, head + 1), "bfloat16")
        move((producer, consumer), there, piece(consumer, (0, 1), range(1), "bfloat16"))
        producer.outgoing.zero_()
        part = producer.parts_of(0)[0]
        sent = producer.values(0, part, THERE[0], TOKENS.stop)[head, TOKENS.start :]
        found = consumer.values(0, part, HERE[0], TOKENS.stop)[0, TOKENS.start :]
        assert torch.equal(found, sent)

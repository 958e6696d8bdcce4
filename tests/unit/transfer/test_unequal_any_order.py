"""Two engines of any shapes, in any order of events: what is usable is right, and all ends."""

from __future__ import annotations

import dataclasses
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.shapes import Shape
from tests.fakes.unequal import Request, UnequalPair
from vllm_pd_plugin.packing.incoming import Packing

FORMS = ("rows", "token major", "swapped", "columns", "tiles")
CUTS = (((0, 1, 2),), ((0, 1, 2),), ((0, 1), (2,)), ((0,), (1, 2)))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    cut = draw(st.sampled_from(CUTS))
    return Shape(
        tp=draw(st.sampled_from([1, 1, 2] if len(cut) > 1 else [1, 2, 4])),
        stages=cut,
        block_tokens=draw(st.sampled_from([2, 4, 6, 8])),
        form=draw(st.sampled_from(FORMS)),
        dtype=draw(st.sampled_from(["bfloat16", "bfloat16", "float32"])),
    )


@st.composite
def pairs(draw: st.DrawFn) -> UnequalPair:
    theirs, ours = draw(shapes()), draw(shapes())
    windowed = draw(st.sampled_from([(), (), (1,), (0, 2)]))
    theirs, ours = (dataclasses.replace(each, windowed=windowed) for each in (theirs, ours))
    num_tokens = draw(st.integers(1, 40))
    first_token = draw(st.integers(0, (num_tokens - 1) // ours.block_tokens)) * ours.block_tokens
    pair = UnequalPair(
        theirs,
        ours,
        Request(num_tokens, first_token),
        draw(st.sampled_from(list(Packing))),
        checks_bytes=draw(st.booleans()),
        staging_bytes=draw(st.sampled_from([2048, 4096])),
        holds_reads=True,
    )
    if draw(st.booleans()):  # packing takes its time, as on a GPU
        for coder in pair.coders:
            coder.holds = True
    return pair


def go_on(pair: UnequalPair, chance: random.Random, num_moves: int, harm: int) -> None:
    """What both sides do, in any order. harm: of what may happen besides: 0 nothing, 1 messages
    that come twice and requests that lose their blocks, 2 messages that are lost, too."""
    for _ in range(num_moves):
        in_flight, what = pair.network.in_flight, chance.random()
        if what < 0.35:
            pair.write(chance.randrange(len(pair.passes)), says_so=chance.random() < 0.7)
        elif what < 0.70 and in_flight:
            heads = pair.network.next_of_each_lane()
            pair.network.deliver_one(in_flight.index(chance.choice(heads)))
        elif what < 0.77:
            chance.choice(pair.consumer.ranks).transport.finish_one(chance.randrange(9))
        elif what < 0.80:
            for coding in chance.choice(pair.coders).under_way[:1]:
                coding.wait()
        elif what < 0.85:
            pair.schedule(chance.randint(1, 12))
        elif what < 0.87:
            pair.seal()
        elif what < 0.89 and harm:
            pair.preempt(announces=chance.random() < 0.5)
        elif what < 0.92 and harm and in_flight:
            packet = chance.choice(in_flight)
            in_flight.insert(in_flight.index(packet), packet)
        elif what < 0.93 and harm > 1 and in_flight:
            in_flight.remove(chance.choice(in_flight))
        else:
            pair.clock.advance(0.05 * chance.randrange(5))
        if chance.random() < 0.25:
            pair.turn()


def bring_to_an_end(pair: UnequalPair) -> None:
    """Nothing goes wrong any more; the producer ends what it computes, and time passes."""
    for coder in pair.coders:
        coder.holds = False
        coder.finish()
    for _ in range(200):
        pair.schedule(9)
        for rank in pair.passes:
            while pair.passes[rank]:
                pair.write(rank)
        pair.seal()
        for rank in pair.consumer.ranks:
            rank.transport.finish_reads()
        pair.settle()
        if pair.is_over:
            break
        pair.pass_time(0.5)
    assert pair.is_over, "a fetch waits for ever"
    pair.close()
    for _ in range(35):
        if not pair.leaks():
            break
        pair.settle()
        pair.pass_time(1.0)
    assert pair.leaks() == {}
    for rank in pair.consumer.ranks:
        assert rank.transport.reads == {}
        assert rank.transport.unfinished == []
        assert rank.transport.released_while_pending == 0


@settings(max_examples=200)
@given(pair=pairs(), seed=st.integers(0, 2**16), harm=st.integers(0, 1))
def test_whatever_the_shapes_and_the_order_of_things_every_rank_gets_what_is_right(
    pair: UnequalPair, seed: int, harm: int
) -> None:
    go_on(pair, random.Random(seed), 250, harm)
    bring_to_an_end(pair)
    assert pair.reasons == [None] * len(pair.consumer.ranks)


@settings(max_examples=200)
@given(pair=pairs(), seed=st.integers(0, 2**16))
def test_whatever_is_lost_on_the_way_what_is_used_is_right_and_everything_ends(
    pair: UnequalPair, seed: int
) -> None:
    go_on(pair, random.Random(seed), 250, harm=2)
    bring_to_an_end(pair)

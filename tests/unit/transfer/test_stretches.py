from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.fakes.engines import full_group, make_layout, sliding_group
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.ids import HandoffId
from vllm_pd_plugin.memory.layout import BlockTables, EngineLayout, Group, Region
from vllm_pd_plugin.net.transport import ReadPlan
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.transfer.plan import plan_reads
from vllm_pd_plugin.transfer.stretches import Stretches

T = 4
"""Tokens in a block; a block has 32 bytes."""
BLOCK = 32
H = HandoffId("h")
FULL = [full_group("layers.0", "layers.1")]
INTERLEAVED = [full_group("layers.1", "layers.3"), full_group("layers.0", "layers.2")]
WINDOWED = [full_group("layers.0"), sliding_group(6, "layers.1")]


class Consumer:
    """A consumer's stretches: local block i of a table is 10 + i, remote block i is 50 + i.

    Every region is at a million times its number, locally at nothing more and remotely at 500,000.
    """

    def __init__(self, groups: Sequence[Group], num_tokens: int, first_token: int = 0) -> None:
        self.layout: EngineLayout = make_layout(groups=groups)
        num_blocks = -(-num_tokens // T)
        layers = range(len(self.layout.layers))
        self.local: BlockTables = [[10 + i for i in range(num_blocks)] for _ in groups]
        self.remote: BlockTables = [[50 + i for i in range(num_blocks)] for _ in groups]
        self.local_regions = [Region(layer * 1_000_000, 99, BLOCK, BLOCK) for layer in layers]
        self.remote_regions = [
            Region(layer * 1_000_000 + 500_000, 99, BLOCK, BLOCK) for layer in layers
        ]
        self.num_tokens, self.first_token = num_tokens, first_token
        self.stretches = Stretches(
            self.layout,
            (self.local, self.local_regions),
            self.remote_regions,
            first_token,
            num_tokens,
        )

    def tables(
        self, num_blocks: int | None = None, start: int = 0, shift: int = 0
    ) -> tuple[wire.TableSlice, ...]:
        """A slice of each block table; ``shift`` makes them those of another epoch."""
        return tuple(
            wire.TableSlice(start, tuple(block + shift for block in table[start:num_blocks]))
            for table in self.remote
        )

    def progress(
        self, base: int, tokens: int, layers: int, epoch: int = 0, shift: int = 0
    ) -> wire.Progress:
        """Progress with whole block tables, as long as ``tokens`` need."""
        tables = self.tables(-(-tokens // T), shift=shift)
        return wire.Progress(H, epoch, base, tokens, layers, tables)

    def seal(self, epoch: int = 0, num_tokens: int | None = None) -> wire.Seal:
        tokens = self.num_tokens if num_tokens is None else num_tokens
        return wire.Seal(H, epoch, tokens, self.tables())

    def taken(self) -> set[tuple[int, int]]:
        """Plan a stretch; return it as (layer by region, position in the block table)."""
        return set(places(self.plan()))

    def plan(self) -> ReadPlan | None:
        """Plan all that is final and was not planned before."""
        stretch = self.stretches.take()
        return None if stretch is None else self.stretches.plan(stretch)

    def everything(self) -> list[tuple[int, int]]:
        positions = [
            group.needed_blocks(self.first_token, self.num_tokens)
            for group in self.layout.groups
            for _ in group.layers
        ]
        local, remote = (self.local, self.local_regions), (self.remote, self.remote_regions)
        return places(plan_reads(self.layout.groups, local, remote, positions))


def places(plan: ReadPlan | None, shift: int = 0) -> list[tuple[int, int]]:
    """Which blocks a plan reads, as (layer by region, position), each checked on both sides."""
    if plan is None:
        return []
    found = []
    rows = zip(plan.local.tolist(), plan.remote.tolist(), plan.num_bytes.tolist(), strict=True)
    for local, remote, num_bytes in rows:
        assert num_bytes % BLOCK == 0
        for offset in range(0, num_bytes, BLOCK):
            layer, here = divmod(local + offset, 1_000_000)
            there = remote + offset - 500_000 - layer * 1_000_000
            position = here // BLOCK - 10
            assert there // BLOCK == 50 + position + shift, "the wrong block is read"
            found.append((layer, position))
    return sorted(found)


def blocks(layers: Sequence[int], positions: range) -> set[tuple[int, int]]:
    return {(layer, position) for layer in layers for position in positions}


# --- what is final ---------------------------------------------------------------------------


def test_nothing_is_read_before_anything_is_known() -> None:
    consumer = Consumer(FULL, 12)
    assert consumer.stretches.take() is None
    assert not consumer.stretches.is_exhausted
    assert consumer.stretches.taken_tokens == 0


def test_a_whole_chunk_is_read_in_every_layer() -> None:
    consumer = Consumer(FULL, 12)
    assert consumer.stretches.learn(consumer.progress(8, 8, 2))
    assert consumer.taken() == blocks([0, 1], range(2))
    assert consumer.stretches.take() is None
    assert consumer.stretches.taken_tokens == 8


def test_layers_that_are_written_are_read_before_the_others() -> None:
    consumer = Consumer(FULL, 12)
    consumer.stretches.learn(consumer.progress(4, 8, 1))
    assert consumer.taken() == blocks([0], range(2)) | blocks([1], range(1))
    assert consumer.stretches.taken_tokens == 4
    consumer.stretches.learn(consumer.progress(4, 8, 2))
    assert consumer.taken() == {(1, 1)}
    assert consumer.stretches.taken_tokens == 8


def test_groups_whose_layers_interleave_are_read_in_the_order_of_the_forward_pass() -> None:
    consumer = Consumer(INTERLEAVED, 8)
    # Regions 0 and 1 are layers 1 and 3 of the model, regions 2 and 3 layers 0 and 2.
    for num_layers, region in enumerate([2, 0, 3, 1], start=1):
        consumer.stretches.learn(consumer.progress(0, 8, num_layers))
        assert consumer.taken() == blocks([region], range(2))
    assert consumer.stretches.is_exhausted


def test_a_block_that_is_partly_filled_is_read_with_the_last_token_only() -> None:
    consumer = Consumer(FULL, 10)
    consumer.stretches.learn(consumer.progress(9, 9, 2))
    assert consumer.taken() == blocks([0, 1], range(2))
    assert not consumer.stretches.is_exhausted
    consumer.stretches.learn(consumer.progress(9, 10, 1))
    assert consumer.taken() == {(0, 2)}
    consumer.stretches.learn(consumer.progress(10, 10, 2))
    assert consumer.taken() == {(1, 2)}
    assert consumer.stretches.is_exhausted


def test_a_chunk_that_ends_inside_a_block_leaves_that_block_for_later() -> None:
    consumer = Consumer(FULL, 12)
    consumer.stretches.learn(consumer.progress(6, 6, 2))
    assert consumer.taken() == blocks([0, 1], range(1))
    assert consumer.stretches.taken_tokens == 4


def test_a_seal_makes_everything_final() -> None:
    consumer = Consumer(FULL, 10)
    assert consumer.stretches.learn(consumer.seal())
    assert consumer.taken() == blocks([0, 1], range(3))
    assert consumer.stretches.is_exhausted
    assert consumer.stretches.taken_tokens == 10


def test_only_the_missing_suffix_is_read() -> None:
    consumer = Consumer(FULL, 12, first_token=8)
    consumer.stretches.learn(consumer.progress(8, 8, 2))
    assert consumer.stretches.take() is None
    assert consumer.stretches.taken_tokens == 8
    consumer.stretches.learn(consumer.seal())
    assert consumer.taken() == blocks([0, 1], range(2, 3))


def test_nothing_is_read_when_nothing_is_missing() -> None:
    consumer = Consumer(FULL, 8, first_token=8)
    assert consumer.stretches.is_exhausted
    consumer.stretches.learn(consumer.seal())
    assert consumer.stretches.take() is None


def test_what_is_announced_before_it_is_taken_gathers_into_one_plan() -> None:
    consumer = Consumer(FULL, 12)
    for tokens in (4, 8):
        consumer.stretches.learn(consumer.progress(tokens, tokens, 2))
    assert consumer.taken() == blocks([0, 1], range(2))


def test_what_is_final_is_counted_whether_or_not_it_was_taken() -> None:
    consumer = Consumer(FULL, 16, first_token=4)
    assert consumer.stretches.final_bytes == 0
    consumer.stretches.learn(consumer.progress(4, 8, 1))
    assert consumer.stretches.final_bytes == BLOCK
    consumer.stretches.take()
    assert consumer.stretches.final_bytes == BLOCK
    consumer.stretches.learn(consumer.seal())
    assert consumer.stretches.final_bytes == 2 * 3 * BLOCK
    consumer.stretches.learn(wire.Progress(H, 1, 0, 0, 0, consumer.tables(0)))
    assert consumer.stretches.final_bytes == 0


# --- sliding windows -------------------------------------------------------------------------


def test_a_window_is_read_for_the_end_of_the_prompt_only() -> None:
    consumer = Consumer(WINDOWED, 16)
    consumer.stretches.learn(consumer.progress(8, 8, 2))
    assert consumer.taken() == blocks([0], range(2))
    consumer.stretches.learn(consumer.progress(12, 12, 2))
    assert consumer.taken() == {(0, 2), (1, 2)}  # token 15 looks back on 10 to 15
    consumer.stretches.learn(consumer.seal())
    assert consumer.taken() == {(0, 3), (1, 3)}


def test_with_a_window_there_is_no_usable_prefix_before_everything_is_there() -> None:
    consumer = Consumer(WINDOWED, 16, first_token=4)
    consumer.stretches.learn(consumer.progress(12, 12, 2))
    consumer.stretches.take()
    assert consumer.stretches.taken_tokens == 4
    consumer.stretches.learn(consumer.seal())
    consumer.stretches.take()
    assert consumer.stretches.taken_tokens == 16


def test_blocks_that_have_left_the_window_may_be_gone() -> None:
    consumer = Consumer(WINDOWED, 16)
    tables = (consumer.tables()[0], wire.TableSlice(0, (0, 0, 52, 53)))
    consumer.stretches.learn(wire.Seal(H, 0, 16, tables))
    assert consumer.taken() == blocks([0], range(4)) | blocks([1], range(2, 4))


def test_a_block_in_the_window_that_is_gone_is_refused() -> None:
    consumer = Consumer(WINDOWED, 16)
    tables = (consumer.tables()[0], wire.TableSlice(0, (0, 0, 0, 53)))
    consumer.stretches.learn(wire.Seal(H, 0, 16, tables))
    with pytest.raises(HandoffError, match="remote KV cache group 1 no longer holds") as caught:
        consumer.plan()
    assert caught.value.reason is Reason.MISSING_BLOCKS


# --- block tables ----------------------------------------------------------------------------


def test_block_tables_grow_by_what_each_message_adds() -> None:
    consumer = Consumer(FULL, 12)
    assert consumer.stretches.learn(wire.Progress(H, 0, 4, 4, 2, consumer.tables(1)))
    assert consumer.stretches.learn(wire.Progress(H, 0, 8, 8, 2, consumer.tables(2, start=1)))
    assert consumer.stretches.learn(wire.Seal(H, 0, 12, consumer.tables(start=2)))
    assert consumer.taken() == blocks([0, 1], range(3))


def test_a_gap_in_a_block_table_is_noticed_and_teaches_nothing() -> None:
    consumer = Consumer(FULL, 12)
    consumer.stretches.learn(consumer.progress(4, 4, 2))
    assert not consumer.stretches.learn(wire.Seal(H, 0, 12, consumer.tables(start=2)))
    assert consumer.taken() == blocks([0, 1], range(1))
    assert consumer.stretches.learn(consumer.seal())
    assert consumer.taken() == blocks([0, 1], range(1, 3))


def test_a_gap_in_one_of_several_tables_changes_none() -> None:
    consumer = Consumer(INTERLEAVED, 8)
    tables = (wire.TableSlice(0, (98, 98)), wire.TableSlice(1, (51,)))
    assert not consumer.stretches.learn(wire.Progress(H, 0, 8, 8, 4, tables))
    assert consumer.stretches.learn(consumer.seal())
    assert consumer.taken() == blocks(range(4), range(2))


def test_a_new_epoch_that_begins_with_a_gap_still_voids_what_was_before() -> None:
    consumer = Consumer(FULL, 12)
    consumer.stretches.learn(consumer.progress(8, 8, 2))
    consumer.stretches.take()
    later = wire.Progress(H, 1, 8, 8, 2, consumer.tables(start=1))
    assert not consumer.stretches.learn(later)
    assert consumer.stretches.epoch == 1
    assert consumer.stretches.taken_tokens == 0


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_block_tables_is_refused(count: int) -> None:
    consumer = Consumer(INTERLEAVED, 8)
    tables = (wire.TableSlice(0, (50, 51)),) * count
    with pytest.raises(HandoffError, match=f"sent {count} block tables, 2 are needed") as caught:
        consumer.stretches.learn(wire.Seal(H, 0, 8, tables))
    assert caught.value.reason is Reason.MISSING_BLOCKS


def test_a_block_table_that_is_shorter_than_its_tokens_is_refused() -> None:
    consumer = Consumer(FULL, 12)
    consumer.stretches.learn(wire.Seal(H, 0, 12, consumer.tables(2)))
    with pytest.raises(HandoffError, match="has 2 blocks, 3 are needed"):
        consumer.plan()


def test_a_seal_of_fewer_tokens_than_were_offered_is_refused() -> None:
    consumer = Consumer(FULL, 12)
    with pytest.raises(HandoffError, match="sealed with 11 tokens, offered 12") as caught:
        consumer.stretches.learn(consumer.seal(num_tokens=11))
    assert caught.value.reason is Reason.MISSING_BLOCKS


def test_more_tokens_than_were_offered_do_no_harm() -> None:
    consumer = Consumer(FULL, 10)
    consumer.stretches.learn(wire.Progress(H, 0, 400, 500, 2, consumer.tables()))
    assert consumer.taken() == blocks([0, 1], range(3))
    assert consumer.stretches.is_exhausted
    assert consumer.stretches.taken_tokens == 10


# --- epochs and messages out of turn ---------------------------------------------------------


def test_a_newer_epoch_voids_everything() -> None:
    consumer = Consumer(FULL, 12)
    consumer.stretches.learn(consumer.seal())
    consumer.stretches.take()
    assert consumer.stretches.is_exhausted
    void = wire.Progress(H, 1, 0, 0, 0, (wire.TableSlice(0, ()),))
    assert consumer.stretches.learn(void)
    assert not consumer.stretches.is_exhausted
    assert consumer.stretches.taken_tokens == 0
    assert consumer.stretches.take() is None
    consumer.stretches.learn(consumer.progress(12, 12, 2, epoch=1, shift=7))
    plan = consumer.plan()
    assert set(places(plan, shift=7)) == blocks([0, 1], range(3))


def test_an_older_epoch_is_ignored() -> None:
    consumer = Consumer(FULL, 12)
    consumer.stretches.learn(consumer.progress(4, 4, 2, epoch=2, shift=7))
    assert consumer.stretches.learn(consumer.progress(12, 12, 2, epoch=1))
    assert consumer.stretches.learn(consumer.seal(epoch=0))
    assert consumer.stretches.learn(consumer.seal(epoch=0, num_tokens=3))
    assert consumer.stretches.epoch == 2
    plan = consumer.plan()
    assert set(places(plan, shift=7)) == blocks([0, 1], range(1))


def test_a_message_that_comes_twice_counts_once() -> None:
    consumer = Consumer(FULL, 12)
    for _ in range(2):
        assert consumer.stretches.learn(consumer.progress(8, 8, 2))
    assert consumer.taken() == blocks([0, 1], range(2))
    assert consumer.stretches.learn(consumer.progress(8, 8, 2))
    assert consumer.stretches.take() is None


def test_an_earlier_message_that_comes_late_takes_nothing_back() -> None:
    consumer = Consumer(FULL, 12)
    consumer.stretches.learn(consumer.progress(8, 8, 2))
    assert consumer.stretches.learn(consumer.progress(4, 4, 1))
    assert consumer.taken() == blocks([0, 1], range(2))
    assert consumer.stretches.learn(wire.Seal(H, 0, 12, consumer.tables(start=2)))
    assert consumer.taken() == blocks([0, 1], range(2, 3))


# --- whatever the order ----------------------------------------------------------------------

GROUPS = [FULL, INTERLEAVED, WINDOWED, [sliding_group(3, "layers.2"), full_group("layers.0")]]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_stretches_of_an_epoch_are_together_exactly_what_one_read_would_be(
    data: st.DataObject,
) -> None:
    num_tokens = data.draw(st.integers(1, 30), label="num_tokens")
    first_token = data.draw(st.integers(0, num_tokens - 1), label="first_token")
    consumer = Consumer(data.draw(st.sampled_from(GROUPS)), num_tokens, first_token)
    num_layers = len(consumer.layout.layers)
    stretches, epoch, read = consumer.stretches, 0, list[tuple[int, int]]()
    said: list[wire.Progress | wire.Seal] = []

    def hear(message: wire.Progress | wire.Seal) -> None:
        before = stretches.epoch, stretches.taken_tokens
        assert stretches.learn(message)
        assert stretches.epoch == max(before[0], message.epoch)
        if stretches.epoch > before[0]:
            read.clear()
        else:
            assert stretches.taken_tokens == before[1]
        said.append(message)

    def take() -> None:
        read.extend(places(consumer.plan(), shift=stretches.epoch))
        prefix = stretches.taken_tokens
        if prefix > first_token:
            wanted = {(layer, i) for layer, i in consumer.everything() if i * T < prefix}
            assert wanted <= set(read), "a prefix is claimed that has not been read"

    base = tokens = layers = told = 0
    event = st.sampled_from(["chunk", "layers", "layers", "take", "again", "preempt"])
    for what in data.draw(st.lists(event, max_size=20), label="events"):
        if what == "chunk" and layers == num_layers:
            tokens, layers = min(num_tokens, tokens + data.draw(st.integers(1, 12))), 0
        elif what == "layers":
            tokens = tokens or data.draw(st.integers(1, num_tokens))
            layers = data.draw(st.integers(layers, num_layers))
            base = tokens if layers == num_layers else base
            start = data.draw(st.integers(0, told))
            told = -(-tokens // T)
            tables = consumer.tables(told, start, epoch)
            hear(wire.Progress(H, epoch, base, tokens, layers, tables))
        elif what == "take":
            take()
        elif what == "again" and said:
            hear(data.draw(st.sampled_from(said)))
        elif what == "preempt":
            epoch += 1
            base = tokens = layers = told = 0
            hear(wire.Progress(H, epoch, 0, 0, 0, consumer.tables(0)))
    hear(wire.Seal(H, epoch, num_tokens, consumer.tables(shift=epoch)))
    take()
    assert sorted(read) == consumer.everything(), "not each byte once"
    assert stretches.is_exhausted
    assert stretches.taken_tokens == num_tokens
    assert stretches.take() is None

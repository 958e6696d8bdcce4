"""What a consumer reads while the producer computes: what is final, and not read before."""

from __future__ import annotations

import pytest

from tests.fakes.producer import progress
from tests.fakes.stretches import BLOCK, FULL, INTERLEAVED, WINDOWED, Consumer, H, blocks, places
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.protocol import wire

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
    consumer.stretches.learn(progress(H, 1, 0, 0, 0, consumer.tables(0)))
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
    assert consumer.stretches.taken_tokens == 0  # the window of tokens 0 to 3 has no blocks
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
    with pytest.raises(HandoffError, match="the peer's block table no longer holds") as caught:
        consumer.plan()
    assert caught.value.reason is Reason.MISSING_BLOCKS


# --- block tables ----------------------------------------------------------------------------


def test_block_tables_grow_by_what_each_message_adds() -> None:
    consumer = Consumer(FULL, 12)
    assert consumer.stretches.learn(progress(H, 0, 4, 4, 2, consumer.tables(1)))
    assert consumer.stretches.learn(progress(H, 0, 8, 8, 2, consumer.tables(2, start=1)))
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
    assert not consumer.stretches.learn(progress(H, 0, 8, 8, 4, tables))
    assert consumer.stretches.learn(consumer.seal())
    assert consumer.taken() == blocks(range(4), range(2))


def test_a_new_epoch_that_begins_with_a_gap_still_voids_what_was_before() -> None:
    consumer = Consumer(FULL, 12)
    consumer.stretches.learn(consumer.progress(8, 8, 2))
    consumer.stretches.take()
    later = progress(H, 1, 8, 8, 2, consumer.tables(start=1))
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
    consumer.stretches.learn(progress(H, 0, 400, 500, 2, consumer.tables()))
    assert consumer.taken() == blocks([0, 1], range(3))
    assert consumer.stretches.is_exhausted
    assert consumer.stretches.taken_tokens == 10


# --- epochs and messages out of turn ---------------------------------------------------------


def test_a_newer_epoch_voids_everything() -> None:
    consumer = Consumer(FULL, 12)
    consumer.stretches.learn(consumer.seal())
    consumer.stretches.take()
    assert consumer.stretches.is_exhausted
    void = progress(H, 1, 0, 0, 0, (wire.TableSlice(0, ()),))
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


# --- in parts that are quickly planned ---------------------------------------------------------


@pytest.mark.parametrize("max_blocks", [1, 2, 3, 5, 7, 100])
def test_the_parts_of_a_stretch_have_all_of_it_once(max_blocks: int) -> None:
    stretch = (range(2, 7), range(0), range(1, 2), range(0, 4))
    parts = Consumer(FULL, 12).stretches.cut(stretch, max_blocks)
    assert all(0 < sum(map(len, part)) <= max_blocks for part in parts)
    for layer, positions in enumerate(stretch):
        assert [i for part in parts for i in part[layer]] == list(positions)
    if max_blocks >= 10:
        assert parts == [stretch]

"""The producer's table: which reads are vouched for."""

from __future__ import annotations

import pytest

from tests.fakes.engines import full_group, make_layout, sliding_group
from tests.fakes.producer import (
    BLOCKS,
    LAYERS,
    NO_BLOCKS,
    RANK_0,
    RANK_1,
    SCHEDULER,
    SEAL_TABLES,
    TOKENS,
    Producer,
    granted,
    progress,
)
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.export_states import ExportState


def test_a_commit_releases_the_blocks(producer: Producer) -> None:
    handoff = producer.sealed("mine")
    assert producer.commit(handoff) == granted(handoff)
    assert producer.released == [("mine", ExportState.COMMITTED)]
    assert len(producer.table) == 0


def test_a_commit_needs_all_ranks() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.sealed()
    assert producer.commit(handoff, 1) == granted(handoff)
    assert producer.released == []
    assert producer.commit(handoff, 0) == granted(handoff)
    assert producer.released == [("r", ExportState.COMMITTED)]


def test_a_rank_that_does_not_exist_is_refused(producer: Producer) -> None:
    handoff = producer.sealed()
    refusal = wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    assert producer.subscribe(handoff, 1, RANK_1) == refusal
    assert producer.answering.commit(wire.Commit(handoff, 0, 1, True)) == refusal
    assert producer.released == []


def test_one_rank_that_commits_twice_counts_once() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.sealed()
    producer.commit(handoff, 1)
    assert producer.commit(handoff, 1) == granted(handoff)
    assert producer.released == []


def test_a_commit_before_all_is_computed_is_refused_and_changes_nothing(
    producer: Producer,
) -> None:
    handoff = producer.open()
    refusal = wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    assert producer.commit(handoff) == refusal
    producer.compute(handoff, TOKENS - 1)
    assert producer.commit(handoff) == refusal
    step = producer.advance(handoff, TOKENS)
    producer.table.announce(step, 0, LAYERS - 1)
    assert producer.commit(handoff) == refusal
    assert isinstance(producer.answering.want(handoff, SCHEDULER), wire.Offer)
    producer.table.announce(step, 0, LAYERS)
    assert producer.commit(handoff) == granted(handoff)


def test_a_commit_before_the_seal_frees_the_blocks_at_the_seal(producer: Producer) -> None:
    handoff = producer.open()
    producer.compute(handoff, TOKENS)
    assert producer.commit(handoff) == granted(handoff)
    assert producer.released == []
    assert producer.abandoned == []  # its request may still have something to say
    assert producer.table.seal(handoff, "r", TOKENS, BLOCKS) == []
    assert producer.released == [("r", ExportState.COMMITTED)]
    assert len(producer.table) == 0


def test_a_commit_before_the_seal_is_granted_only_to_ranks_whose_kv_is_complete() -> None:
    producer = Producer(num_ranks=2)
    handoff = producer.open()
    step = producer.advance(handoff, TOKENS)
    producer.table.announce(step, 1, LAYERS)
    refusal = wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    assert producer.commit(handoff, 0) == refusal
    assert producer.commit(handoff, 1) == granted(handoff)
    producer.table.announce(step, 0, LAYERS)
    assert producer.commit(handoff, 0) == granted(handoff)


def test_what_was_complete_before_a_withdrawal_is_not_complete_after_it(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.compute(handoff, TOKENS)
    producer.table.withdraw(handoff, 1)
    assert producer.commit(handoff, epoch=1) == wire.Refuse(handoff, Reason.MISSING_BLOCKS)


@pytest.mark.parametrize("is_last", [True, False])
def test_a_commit_of_an_earlier_epoch_is_told_how_things_stand_and_never_granted(
    producer: Producer, is_last: bool
) -> None:
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    producer.compute(handoff, TOKENS)
    producer.table.withdraw(handoff, 1)
    void = progress(handoff, 1, 0, 0, 0, NO_BLOCKS)
    assert producer.commit(handoff, is_last=is_last) == void
    producer.compute(handoff, TOKENS, epoch=1)
    state = progress(handoff, 1, TOKENS, TOKENS, LAYERS, SEAL_TABLES)
    assert producer.commit(handoff, is_last=is_last) == state
    producer.table.seal(handoff, "r", TOKENS, BLOCKS)
    assert producer.commit(handoff, is_last=is_last) == wire.Seal(handoff, 1, TOKENS, SEAL_TABLES)
    assert producer.released == []
    assert producer.commit(handoff, epoch=1) == granted(handoff, epoch=1)


def test_a_commit_of_another_epoch_by_somebody_unknown_is_refused(producer: Producer) -> None:
    handoff = producer.sealed()
    refusal = wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    assert producer.answering.commit(wire.Commit(handoff, 1, 0, True)) == refusal
    assert producer.released == []


def test_a_commit_by_somebody_unknown_is_refused(producer: Producer) -> None:
    """Who has not subscribed has been told of no blocks that it could have read."""
    handoff = producer.sealed()
    refusal = wire.Refuse(handoff, Reason.MISSING_BLOCKS)
    assert producer.answering.commit(wire.Commit(handoff, 0, 0, True)) == refusal
    assert producer.released == []


def test_what_arrived_so_far_is_vouched_for_while_the_rest_is_computed(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.compute(handoff, 40)
    assert producer.commit(handoff, is_last=False) == granted(handoff, is_last=False)
    assert producer.commit(handoff, is_last=False) == granted(handoff, is_last=False)
    producer.table.seal(handoff, "r", TOKENS, BLOCKS)
    assert producer.commit(handoff, is_last=False) == granted(handoff, is_last=False)
    assert producer.released == []  # the consumer still reads
    assert producer.commit(handoff) == granted(handoff)


@pytest.mark.parametrize("how", ["drop", "cancel", "expire", "expire sealed"])
def test_nothing_is_vouched_for_once_the_blocks_may_be_gone(producer: Producer, how: str) -> None:
    handoff = producer.wanted()
    producer.compute(handoff, 40)
    if how == "drop":
        producer.table.drop(handoff)
    elif how == "cancel":
        producer.answering.cancel(handoff)
    else:
        if how == "expire sealed":
            producer.table.seal(handoff, "r", TOKENS, BLOCKS)
        producer.expire()
    expired = how.startswith("expire")
    refusal = wire.Refuse(handoff, Reason.LEASE_EXPIRED if expired else Reason.CANCELLED)
    assert producer.commit(handoff, is_last=False) == refusal
    assert producer.commit(handoff) == refusal


# A sliding window moves on while the producer computes answers, and lets go of the prompt's blocks.
def test_a_block_that_the_request_has_let_go_of_since_is_never_vouched_for(
    producer: Producer,
) -> None:
    handoff = producer.open()
    producer.subscribe(handoff, 0, RANK_0)
    producer.compute(handoff, TOKENS, ([1, 2, 3], [4]))
    assert producer.table.seal(handoff, "r", TOKENS, ([0, 0, 3, 5], [4])) == []
    assert producer.commit(handoff) == wire.Refuse(handoff, Reason.CANCELLED)


def windowed() -> Producer:
    """A producer of full attention and a window, which needs blocks 23 and 24 of 25 at the end."""
    groups = [full_group("layer.0", "layer.2"), sliding_group(6, "layer.1")]
    return Producer(layout=make_layout(groups=groups))


def test_a_window_that_moves_on_while_answers_are_computed_ends_the_handoff() -> None:
    producer = windowed()
    handoff = producer.wanted()
    prompt, window = list(range(1, 26)), [*[0] * 23, 31, 32]
    producer.compute(handoff, TOKENS, (prompt, window))
    moved = [*[0] * 24, 32, 33]
    producer.advance(handoff, TOKENS, ([*prompt, 26], moved))
    assert producer.commit(handoff) == wire.Refuse(handoff, Reason.CANCELLED)
    assert producer.commit(handoff, is_last=False) == wire.Refuse(handoff, Reason.CANCELLED)
    assert producer.abandoned == []  # its answer is wanted all the same
    producer.table.seal(handoff, "r", TOKENS, ([*prompt, 26], moved))
    assert producer.released == [("r", ExportState.CANCELLED)]


def test_a_window_that_moves_on_inside_the_prompt_does_no_harm() -> None:
    producer = windowed()
    handoff = producer.wanted()
    prompt = list(range(1, 26))
    producer.compute(handoff, 80, (prompt[:20], [*[0] * 18, 41, 42]))
    producer.compute(handoff, TOKENS, (prompt, [*[0] * 23, 31, 32]))
    assert producer.commit(handoff) == granted(handoff)


def test_a_window_that_moves_on_after_the_commit_does_no_harm() -> None:
    producer = windowed()
    handoff = producer.wanted()
    prompt, window = list(range(1, 26)), [*[0] * 23, 31, 32]
    producer.compute(handoff, TOKENS, (prompt, window))
    assert producer.commit(handoff) == granted(handoff)
    producer.table.seal(handoff, "r", TOKENS, (prompt, [*[0] * 24, 32]))
    assert producer.released == [("r", ExportState.COMMITTED)]

"""Both state machines of both engines, in any order of events: a model of two schedulers, a
network that loses, doubles and delays, reads that hang and fail, and a producer that dies."""

from __future__ import annotations

import random
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.fakes.schedulers import (
    CONTROL_QUEUE_S,
    GIVEN_BACK,
    LEASE_S,
    PEER_S,
    TIMEOUTS,
    Schedulers,
)
from vllm_pd_plugin.packing.incoming import Packing

LONGEST_S = CONTROL_QUEUE_S + TIMEOUTS.queue_s + TIMEOUTS.read_s + TIMEOUTS.drain_s + LEASE_S
MAX_PROMPTS = 18
INDEX = st.integers(0, 999)


class AnyOrder(Schedulers, RuleBasedStateMachine):
    """What is usable is right, what was given back is not written to, and all ends in the end."""

    @rule(
        event=st.sampled_from(
            ["prompt"] * 8 + ["preempt"] * 4 + ["preempt unheard"] * 2 + ["abort at producer"] * 2
            + ["abort at consumer", "lose", "lose", "double", "late write", "failed read",
               "pass time", "pass time", "pass time", "restart"]
        ),
        index=INDEX,
        seed=st.integers(0, 2**16),
        num_moves=st.integers(0, 40),
        slow=st.sampled_from(["nothing"] * 6 + ["reads"] * 2 + ["network"]),
    )  # fmt: skip
    def happen(self, event: str, index: int, seed: int, num_moves: int, slow: str) -> None:
        """Something happens, and then all sides go on for a while, in any order."""
        in_flight, transport = self.cluster.network.in_flight, self.consumer.transport
        match event:
            case "prompt" if self.num_prompts < MAX_PROMPTS:
                self.send_prompt(index)
            case "preempt":
                self.preempt(index)
            case "preempt unheard":
                self.preempt(index)
                self.cluster.network.in_flight.clear()
            case "abort at producer":
                self.abort_at_producer(index)
            case "abort at consumer":
                self.abort_at_consumer(index)
            case "lose" if in_flight and index % 2:
                del in_flight[index % len(in_flight)]
            case "lose":
                in_flight.clear()
            case "double" if in_flight:
                in_flight.insert(index % len(in_flight), in_flight[index % len(in_flight)])
            case "late write":  # the reads do not end yet
                transport.write_late()
            case "failed read":
                transport.fail_reads()
            case "pass time":
                self.pass_time((0.3, 0.3, 1.0, PEER_S, LEASE_S, LEASE_S)[index % 6])
            case "restart":
                self.restart_producer()
        self.go_on(random.Random(seed), num_moves, slow)

    def go_on(self, chance: random.Random, num_moves: int, slow: str) -> None:
        """What all sides do while nothing goes wrong."""
        moves: list[Callable[[int], None]] = [
            self.prompt_reaches_producer, self.begin_step, self.write_layers, self.finish_prompt,
            self.allocate, self.wait, self.finish_coding,
        ]  # fmt: skip
        moves += [self.finish_read] * (slow != "reads") + [self.deliver_one] * 4 * (
            slow != "network"
        )
        for _ in range(num_moves):
            chance.choice(moves)(chance.randrange(1000))
        self.turn()

    @invariant()
    def usable_kv_is_that_of_its_prompt(self) -> None:
        for prompt, blocks, num_tokens in self.usable:
            assert self.consumer.holds_kv(prompt, blocks, num_tokens)

    @invariant()
    def nothing_writes_to_what_was_given_back(self) -> None:
        for blocks in self.given_back:
            assert self.consumer.holds(blocks[0], GIVEN_BACK)

    def teardown(self) -> None:
        """No more prompts; the producer ends what it computes, and time passes."""
        self.let_coders_finish()
        for computing in list(self.computing.values()):
            if computing.computed == computing.num_tokens:
                self.finish_prompt(list(self.computing.values()).index(computing))
            elif computing.name in self.computing:
                self._end(computing)
        for _ in range(round(LONGEST_S)):
            self.cluster.network.deliver()
            self.look()
            self.pass_time(1.0)
        for wanting in self.wanting.values():
            assert wanting.is_over, f"{wanting.name} waits for ever"
        assert self.held == {}, "blocks were never released"
        assert self.consumer.transport.reads == {}
        assert self.consumer.transport.unfinished == []
        assert self.consumer.transport.released_while_pending == 0
        for engine in (self.producer, self.consumer):
            assert set(engine.open_handoffs().values()) == {0}
        self.usable_kv_is_that_of_its_prompt()
        self.nothing_writes_to_what_was_given_back()


class AnyOrderWithDigests(AnyOrder):
    """The same with the option ``integrity``."""

    checks_bytes = True
    max_read_bytes = 64


class AnyOrderPacked(AnyOrder):
    """The same where the producer packs everything, and has little room for it; packing takes its
    time."""

    packing = Packing.ALWAYS
    codes_slowly = True


class AnyOrderPackedWithDigests(AnyOrderWithDigests):
    """The same where it packs what is faster packed."""

    packing = Packing.AUTO


# Without shrinking, which takes minutes and cannot shorten what comes from a seed.
for machine, examples in (
    (AnyOrder, 250),
    (AnyOrderWithDigests, 100),
    (AnyOrderPacked, 150),
    (AnyOrderPackedWithDigests, 100),
):
    machine.TestCase.settings = settings(
        max_examples=examples, stateful_step_count=30, deadline=None, phases=[Phase.generate]
    )
TestWhateverHappensWhatIsUsedIsRightAndEverythingEnds = AnyOrder.TestCase
TestWhateverHappensItHoldsWithDigestsToo = AnyOrderWithDigests.TestCase
TestWhateverHappensItHoldsOfPackedPiecesToo = AnyOrderPacked.TestCase
TestWhateverHappensItHoldsOfPackedPiecesWithDigestsToo = AnyOrderPackedWithDigests.TestCase


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "machine", [AnyOrder, AnyOrderWithDigests, AnyOrderPacked, AnyOrderPackedWithDigests]
)
def test_while_nothing_goes_wrong_every_fetch_succeeds(machine: type[AnyOrder], seed: int) -> None:
    """The machines above would be content with an implementation that fails every fetch."""
    world, chance = machine(), random.Random(seed)
    for index in range(12):
        world.send_prompt(index)
    for _ in range(400):
        world.go_on(chance, 10, "nothing")
        if len(world.usable) == 12 and not world.held and not world.computing:
            break
    assert [result.reason for result in world.consumer.results] == [None] * 12
    world.usable_kv_is_that_of_its_prompt()
    assert world.computing == {}
    assert world.held == {}

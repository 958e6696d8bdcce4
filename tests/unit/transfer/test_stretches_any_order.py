"""What a consumer reads while the producer computes, whatever it hears in whichever order."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from tests.fakes.engines import full_group, sliding_group
from tests.fakes.producer import progress
from tests.fakes.stretches import FULL, INTERLEAVED, WINDOWED, Consumer, H, T, places
from vllm_pd_plugin.protocol import wire

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
        if any(group.window is not None for group in consumer.layout.groups):
            assert prefix in (0, num_tokens), "a prefix whose window has no blocks"
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
            hear(progress(H, epoch, base, tokens, layers, tables))
        elif what == "take":
            take()
        elif what == "again" and said:
            hear(data.draw(st.sampled_from(said)))
        elif what == "preempt":
            epoch += 1
            base = tokens = layers = told = 0
            hear(progress(H, epoch, 0, 0, 0, consumer.tables(0)))
    hear(wire.Seal(H, epoch, num_tokens, consumer.tables(shift=epoch)))
    take()
    assert sorted(read) == consumer.everything(), "not each byte once"
    assert stretches.is_exhausted
    assert stretches.taken_tokens == num_tokens
    assert stretches.take() is None

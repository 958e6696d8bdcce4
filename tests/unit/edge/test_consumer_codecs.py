"""What a request's KV came through, as its consumer notes it for the prefix cache."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

from vllm_pd_plugin.codecs.codec import Codec, CodecChoice
from vllm_pd_plugin.errors import Reason

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.consumer import TOKENS, Consumer, new_source

INT8 = CodecChoice(Codec.INT8, Codec.INT2)


def noted_by(consumer: Consumer) -> list[Codec]:
    """Return what the prefix cache is told from now on."""
    noted: list[Codec] = []
    provenance: Any = SimpleNamespace(arrived=lambda _request, _token, codec: noted.append(codec))
    consumer.requests._provenance = provenance
    return noted


def test_the_codec_that_kv_came_through_is_noted() -> None:
    consumer = Consumer()
    noted = noted_by(consumer)
    for name, codec in (("r", Codec.INT4), ("s", Codec.RAW)):
        consumer.collect(consumer.fetching(name, new_source()), codec=codec)
    assert noted == [Codec.INT4]


def test_it_is_noted_of_what_is_kept_of_a_fetch_that_failed() -> None:
    """vLLM caches that much of it as any other."""
    consumer = Consumer(recomputes=True)
    noted = noted_by(consumer)
    for name, valid_tokens in (("r", 32), ("s", 0)):
        request = consumer.fetching(name, new_source())
        consumer.collect(request, Reason.PEER_UNREACHABLE, valid_tokens, codec=Codec.INT4)
    assert noted == [Codec.INT4]


def test_a_plain_prefix_that_was_evicted_and_fetched_through_the_codec_is_not_plain_any_more() -> (
    None
):
    """What follows it was found as int8's; vLLM looked again, and the prefix was gone."""
    consumer = Consumer()
    noted = noted_by(consumer)
    for name, plain_tokens in (("r", 16), ("s", 0)):
        request = consumer.fetching(name, new_source())  # from its first token on
        consuming = consumer.requests._open[name]
        consuming.lossy, consuming.plain_tokens = Codec.INT8, plain_tokens
        consumer.collect(request, codec=Codec.INT8)
    assert noted == [Codec.INT8]


def test_a_choice_that_follows_another_is_looked_up_again_by_the_codec_s_hashes() -> None:
    """vLLM has looked by the plain ones before it asks."""
    consumer, source = Consumer(), new_source()
    provenance: Any = SimpleNamespace(
        look_for=lambda _request, _choice: (Codec.INT8, 0), arrived=lambda *_: None
    )
    first, second = (consumer.add(name, source, codec=INT8) for name in ("0_r", "1_r"))
    consumer.requests._provenance = provenance
    consumer.offer(first)
    assert consumer.match(second) == (None, False)  # its leader is under way
    consumer.match(first)
    consumer.allocate(first, TOKENS)
    consumer.collect(first, codec=Codec.INT8)
    assert consumer.match(second) == (None, False)
    assert consumer.match(second) == (0, False)


def test_kv_of_a_narrower_codec_than_its_prefix_goes_by_a_hash_of_its_own() -> None:
    """Its prefix was found as int8's; who allows no more than that must not find int4's there."""
    consumer = Consumer()
    consumer.fetching("r", new_source())
    (consuming,) = consumer.requests._open.values()
    noted = noted_by(consumer)
    consuming.lossy = Codec.INT8
    for codec in (Codec.RAW, Codec.INT8, Codec.INT4, Codec.INT4, Codec.INT8):
        consuming.note_codec(consumer.requests._provenance, codec)
    assert noted == [Codec.INT4]

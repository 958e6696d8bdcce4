"""KV that came through a lossy codec, in vLLM's own prefix cache."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from vllm_pd_plugin.codecs.codec import Codec, CodecChoice

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
    )
    from vllm.v1.request import Request

    from vllm_pd_plugin.edge.provenance import Provenance

BLOCK = 16
PROMPT = list(range(100, 100 + 5 * BLOCK + 3))
RAW, INT8, INT2 = (CodecChoice(codec, Codec.INT2) for codec in (Codec.RAW, Codec.INT8, Codec.INT2))
AUTO = CodecChoice(None, Codec.INT2)


class Cache:
    """An engine's prefix cache, and requests that use it as vLLM's scheduler would."""

    def __init__(self) -> None:
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        config = KVCacheConfig(
            num_blocks=64,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        init_none_hash(sha256)
        self.manager = KVCacheManager(
            config,
            max_model_len=1024,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            enable_kv_cache_events=True,
        )
        self.provenance = Provenance(self.manager)
        self._hasher = get_request_block_hasher(BLOCK, sha256)

    def request(self, name: str, prompt: list[int] | None = None) -> Request:
        return Request(
            name, list(prompt or PROMPT), SamplingParams(max_tokens=8), None,
            block_hasher=self._hasher,
        )  # fmt: skip

    def found(self, request: Request) -> int:
        """How many of a request's first tokens are there."""
        _, num_tokens = self.manager.get_computed_blocks(request)[:2]
        return int(num_tokens)

    def compute(self, request: Request) -> int:
        """Allocate what is missing and take it for computed; return how much was there."""
        blocks, num_tokens = self.manager.get_computed_blocks(request)[:2]
        allocated = self.manager.allocate_slots(
            request,
            request.num_tokens - num_tokens,
            num_new_computed_tokens=num_tokens,
            new_computed_blocks=blocks,
        )
        assert allocated is not None
        return int(num_tokens)

    def fetch(self, request: Request, codec: Codec) -> int:
        """Fetch what is missing through a codec; return how much was there."""
        blocks, there = self.manager.get_computed_blocks(request)[:2]
        missing = request.num_tokens - there
        allocated = self.manager.allocate_slots(
            request,
            0,
            num_new_computed_tokens=there,
            new_computed_blocks=blocks,
            num_external_computed_tokens=missing,
            delay_cache_blocks=True,
        )
        assert allocated is not None
        if codec is not Codec.RAW:
            self.provenance.arrived(request, there, codec)
        self.manager.cache_blocks(request, request.num_tokens)
        return int(there)


@pytest.fixture
def cache() -> Cache:
    return Cache()


WHOLE = 5 * BLOCK


def test_what_came_as_it_is_is_found_by_everybody(cache: Cache) -> None:
    cache.fetch(cache.request("a"), Codec.RAW)
    assert cache.found(cache.request("b")) == WHOLE


def test_what_came_through_a_lossy_codec_is_not_found_by_its_tokens(cache: Cache) -> None:
    cache.fetch(cache.request("a"), Codec.INT2)
    assert cache.found(cache.request("b")) == 0


@pytest.mark.parametrize(
    ("choice", "codec", "found"),
    [
        (INT2, Codec.INT2, WHOLE),
        (INT2, Codec.INT8, WHOLE),
        (INT8, Codec.INT8, WHOLE),
        (INT8, Codec.INT2, 0),
        (AUTO, Codec.INT2, WHOLE),
        (RAW, Codec.INT8, 0),
    ],
)
def test_it_is_found_by_those_that_allow_its_codec(
    cache: Cache, choice: CodecChoice, codec: Codec, found: int
) -> None:
    cache.fetch(cache.request("a"), codec)
    request = cache.request("b")
    assert cache.provenance.look_for(request, choice)[0] is (codec if found else Codec.RAW)
    assert cache.found(request) == found


def test_what_is_more_there_as_it_is_is_used_as_it_is(cache: Cache) -> None:
    cache.fetch(cache.request("a", PROMPT[: 2 * BLOCK + 1]), Codec.INT8)
    cache.compute(cache.request("b"))
    request = cache.request("c")
    assert cache.provenance.look_for(request, INT8)[0] is Codec.RAW
    assert cache.found(request) == WHOLE


def test_only_what_came_through_it_goes_by_another_hash(cache: Cache) -> None:
    """A prefix that was there before stays what it is."""
    prefix = PROMPT[: 2 * BLOCK]
    cache.compute(cache.request("a", prefix))
    assert cache.fetch(cache.request("b"), Codec.INT4) == 2 * BLOCK
    assert cache.found(cache.request("c")) == 2 * BLOCK


def test_what_follows_a_plain_prefix_is_found_by_those_that_allow_its_codec(cache: Cache) -> None:
    """A system prompt that is there as it is, and turns that came through a codec."""
    cache.compute(cache.request("a", PROMPT[: 2 * BLOCK]))
    cache.fetch(cache.request("b"), Codec.INT4)
    for choice, told, found in (
        (INT2, (Codec.INT4, 2 * BLOCK), WHOLE),
        (INT8, (Codec.RAW, 0), 2 * BLOCK),
    ):
        request = cache.request("c")
        assert cache.provenance.look_for(request, choice) == told
        assert cache.found(request) == found


def test_what_nobody_knows_the_codec_of_is_found_by_nobody(cache: Cache) -> None:
    request = cache.request("a")
    cache.provenance.disown(request)
    cache.fetch(request, Codec.RAW)
    for choice in (RAW, INT2, AUTO):
        again = cache.request("b")
        cache.provenance.look_for(again, choice)
        assert cache.found(again) == 0


def test_what_nobody_knows_has_a_hash_for_each_block_where_hashing_it_has_failed(
    cache: Cache,
) -> None:
    """vLLM counts on as many."""
    request = cache.request("a")
    del request.block_hashes[1:]
    cache.provenance.disown(request)
    assert len(set(request.block_hashes)) == len(PROMPT) // BLOCK


def test_looking_for_it_leaves_a_request_s_hashes_as_they_were_where_that_fails(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = cache.request("a")
    before = list(request.block_hashes)
    monkeypatch.setattr(request, "update_block_hashes", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.provenance.look_for(request, INT8)
    assert (request.block_hashes, request.cache_salt) == (before, None)


def test_a_prompt_of_less_than_a_block_becomes_a_block_of_its_own(cache: Cache) -> None:
    """With tokens of its answer; another's prompt may begin with these."""
    short = PROMPT[: BLOCK - 5]
    request = cache.request("a", short)
    cache.fetch(request, Codec.INT2)
    answer = list(range(900, 900 + BLOCK))
    request.num_computed_tokens = len(short)
    request.append_output_token_ids(answer)
    assert cache.manager.allocate_slots(request, len(answer)) is not None
    turn = [*short, *answer, 7]
    assert cache.found(cache.request("b", turn)) == 0
    again = cache.request("c", turn)
    assert cache.provenance.look_for(again, INT2) == (Codec.INT2, 0)
    assert cache.found(again) == BLOCK


def test_what_is_computed_on_top_of_it_goes_with_it(cache: Cache) -> None:
    first = cache.request("a")
    cache.fetch(first, Codec.INT4)
    answer = list(range(900, 900 + 2 * BLOCK))
    first.num_computed_tokens = len(PROMPT)
    first.append_output_token_ids(answer)
    assert cache.manager.allocate_slots(first, len(answer)) is not None
    turn = [*PROMPT, *answer, 7]
    assert cache.found(cache.request("b", turn)) == 0
    request = cache.request("c", turn)
    assert cache.provenance.look_for(request, INT2)[0] is Codec.INT4
    assert cache.found(request) == len(turn) // BLOCK * BLOCK


def test_it_stays_apart_by_salt(cache: Cache) -> None:
    mine, others = cache.request("a"), cache.request("b")
    for request, salt in ((mine, "mine"), (others, "others")):
        request.cache_salt = salt
        request.block_hashes.clear()
        request.update_block_hashes()
    cache.fetch(mine, Codec.INT8)
    assert cache.provenance.look_for(others, INT8)[0] is Codec.RAW
    assert cache.found(others) == 0
    assert others.cache_salt == "others"


def test_nobody_is_told_of_it_as_of_plain_text(cache: Cache) -> None:
    """A frontend goes by a block's extra keys, and by whether it knows what a block follows."""
    known: set[Any] = set()
    prefix = PROMPT[: 2 * BLOCK]
    cache.compute(cache.request("a", prefix))
    cache.fetch(cache.request("b"), Codec.INT4)
    cache.fetch(cache.request("c", [5, *PROMPT]), Codec.INT4)
    plain = []
    for event in cache.manager.take_events():
        follows = event.parent_block_hash is None or event.parent_block_hash in known
        if follows and not any(event.extra_keys or ()):
            known.update(event.block_hashes)
            plain += event.token_ids
    assert plain == prefix


def test_without_a_prefix_cache_there_is_nothing_to_do() -> None:
    cache = Cache()
    request = Request("a", list(PROMPT), SamplingParams(max_tokens=8), None)
    assert cache.provenance.look_for(request, INT8)[0] is Codec.RAW
    cache.provenance.arrived(request, 0, Codec.INT8)
    assert request.cache_salt is None

"""How KV came to be, kept apart in vLLM's prefix cache.

vLLM finds a block by the tokens up to its end. KV that came through a lossy codec is not what these
tokens give: it goes by another hash, which is found only by requests that allow that codec. What is
computed on top of such KV goes by hashes that follow from it, and so on with it. So it is never
found by a request that did not allow it, and never handed on: requests that hand off look for
ordinary hashes only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_pd_plugin.codecs.codec import Codec, CodecChoice

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

_SALT = "vllm-pd-plugin:"


class Provenance:
    """The hashes of requests, in one engine's prefix cache. Owned by the engine's own thread."""

    def __init__(self, kv_cache_manager: KVCacheManager) -> None:
        self._pool = kv_cache_manager.block_pool
        self._groups = list(range(kv_cache_manager.num_kv_cache_groups))

    def look_for(self, request: Request, choice: CodecChoice) -> tuple[Codec, int]:
        """Let a request that allows lossy codecs find what came through one of them, where more of
        its prompt is there that way: all of it, or what follows a plain prefix. Returns the codec,
        and of how many tokens the hashes are plain before those that tell of it.

        To be called before vLLM looks for its prefix."""
        allowed = _allowed(choice)
        if not allowed or not request.block_hashes:
            return Codec.RAW, 0
        plain_salt, plain = request.cache_salt, list(request.block_hashes)
        num_plain = found = self._num_cached(plain)
        best, best_salt, told = plain, plain_salt, (Codec.RAW, 0)
        try:
            for codec in allowed:
                for num_kept in sorted({0, num_plain}):
                    _rehash(request, num_kept, codec, plain_salt)
                    # What was kept is there by its own hash; only what follows goes by another.
                    request.block_hashes[:num_kept] = plain[:num_kept]
                    if (num_cached := self._num_cached(request.block_hashes)) > found:
                        best, best_salt = list(request.block_hashes), request.cache_salt
                        told, found = (codec, num_kept * self._pool.hash_block_size), num_cached
                    request.block_hashes[:], request.cache_salt = plain, plain_salt
        finally:
            request.block_hashes[:], request.cache_salt = best, best_salt
        return told

    def arrived(self, request: Request, first_token: int, codec: Codec) -> None:
        """A request's KV from ``first_token`` on came through a lossy codec.

        To be called before vLLM caches it. A prompt of less than a block has no hash yet: the one
        that it gets, with tokens of its answer, tells of the codec too."""
        if request._block_hasher is not None:
            block_tokens = self._pool.hash_block_size
            _rehash(request, first_token // block_tokens, codec, request.cache_salt)

    def disown(self, request: Request) -> None:
        """It is not known what a request's KV is: let nobody find what vLLM caches of it."""
        if request._block_hasher is None:
            return
        request.cache_salt = f"{_SALT}{os.urandom(16).hex()}"
        # As many as vLLM counts on, also where hashing them anew has just failed.
        num_blocks = request.num_tokens // self._pool.hash_block_size
        hashes: Any = [os.urandom(32) for _ in range(num_blocks)]
        request.block_hashes[:] = hashes

    def _num_cached(self, hashes: Sequence[Any]) -> int:
        """Return how many leading blocks are there."""
        for place, block_hash in enumerate(hashes):
            if self._pool.get_cached_block(block_hash, self._groups) is None:
                return place
        return len(hashes)


def _allowed(choice: CodecChoice) -> list[Codec]:
    narrowest = choice.narrowest if choice.codec is None else choice.codec
    return [codec for codec in Codec if 0 < codec.rank <= narrowest.rank]


def _rehash(request: Request, num_kept: int, codec: Codec, salt: str | None) -> None:
    """Give a request's blocks after the first ``num_kept`` hashes of their own.

    These follow from the hash before them, which becomes another: vLLM has cached that block
    already, and whoever is told of new blocks does not know what they follow.
    """
    hashes = request.block_hashes
    if num_kept:
        before: bytes = hashes[num_kept - 1]
        mark = hashlib.blake2b(codec.encode(), key=before[:64], digest_size=len(before))
        hashes[num_kept - 1] = type(before)(mark.digest())
    else:
        request.cache_salt = f"{salt or ''}{_SALT}{codec}"
    del hashes[num_kept:]
    request.update_block_hashes()

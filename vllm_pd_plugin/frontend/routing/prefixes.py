"""What the engines have in their prefix caches, as their KV events say; pure.

An engine names a block by a hash of its own. Here a block is named by its tokens and the block
before it, so that what engines say can be compared with a prompt, and with each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_pd_plugin.engine_port.messages import BlockHash, Blocks, Cleared, Removed, Stored
from vllm_pd_plugin.frontend.routing.choice import EngineKey

_Name = int
_ROOT: _Name = 0


class PrefixIndex:
    """The prefix cache of each engine."""

    def __init__(self) -> None:
        self._caches: dict[EngineKey, _Cache] = {}

    def change(self, engine: EngineKey, blocks: Blocks) -> None:
        """Take in what an engine says of its cache."""
        cache = self._caches.setdefault(engine, _Cache())
        for change in blocks.changes:
            match change:
                case Stored():
                    cache.store(change)
                case Removed(hashes):
                    cache.remove(hashes)
                case Cleared():
                    self._caches[engine] = cache = _Cache()

    def forget(self, engine: EngineKey) -> None:
        """An engine is gone, or another one runs in its place."""
        self._caches.pop(engine, None)

    def cached(self, prompt: Sequence[int]) -> dict[EngineKey, int]:
        """Return how many of a prompt's first tokens each engine has, whole blocks only."""
        chains: dict[int, list[_Name]] = {}
        result = {}
        for engine, cache in self._caches.items():
            size = cache.block_tokens
            if size and size not in chains:
                chains[size] = _names(prompt, size)
            if size and (tokens := size * cache.leading(chains[size])):
                result[engine] = tokens
        return result


class _Cache:
    """One engine's. names: of each block hash; count: how many hashes have a name."""

    def __init__(self) -> None:
        self.block_tokens = 0
        self._names: dict[BlockHash, _Name] = {}
        self._count: dict[_Name, int] = {}

    def store(self, stored: Stored) -> None:
        parent = _ROOT if stored.parent is None else self._names.get(stored.parent)
        if parent is None:
            return  # it was stored before this frontend listened
        self.block_tokens = size = stored.block_tokens
        for place, block_hash in enumerate(stored.hashes):
            tokens = stored.token_ids[place * size : (place + 1) * size]
            parent = hash((parent, tuple(tokens)))
            if block_hash not in self._names:
                self._names[block_hash] = parent
                self._count[parent] = self._count.get(parent, 0) + 1

    def remove(self, hashes: Sequence[BlockHash]) -> None:
        for block_hash in hashes:
            name = self._names.pop(block_hash, None)
            if name is not None:
                self._count[name] -= 1
                if not self._count[name]:
                    del self._count[name]

    def leading(self, names: Sequence[_Name]) -> int:
        """Return how many of these blocks are there, before the first that is not."""
        for place, name in enumerate(names):
            if name not in self._count:
                return place
        return len(names)


def _names(prompt: Sequence[int], size: int) -> list[_Name]:
    names, name = [], _ROOT
    for start in range(0, len(prompt) - size + 1, size):
        name = hash((name, tuple(prompt[start : start + size])))
        names.append(name)
    return names

"""What the engines have in their prefix caches, as their KV events say; pure.

An engine names a block by a hash of its own. Here a block is named by its tokens and the block
before it, so that what engines say can be compared with a prompt, and with each other. A name is 64
bits, whatever is in the block, and made with a key of this process (Python's own, of ``hash``), so
that nobody can make up a text whose name is another's.
"""

from __future__ import annotations

import functools
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence

from vllm_pd_plugin.engine_port.messages import BlockHash, Blocks, Cleared, Removed, Stored
from vllm_pd_plugin.frontend.routing.choice import EngineKey

MOST_BLOCKS = 2**18
"""So many blocks of all engines are remembered, some 120 MB; those that were told of and looked for
longest ago are forgotten first."""

_Name = int
_ROOT: _Name = 0


class NamedPrompt:
    """A prompt, and the names of its blocks: made once, however often it is looked for, and only as
    far as they are looked for."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self._names: dict[int, list[_Name]] = {}

    def leading(self, size: int, known: Container[_Name]) -> list[_Name]:
        """Return the names of its first whole blocks of so many tokens, before the first name that
        is not among the known ones."""
        names = self._names.setdefault(size, [])
        for place, name in enumerate(names):
            if name not in known:
                return names[:place]
        for name in _names(self.tokens, size, names[-1] if names else _ROOT, len(names)):
            names.append(name)
            if name not in known:
                return names[:-1]
        return names[:]


class PrefixIndex:
    """The prefix cache of each engine. most: how many blocks are remembered."""

    def __init__(self, most: int = MOST_BLOCKS) -> None:
        self._most = most
        self._caches: dict[EngineKey, _Cache] = {}
        self._holders: OrderedDict[_Name, dict[EngineKey, tuple[BlockHash, ...]]] = OrderedDict()
        """Who has a block, and by which hashes; what was used last comes last."""
        self._sizes: Counter[int] = Counter()
        """How many engines have blocks of so many tokens."""
        self._num_blocks = 0

    def __len__(self) -> int:
        """Return how many blocks of all engines it remembers."""
        return self._num_blocks

    def change(self, engine: EngineKey, blocks: Blocks) -> None:
        """Take in what an engine says of its cache."""
        for change in blocks.changes:
            match change:
                case Stored():
                    self._store(engine, change)
                case Removed(hashes):
                    self._remove(engine, hashes)
                case Cleared():
                    self.forget(engine)

    def forget(self, engine: EngineKey) -> None:
        """An engine is gone, or another one runs in its place."""
        if engine in self._caches:
            self._remove(engine, list(self._caches[engine].names))
            self._sizes -= Counter({self._caches.pop(engine).block_tokens: 1})

    def holders(self, prompt: NamedPrompt, most: int) -> list[EngineKey]:
        """Return some of the engines that have most of a prompt, those with most of it first."""
        found: dict[EngineKey, None] = {}
        for size in self._sizes:
            for name in reversed(prompt.leading(size, self._holders)):
                holders = self._holders[name]
                if len(holders) > len(found):  # who has a block has those before it, as a rule
                    for engine in holders:
                        found[engine] = None
                        if len(found) >= most:
                            return list(found)
        return list(found)

    def cached(
        self, prompt: NamedPrompt, engines: Collection[EngineKey] | None = None
    ) -> dict[EngineKey, int]:
        """Return how many of a prompt's first tokens engines have, whole blocks only.

        engines: that count; None: all that there are.
        """
        result: dict[EngineKey, int] = {}
        there = self._caches.keys() if engines is None else self._caches.keys() & engines
        for size in self._sizes:
            names = prompt.leading(size, self._holders)
            left = {e for e in there if self._caches[e].block_tokens == size} if names else set()
            for place, name in enumerate(names):
                holders = self._holders[name].keys()
                if len(holders) < len(self._caches) and not left <= holders:
                    result.update((engine, size * place) for engine in left - holders if place)
                    left &= holders
                    if not left:
                        break
            result.update((engine, size * len(names)) for engine in left)
            for name in reversed(names):  # what is nearer to the root is needed for longer
                self._holders.move_to_end(name)
        return result

    def _store(self, engine: EngineKey, stored: Stored) -> None:
        cache = self._caches.setdefault(engine, _Cache())
        parent = _ROOT if stored.parent is None else cache.names.get(stored.parent)
        if parent is None or not stored.block_tokens:
            return  # it was stored before this frontend listened, or is forgotten
        if cache.block_tokens != stored.block_tokens:
            self._sizes -= Counter({cache.block_tokens: 1})
            self._sizes[stored.block_tokens] += 1
            cache.block_tokens = stored.block_tokens
        names = _names(stored.token_ids, stored.block_tokens, parent)
        for block_hash, name in zip(stored.hashes, names, strict=False):
            if block_hash not in cache.names:
                cache.names[block_hash] = name
                holders = self._holders.setdefault(name, {})
                holders[engine] = (*holders.get(engine, ()), block_hash)
                self._num_blocks += 1
            self._holders.move_to_end(cache.names[block_hash])
        while self._num_blocks > self._most:
            self._forget_oldest()

    def _remove(self, engine: EngineKey, hashes: Iterable[BlockHash]) -> None:
        cache = self._caches.get(engine)
        for block_hash in hashes if cache is not None else ():
            assert cache is not None
            name = cache.names.pop(block_hash, None)
            if name is None:
                continue
            self._num_blocks -= 1
            holders = self._holders[name]
            left = tuple(each for each in holders[engine] if each != block_hash)
            if left:
                holders[engine] = left
            else:
                del holders[engine]
            if not holders:
                del self._holders[name]

    def _forget_oldest(self) -> None:
        _, holders = self._holders.popitem(last=False)
        for engine, hashes in holders.items():
            for block_hash in hashes:
                del self._caches[engine].names[block_hash]
                self._num_blocks -= 1


class _Cache:
    """One engine's: the name of each block by its hash, and how many tokens are in one."""

    def __init__(self) -> None:
        self.block_tokens = 0
        self.names: dict[BlockHash, _Name] = {}


def _names(tokens: Sequence[int], size: int, parent: _Name, first: int = 0) -> Iterator[_Name]:
    """Return the names of whole blocks that follow one another, from the first one on, as far as
    their tokens are some; parent: the name of the one before that."""
    pack = _packer(size)
    for start in range(first * size, len(tokens) - size + 1, size):
        try:
            parent = hash(pack(parent, *tokens[start : start + size]))
        except struct.error:
            return
        yield parent


@functools.cache
def _packer(size: int) -> Callable[..., bytes]:
    """Return what makes bytes of a block: the name of the one before it, and its tokens."""
    return struct.Struct(f"{1 + size}q").pack

"""KV memory as a table: what was written last to each token's place, and by whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_pd_plugin.ids import BlockId
from vllm_pd_plugin.memory.layout import RankLayout

Cells = NDArray[np.int64]

CELL_BYTES = 8
NOBODYS = 0
"""What no prefix of tokens is."""
_WRITERS = 2**20
_MAX_LAYERS, _MAX_RANKS = 16, 4


@dataclasses.dataclass(frozen=True, slots=True)
class Writer:
    """Who wrote: a request of an engine, in one of its steps."""

    incarnation: str
    request_id: str
    step: int


class Contents:
    """What KV says, as a number: it is equal where weights and all tokens up to its own are."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], int] = {}
        self._writers: list[Writer] = [Writer("", "nobody", 0)]

    def begin(self, weights: int) -> int:
        """Return what an empty prefix is with some weights."""
        return self.after(-1, weights)

    def after(self, prefix: int, token: int) -> int:
        """Return what a prefix is with one more token."""
        return self._known.setdefault((prefix, token), len(self._known) + 1)

    def enter(self, writer: Writer) -> int:
        self._writers.append(writer)
        return len(self._writers) - 1

    def writer(self, cell: int) -> Writer:
        """Return who wrote a cell; nobody where it holds what no engine writes."""
        number = cell % _WRITERS
        return self._writers[number if number < len(self._writers) else 0]


@dataclasses.dataclass(frozen=True, slots=True)
class WrongCell:
    """A token's place that does not hold what it should."""

    layer: str
    position: int
    block: BlockId
    cell: int


class KvTable:
    """The KV cache of one rank. caches: its memory, as a worker of vLLM registers it."""

    def __init__(self, layout: RankLayout, num_blocks: int, rank: int) -> None:
        self._rank = rank
        self._layers = layout.layers
        self._block_tokens = [group.block_tokens for group in layout.groups for _ in group.layers]
        self._cells = [
            np.zeros((num_blocks, tokens), dtype=np.int64) for tokens in self._block_tokens
        ]
        self._flat = [cells.reshape(-1) for cells in self._cells]
        self.caches = {
            layer: torch.from_numpy(cells.view(np.uint8).reshape(*cells.shape, CELL_BYTES))
            for layer, cells in zip(self._layers, self._cells, strict=True)
        }

    def write(
        self, layer: int, blocks: Sequence[BlockId], start: int, contents: Cells, writer: int
    ) -> None:
        """Write what ``contents`` says into the places of the tokens from ``start`` on."""
        places = self._places(layer, blocks, start, start + len(contents))
        self._flat[layer][places] = self._stamped(layer, contents) * _WRITERS + writer

    def find_wrong(
        self, layer: int, blocks: Sequence[BlockId], start: int, contents: Cells
    ) -> WrongCell | None:
        """Return the first of those places that does not hold what it should."""
        places = self._places(layer, blocks, start, start + len(contents))
        found = self._flat[layer][places]
        differs = found // _WRITERS != self._stamped(layer, contents)
        if not differs.any():
            return None
        index = int(differs.argmax())
        block = int(places[index]) // self._block_tokens[layer]
        return WrongCell(self._layers[layer], start + index, block, int(found[index]))

    def _stamped(self, layer: int, contents: Cells) -> Cells:
        return (contents * _MAX_RANKS + self._rank) * _MAX_LAYERS + layer

    def _places(self, layer: int, blocks: Sequence[BlockId], start: int, stop: int) -> Cells:
        size = self._block_tokens[layer]
        tokens = np.arange(start, stop)
        first = start // size
        table = np.array(blocks[first : -(-stop // size)], dtype=np.int64)
        places: Cells = table[tokens // size - first] * size + tokens % size
        return places

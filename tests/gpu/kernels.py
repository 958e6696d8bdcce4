"""The kernels of the library that ``build`` makes, called with tensors.

They run on the device that the tensors are on, on the caller's current stream, and take what the
ops of PyTorch take (see ``codecs.ops``). Arguments are not checked: that is the extension's job.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_pd_plugin.codecs import native

Tensors = Sequence[torch.Tensor]

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
"""In the order of ``pd::Element``."""

SCHEMAS = (
    "pack_blocks(Tensor[] planes, Tensor blocks, Tensor(a!) slab) -> ()",
    "unpack_blocks(Tensor slab, Tensor blocks, Tensor(a!)[] planes) -> ()",
    "encode_blocks(Tensor[] parts, Tensor blocks, int tokens, int bits, int group, "
    "bool by_channel, int sinks, Tensor(a!) slab) -> ()",
    "decode_blocks(Tensor slab, Tensor blocks, int tokens, int bits, int group, "
    "bool by_channel, int sinks, Tensor(a!)[] parts) -> ()",
    "gather_heads(Tensor[] parts, int layers, Tensor blocks, int first_token, int tokens, "
    "int first_head, int heads, float[] scales, Tensor(a!) slab) -> ()",
    "scatter_heads(Tensor slab, Tensor blocks, int first_token, int tokens, int first_head, "
    "int heads, float[] scales, int layers, Tensor(a!)[] parts) -> ()",
    "digest_blocks(Tensor[] planes, Tensor blocks) -> Tensor",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A kernel with all that it needs, to be launched any number of times.

    keeps: tensors and arrays that the arguments point to.
    """

    function: Any
    arguments: tuple[Any, ...]
    keeps: tuple[Any, ...]
    device: torch.device

    def __call__(self) -> None:
        stream = 0
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device).cuda_stream
        say_wrong(self.function(*self.arguments, ctypes.c_void_p(stream)))


def say_wrong(words: bytes | None) -> None:
    """Raise RuntimeError with what a function of the library says, if it says anything."""
    if words is not None:
        raise RuntimeError(words.decode())


class Kernels:
    """library: as ``build`` makes it."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def function(self, name: str) -> Any:
        """Return a function of the library; a pointer goes in as ``c_void_p``, a number as
        ``c_int64``."""
        found = self._library[name]
        found.restype = ctypes.c_char_p
        return found

    def pack_blocks(self, planes: Tensors, blocks: torch.Tensor, slab: torch.Tensor) -> None:
        self.packing(planes, blocks, slab)()

    def unpack_blocks(self, slab: torch.Tensor, blocks: torch.Tensor, planes: Tensors) -> None:
        self.unpacking(slab, blocks, planes)()

    def encode_blocks(
        self, parts: Tensors, blocks: torch.Tensor, tokens: int, bits: int, group: int,
        by_channel: bool, sinks: int, slab: torch.Tensor,
    ) -> None:  # fmt: skip
        how = (bits, by_channel, group, sinks)
        self._coding("pd_encode_blocks", parts, blocks, tokens, how, slab)()

    def decode_blocks(
        self, slab: torch.Tensor, blocks: torch.Tensor, tokens: int, bits: int, group: int,
        by_channel: bool, sinks: int, parts: Tensors,
    ) -> None:  # fmt: skip
        how = (bits, by_channel, group, sinks)
        self._coding("pd_decode_blocks", parts, blocks, tokens, how, slab)()

    def gather_heads(
        self, parts: Tensors, layers: int, blocks: torch.Tensor, first_token: int, tokens: int,
        first_head: int, heads: int, scales: Sequence[float], slab: torch.Tensor,
    ) -> None:  # fmt: skip
        chosen = (blocks, first_token, tokens, first_head, heads)
        self._moving_heads("pd_gather_heads", parts, layers, chosen, scales, slab)

    def scatter_heads(
        self, slab: torch.Tensor, blocks: torch.Tensor, first_token: int, tokens: int,
        first_head: int, heads: int, scales: Sequence[float], layers: int, parts: Tensors,
    ) -> None:  # fmt: skip
        chosen = (blocks, first_token, tokens, first_head, heads)
        self._moving_heads("pd_scatter_heads", parts, layers, chosen, scales, slab)

    def digest_blocks(self, planes: Tensors, blocks: torch.Tensor) -> torch.Tensor:
        result = torch.zeros(1, dtype=torch.int64, device=blocks.device)
        self.digesting(planes, blocks, result)()
        return result

    # --- calls to be repeated ----------------------------------------------------------------

    def packing(self, planes: Tensors, blocks: torch.Tensor, slab: torch.Tensor) -> Call:
        return self._moving("pd_pack_blocks", planes, blocks, slab)

    def unpacking(self, slab: torch.Tensor, blocks: torch.Tensor, planes: Tensors) -> Call:
        return self._moving("pd_unpack_blocks", planes, blocks, slab)

    def digesting(self, planes: Tensors, blocks: torch.Tensor, total: torch.Tensor) -> Call:
        """``total`` is int64 ``[1]``, zero before each call."""
        return self._moving("pd_digest_blocks", planes, blocks, total)

    def encoding(
        self, parts: Tensors, blocks: torch.Tensor, tokens: int, how: tuple[int, bool, int, int],
        slab: torch.Tensor,
    ) -> Call:  # fmt: skip
        """how: bits, by_channel, group, sinks."""
        return self._coding("pd_encode_blocks", parts, blocks, tokens, how, slab)

    def decoding(
        self, parts: Tensors, blocks: torch.Tensor, tokens: int, how: tuple[int, bool, int, int],
        slab: torch.Tensor,
    ) -> Call:  # fmt: skip
        return self._coding("pd_decode_blocks", parts, blocks, tokens, how, slab)

    # --- inside ------------------------------------------------------------------------------

    def _moving(
        self, name: str, planes: Tensors, blocks: torch.Tensor, other: torch.Tensor
    ) -> Call:
        size = planes[0].element_size()
        rows = [(p.data_ptr(), *(stride * size for stride in p.stride()[:3])) for p in planes]
        table = torch.tensor(rows, dtype=torch.int64, device=blocks.device)
        _, heads, tokens, width = planes[0].shape
        shape = _numbers(heads, tokens, width * size)
        arguments = (
            _at(table), _number(len(planes)), shape, _at(blocks), _number(len(blocks)), _at(other),
        )  # fmt: skip
        keeps = (table, shape, *planes, blocks, other)
        return Call(self.function(name), arguments, keeps, blocks.device)

    def _coding(
        self, name: str, parts: Tensors, blocks: torch.Tensor, tokens: int,
        how: tuple[int, bool, int, int], slab: torch.Tensor,
    ) -> Call:  # fmt: skip
        first, size = parts[0], parts[0].element_size()
        rows = [(p.data_ptr(), p.stride(0) * size, p.stride(1) * size) for p in parts]
        table = torch.tensor(rows, dtype=torch.int64, device=blocks.device)
        tiling = _tiling(first)
        encoding = _numbers(*how)
        arguments = (
            _at(table), _number(len(parts)), _number(first.shape[1]),
            _number(ELEMENTS.index(first.dtype)), tiling, _at(blocks), _number(len(blocks)),
            _number(tokens), encoding, _at(slab),
        )  # fmt: skip
        keeps = (table, tiling, encoding, *parts, blocks, slab)
        return Call(self.function(name), arguments, keeps, blocks.device)

    def _moving_heads(
        self, name: str, parts: Tensors, layers: int,
        chosen: tuple[torch.Tensor, int, int, int, int], scales: Sequence[float],
        slab: torch.Tensor,
    ) -> None:  # fmt: skip
        blocks, first_token, tokens, first_head, heads = chosen
        count, done = len(parts) // layers, 0
        widths = [part.shape[4] * part.shape[5] for part in parts[:count]]
        for index, width in enumerate(widths):
            of_layers, size = parts[index::count], parts[0].element_size()
            rows = [
                (p.data_ptr() + first_head * p.stride(1) * size, p.stride(0) * size,
                 p.stride(1) * size)
                for p in of_layers
            ]  # fmt: skip
            table = torch.tensor(rows, dtype=torch.int64, device=blocks.device)
            divisors = torch.tensor(scales[index::count], device=blocks.device)
            tiling = _tiling(of_layers[0])
            before, skipped = divmod(first_token, tiling[0])
            rest = blocks[before:]
            place = _numbers(ELEMENTS.index(slab.dtype), sum(widths), done)
            arguments = (
                _at(table), _number(layers), _number(heads),
                _number(ELEMENTS.index(parts[0].dtype)), tiling, _at(rest), _number(len(rest)),
                _number(tokens), _number(skipped), place, _at(divisors), _at(slab),
            )  # fmt: skip
            keeps = (table, divisors, tiling, place, *of_layers, rest, slab)
            Call(self.function(name), arguments, keeps, blocks.device)()
            done += width


def stand_for_extension(kernels: Kernels, device: str) -> torch.library.Library:
    """Let ``codecs.ops`` find these kernels where it looks for the native extension; before it is
    imported for the first time, and as long as what is returned lives."""
    assert "vllm_pd_plugin.codecs.ops" not in sys.modules
    library = torch.library.Library("vllm_pd_plugin", "DEF")
    for schema in SCHEMAS:
        name = library.define(schema)
        library.impl(name, getattr(kernels, name), device.upper())
    native.missing = lambda on_cuda: None  # type: ignore[assignment]
    return library


def _tiling(part: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    size = part.element_size()
    return _numbers(
        part.shape[2] * part.shape[3], part.shape[4] * part.shape[5], part.shape[3], part.shape[5],
        *(part.stride(i) * size for i in range(2, 6)),
    )  # fmt: skip


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _number(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def _numbers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*map(int, values))

"""Stage: every op against its reference, byte for byte.

What an op is to do, the reference does with the same bytes on the CPU; all memory is compared, with
what lies beside the blocks and the slab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from tests.fakes.planes import Slab
from tests.gpu import cases
from tests.gpu.build import library_in
from tests.gpu.cases import Coding, Moving
from tests.gpu.head_cases import HeadMoving, moving_heads
from tests.gpu.kernels import Kernels
from tests.gpu.notes import Notes
from vllm_pd_plugin.codecs import heads_reference, ops_reference
from vllm_pd_plugin.codecs.codec import Encoding

ROUNDS = 4
KNOWN_DIGEST = 6716140276178703354
"""Of ``_known_plane``: engines of two releases compare digests."""

FAR_BYTES = 2**30
"""From block to block, in a cache of more than 4 GiB."""


Case = TypeVar("Case", Moving, Coding, HeadMoving)


class Ops(Protocol):
    """The ops as PyTorch registers them."""

    pack_blocks: Any
    unpack_blocks: Any
    encode_blocks: Any
    decode_blocks: Any
    gather_heads: Any
    scatter_heads: Any
    digest_blocks: Any


def run(notes: Notes) -> None:
    kernels = Kernels(library_in(notes.work))
    torch.set_num_threads(1)  # the references' tensors are small
    check_all(kernels, notes, ROUNDS)
    _check(notes, cases.coding_of_many(), partial(coding_errors, kernels))
    check_far(kernels, notes)
    if not notes.is_stand_in:
        notes.fact("the reference on the GPU", reference_on_device(torch.device(notes.device)))


def check_all(ops: Ops, notes: Notes, rounds: int) -> None:
    """Check ``rounds`` draws of each combination, and what comes up once."""
    moving = _check(notes, _all_moving(rounds), partial(moving_errors, ops))
    coding = _check(notes, _all_coding(rounds), partial(coding_errors, ops))
    heads = _check(notes, moving_heads(rounds), partial(head_errors, ops))
    device = torch.device(notes.device)
    plane = torch.arange(2 * 2 * 3 * 16, dtype=torch.uint8).view(2, 2, 3, 16).to(device)
    digest = int(ops.digest_blocks([plane], torch.tensor([1, 0], device=device)))
    notes.check(digest == KNOWN_DIGEST, f"the digest of known bytes is {digest}")
    text = f"{moving} of blocks that are moved, {coding} of tokens that are coded, {heads} of heads"
    notes.fact("cases", text)


def _check(
    notes: Notes, all_cases: Iterable[Case], errors: Callable[[Case, torch.device], Iterable[str]]
) -> int:
    """Return how many cases were checked."""
    count = 0
    for case in all_cases:
        count += 1
        wrong = list(errors(case, torch.device(notes.device)))
        notes.check(not wrong, f"{', '.join(wrong)}: {case.name}")
    return count


def _all_moving(rounds: int) -> Iterator[Moving]:
    yield from cases.moving(rounds)
    yield from cases.moving_once()


def _all_coding(rounds: int) -> Iterator[Coding]:
    yield from cases.coding(rounds)
    yield from cases.coding_once()
    yield from cases.coding_of_models()


def moving_errors(ops: Ops, case: Moving, device: torch.device) -> Iterator[str]:
    """Pack, unpack and hash; yield what is wrong."""
    chosen = torch.tensor(case.blocks, dtype=torch.int64)
    there, planes = chosen.to(device), case.planes.to(device)
    blocks_bytes = sum(view[0].numel() * view.element_size() for view in case.planes.views)
    expected = torch.zeros(len(case.blocks) * blocks_bytes, dtype=torch.uint8)
    ops_reference.pack_blocks(case.planes.views, chosen, expected)

    slab = Slab(len(expected), device, case.misalignment)
    ops.pack_blocks(planes.views, there, slab.bytes)
    if not torch.equal(slab.bytes.cpu(), expected):
        yield "pack_blocks wrote other bytes"
    if not slab.is_intact:
        yield "pack_blocks wrote beside the slab"
    if not planes.is_equal(case.planes):
        yield "pack_blocks wrote to the planes"

    digest = ops_reference.digest_blocks(case.planes.views, chosen)
    if int(ops.digest_blocks(planes.views, there)) != int(digest):
        yield "digest_blocks has another digest"

    target = case.planes.inverted()
    result = target.to(device)
    slab.bytes.copy_(expected)
    ops_reference.unpack_blocks(expected, chosen, target.views)
    ops.unpack_blocks(slab.bytes, there, result.views)
    if not result.is_equal(target):
        yield "unpack_blocks wrote other bytes, or beside the blocks"
    if not slab.is_intact or not torch.equal(slab.bytes.cpu(), expected):
        yield "unpack_blocks wrote to the slab"


def coding_errors(ops: Ops, case: Coding, device: torch.device) -> Iterator[str]:
    """Encode and decode; yield what is wrong."""
    chosen = torch.tensor(case.blocks, dtype=torch.int64)
    there, parts = chosen.to(device), case.parts.to(device)
    expected = torch.zeros(case.num_bytes, dtype=torch.uint8)
    ops_reference.encode_blocks(case.parts.views, chosen, case.tokens, *case.how, expected)

    slab = Slab(case.num_bytes, device)
    ops.encode_blocks(parts.views, there, case.tokens, *case.how, slab.bytes)
    if not torch.equal(slab.bytes.cpu(), expected):
        yield "encode_blocks wrote other bytes"
    if not slab.is_intact:
        yield "encode_blocks wrote beside the slab"
    if not parts.is_equal(case.parts):
        yield "encode_blocks wrote to the parts"

    target = case.parts.inverted()
    result = target.to(device)
    slab.bytes.copy_(expected)
    ops_reference.decode_blocks(expected, chosen, case.tokens, *case.how, target.views)
    ops.decode_blocks(slab.bytes, there, case.tokens, *case.how, result.views)
    if not result.is_equal(target):
        yield "decode_blocks wrote other values, or beside the tokens"
    if not slab.is_intact or not torch.equal(slab.bytes.cpu(), expected):
        yield "decode_blocks wrote to the slab"


def head_errors(ops: Ops, case: HeadMoving, device: torch.device) -> Iterator[str]:
    """Gather and scatter; yield what is wrong."""
    there = case.blocks.to(device)
    layers, expected = len(case.pages), torch.zeros(case.num_bytes, dtype=torch.uint8)
    heads_reference.gather_heads(
        case.parts(case.pages), layers, case.blocks, *case.chosen, case.scales, case.typed(expected)
    )

    pages, slab = [laid.to(device) for laid in case.pages], Slab(case.num_bytes, device)
    typed = case.typed(slab.bytes)
    ops.gather_heads(case.parts(pages), layers, there, *case.chosen, case.scales, typed)
    if not torch.equal(slab.bytes.cpu(), expected):
        yield "gather_heads wrote other bytes"
    if not slab.is_intact:
        yield "gather_heads wrote beside the slab"
    if not all(a.is_equal(b) for a, b in zip(pages, case.pages, strict=True)):
        yield "gather_heads wrote to the pages"

    target = [laid.copy() for laid in case.others]
    result = [laid.to(device) for laid in target]
    slab.bytes.copy_(expected)
    heads_reference.scatter_heads(
        case.typed(expected), case.blocks, *case.chosen, case.scales, layers, case.parts(target)
    )
    ops.scatter_heads(typed, there, *case.chosen, case.scales, layers, case.parts(result))
    if not all(a.is_equal(b) for a, b in zip(result, target, strict=True)):
        yield "scatter_heads wrote other values, or beside the heads"
    if not slab.is_intact or not torch.equal(slab.bytes.cpu(), expected):
        yield "scatter_heads wrote to the slab"


def check_far(ops: Ops, notes: Notes) -> None:
    """Blocks that are gigabytes apart: an address does not fit into 32 bits."""
    heads, tokens, width, numbers = 2, 32, 64, [4, 1]
    device = torch.device(notes.device)
    memory = torch.empty(5 * FAR_BYTES // 2, dtype=torch.float16, device=device)
    row = (tokens * width, width, 1)
    far = memory.as_strided((5, heads, tokens, width), (FAR_BYTES // 2, *row))
    values = torch.randn((2, heads, tokens, width), generator=torch.Generator().manual_seed(4))
    near = values.to(torch.float16)
    for index, block in enumerate(numbers):
        far[block] = near[index].to(device)
    there, here = torch.tensor(numbers, device=device), torch.tensor([0, 1])
    how, all_tokens = Encoding(4, True, width), 2 * tokens
    expected = torch.zeros(near.numel() * 2, dtype=torch.uint8)
    ops_reference.pack_blocks([near], here, expected)
    packed = torch.zeros_like(expected, device=device)
    ops.pack_blocks([far], there, packed)
    notes.check(torch.equal(packed.cpu(), expected), "pack_blocks: blocks beyond 4 GiB")
    digest = int(ops_reference.digest_blocks([near], here))
    notes.check(
        int(ops.digest_blocks([far], there)) == digest, "digest_blocks: blocks beyond 4 GiB"
    )
    arguments = all_tokens, how.bits, how.group, how.by_channel, 4
    size = heads * how.stripe_bytes(all_tokens, width, 4)
    expected, encoded = torch.zeros(size, dtype=torch.uint8), packed.new_zeros(size)
    in_tiles = [each[:, :, :, None, None] for each in (near, far)]
    ops_reference.encode_blocks(in_tiles[:1], here, *arguments, expected)
    ops.encode_blocks(in_tiles[1:], there, *arguments, encoded)
    notes.check(torch.equal(encoded.cpu(), expected), "encode_blocks: blocks beyond 4 GiB")
    ops_reference.decode_blocks(expected, here, *arguments, in_tiles[:1])
    ops.decode_blocks(encoded, there, *arguments, in_tiles[1:])
    back = torch.stack([far[block] for block in numbers])
    notes.check(torch.equal(back.cpu(), near), "decode_blocks: blocks beyond 4 GiB")
    ops.unpack_blocks(packed, there, [far])
    back = torch.stack([far[block] for block in numbers])
    is_there = torch.equal(back.cpu(), values.to(torch.float16))
    notes.check(is_there, "unpack_blocks: blocks beyond 4 GiB")


def reference_on_device(device: torch.device) -> str:
    """Say in how many cases the reference writes the same bytes where it computes on a device.

    It is what runs there without the extension. Nothing rests on its bytes: PyTorch may divide in
    another way there."""
    same = count = 0
    for case in cases.coding(1):
        chosen = torch.tensor(case.blocks, dtype=torch.int64)
        slabs = [torch.zeros(case.num_bytes, dtype=torch.uint8, device=d) for d in ("cpu", device)]
        for slab in slabs:
            parts = case.parts.to(slab.device).views
            ops_reference.encode_blocks(parts, chosen.to(slab.device), case.tokens, *case.how, slab)
        count += 1
        same += torch.equal(slabs[0], slabs[1].cpu())
    return f"the same bytes as on the CPU in {same} of {count} cases"

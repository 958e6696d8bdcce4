"""For each read: from a share that can be read as it lies, and block tables, to descriptors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.ids import NULL_BLOCK, BlockId
from vllm_pd_plugin.mapping.direct import Direct
from vllm_pd_plugin.mapping.match import Share
from vllm_pd_plugin.memory.layout import BlockTables, Region
from vllm_pd_plugin.net.transport import ReadPlan

_Numbers = NDArray[np.uint64]


def plan_reads(
    share: Share,
    tokens: Sequence[range],
    source: tuple[BlockTables, Sequence[Region]],
    local: tuple[BlockTables, Sequence[Region]],
) -> ReadPlan:
    """Plan the reads of some tokens of a share that can be read as it lies (``Share.direct``).

    Whole chunks are read (``Direct.cover``): stretches that follow each other meet at the end of
    one, and the first begins where one of our blocks does, or in a window. Each byte is in one
    descriptor only; what lies together on both sides shares one.

    tokens: for each of the share's layers; none for some of them.
    source, local: the block tables of all groups, and the regions of the share's ranks, which
        ``check_memory`` has seen.

    Raises:
        HandoffError: a block that is needed is absent, or lies outside its region.
    """
    direct = share.direct
    assert direct is not None
    if direct.is_by_block:
        return _plan_blocks(share, direct, tokens, source, local)
    runs = np.array(direct.runs, dtype=np.uint64)  # [runs, fields of Run]
    lengths = runs[:, 4]
    columns: list[tuple[_Numbers, _Numbers, _Numbers]] = []
    known: dict[range, tuple[_Chunks, _Chunks]] = {}  # layers mostly need the same tokens
    for wanted, there, here in zip(tokens, share.source_regions, share.regions, strict=True):
        if not wanted:
            continue
        if wanted not in known:
            chunks = direct.chunks(wanted)
            per_block = direct.source_block_tokens // direct.chunk_tokens
            their_chunks = _chunks(source[0][share.source_group], chunks, per_block, "the peer's")
            per_block = direct.block_tokens // direct.chunk_tokens
            our_chunks = _chunks(local[0][share.group], chunks, per_block, "our")
            known[wanted] = their_chunks, our_chunks
        their_chunks, our_chunks = known[wanted]
        remote = _addresses(source[1][there], their_chunks, runs[:, 0], runs[:, 1])
        ours = _addresses(local[1][here], our_chunks, runs[:, 2], runs[:, 3])
        columns.append((ours, remote, np.tile(lengths, len(their_chunks.blocks))))
    together = _together(columns)
    if not columns:
        return together
    return _merged(together.local, together.remote, together.num_bytes)


def _plan_blocks(
    share: Share,
    direct: Direct,
    tokens: Sequence[range],
    source: tuple[BlockTables, Sequence[Region]],
    local: tuple[BlockTables, Sequence[Region]],
) -> ReadPlan:
    """The same, from block to block: layers mostly need the same, and runs of blocks are looked for
    once."""
    num_bytes = np.uint64(direct.runs[0].num_bytes)
    columns: list[tuple[_Numbers, _Numbers, _Numbers]] = []
    known: dict[range, tuple[_Numbers, _Numbers, NDArray[np.intp], _Numbers]] = {}
    for wanted, there, here in zip(tokens, share.source_regions, share.regions, strict=True):
        if not wanted:
            continue
        if wanted not in known:
            chunks = direct.chunks(wanted)
            theirs = _chunks(source[0][share.source_group], chunks, 1, "the peer's").blocks
            ours = _chunks(local[0][share.group], chunks, 1, "our").blocks
            # Their order does not matter to a copy, and vLLM reuses freed blocks backwards.
            order = np.argsort(theirs)
            known[wanted] = _runs(ours[order], theirs[order])
        ours, theirs, starts, lengths = known[wanted]
        remote, our = source[1][there], local[1][here]
        _check_bounds(theirs, remote)
        _check_bounds(ours, our)
        if remote.stride_bytes == our.stride_bytes == num_bytes:  # neighbouring blocks touch
            ours, theirs = ours[starts], theirs[starts]
        else:
            lengths = np.ones_like(ours)
        columns.append((_pages(our, ours), _pages(remote, theirs), lengths * num_bytes))
    return _together(columns)


def _runs(
    ours: _Numbers, theirs: _Numbers
) -> tuple[_Numbers, _Numbers, NDArray[np.intp], _Numbers]:
    """Return both, and where each stretch that ascends by one on both sides starts, and how long it
    is."""
    breaks = (np.diff(ours) != 1) | (np.diff(theirs) != 1)
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1)).astype(np.intp)
    return ours, theirs, starts, np.diff(np.append(starts, len(ours))).astype(np.uint64)


def _together(columns: Sequence[tuple[_Numbers, _Numbers, _Numbers]]) -> ReadPlan:
    if not columns:
        empty = np.empty(0, np.uint64)
        return ReadPlan(empty, empty, empty)
    return ReadPlan(*(np.concatenate(column) for column in zip(*columns, strict=True)))


class _Chunks(NamedTuple):
    """For each chunk its block, and the how manieth of the block it is."""

    blocks: _Numbers
    nth: _Numbers


def _chunks(table: Sequence[BlockId], chunks: range, per_block: int, whose: str) -> _Chunks:
    last = (chunks.stop - 1) // per_block
    if last >= len(table):
        raise HandoffError(
            Reason.MISSING_BLOCKS,
            f"{whose} block table has {len(table)} blocks, {last + 1} are needed",
        )
    first = chunks.start // per_block
    try:
        blocks = np.array(table[first : last + 1], dtype=np.uint64)
    except OverflowError as error:
        raise HandoffError(
            Reason.MISSING_BLOCKS, f"{whose} block table names no block: {error}"
        ) from error
    if np.any(blocks == NULL_BLOCK):
        raise HandoffError(
            Reason.MISSING_BLOCKS, f"{whose} block table no longer holds a block that is needed"
        )
    numbers = np.arange(chunks.start, chunks.stop)
    nth = (numbers % per_block).astype(np.uint64)
    return _Chunks(blocks[numbers // per_block - first], nth)


def _addresses(region: Region, chunks: _Chunks, starts: _Numbers, steps: _Numbers) -> _Numbers:
    """Return where the runs of some chunks begin: chunk after chunk, run after run."""
    _check_bounds(chunks.blocks, region)
    pages = _pages(region, chunks.blocks)
    return (pages[:, None] + starts + chunks.nth[:, None] * steps).ravel()


def _check_bounds(blocks: _Numbers, region: Region) -> None:
    if int(blocks.max()) >= region.num_blocks:
        raise HandoffError(
            Reason.MISSING_BLOCKS,
            f"block {int(blocks.max())} lies outside a region of {region.num_blocks} blocks",
        )


def _pages(region: Region, blocks: _Numbers) -> _Numbers:
    return np.uint64(region.base) + blocks * np.uint64(region.stride_bytes)


def _merged(local: _Numbers, remote: _Numbers, num_bytes: _Numbers) -> ReadPlan:
    """Return the same reads, of which none goes on where another ends on both sides.

    Their order does not matter to a copy, and vLLM reuses freed blocks backwards.
    """
    order = np.argsort(remote)
    local, remote, num_bytes = local[order], remote[order], num_bytes[order]
    goes_on = (remote[:-1] + num_bytes[:-1] == remote[1:]) & (
        local[:-1] + num_bytes[:-1] == local[1:]
    )
    first = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    return ReadPlan(local[first], remote[first], np.add.reduceat(num_bytes, first))

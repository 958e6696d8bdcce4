"""Decide which bytes to read: pure geometry, from two block tables to merged descriptors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.ids import NULL_BLOCK, BlockId
from vllm_pd_plugin.memory.layout import BlockTables, Group, Region
from vllm_pd_plugin.net.transport import ReadPlan

Digest = Callable[[BlockTables, int, int], bytes]
"""Tells the bytes of the KV in these blocks, from one token up to another; see ``kv_digest``."""


def plan_reads(
    groups: Sequence[Group],
    local: tuple[BlockTables, Sequence[Region]],
    remote: tuple[BlockTables, Sequence[Region]],
    positions: Sequence[range],
) -> ReadPlan:
    """Plan the reads of some positions of the block tables, a range of them for each layer.

    ``local`` and ``remote`` are each side's block tables and regions (one a layer, in the order
    of the groups' layers, as ``positions``). Blocks that are neighbours on both sides become one
    descriptor.

    Raises:
        HandoffError: a block that is needed is absent, or lies outside its region.
    """
    (local_tables, local_regions), (remote_tables, remote_regions) = local, remote
    if len(remote_tables) != len(groups) or len(remote_regions) != len(local_regions):
        raise HandoffError(
            Reason.MISSING_BLOCKS,
            f"the producer sent {len(remote_tables)} block tables and {len(remote_regions)} "
            f"regions; {len(groups)} and {len(local_regions)} are needed",
        )
    parts: list[tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]] = []
    next_region = 0
    for index, group in enumerate(groups):
        pairs: dict[range, _Pairs] = {}  # layers of a group mostly need the same positions
        for _ in group.layers:
            here, there = local_regions[next_region], remote_regions[next_region]
            wanted = positions[next_region]
            next_region += 1
            if not wanted:
                continue
            if wanted not in pairs:
                pairs[wanted] = _pair(local_tables[index], remote_tables[index], wanted, index)
            ours, theirs, starts, lengths = pairs[wanted]
            if here.block_bytes != there.block_bytes:
                raise HandoffError(
                    Reason.MISSING_BLOCKS,
                    f"a remote block has {there.block_bytes} bytes, ours {here.block_bytes}",
                )
            _check_bounds(ours, here)
            _check_bounds(theirs, there)
            if here.is_dense and there.is_dense:
                parts.append(_descriptors(here, there, ours[starts], theirs[starts], lengths))
            else:
                parts.append(_descriptors(here, there, ours, theirs, np.ones_like(ours)))
    if not parts:
        empty = np.empty(0, np.uint64)
        return ReadPlan(empty, empty, empty)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return ReadPlan(*columns)


_Pairs = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.intp], NDArray[np.uint64]]


def _pair(local: Sequence[BlockId], remote: Sequence[BlockId], wanted: range, index: int) -> _Pairs:
    """Return local blocks, remote blocks, and where runs of them start and how long they are."""
    ours = _pick(local, wanted, f"local KV cache group {index}")
    theirs = _pick(remote, wanted, f"remote KV cache group {index}")
    # Order does not matter to a copy, and vLLM reuses freed blocks backwards.
    order = np.argsort(theirs)
    ours, theirs = ours[order], theirs[order]
    return ours, theirs, *_runs(ours, theirs)


def _pick(table: Sequence[BlockId], positions: range, where: str) -> NDArray[np.uint64]:
    if positions and positions[-1] >= len(table):
        raise HandoffError(
            Reason.MISSING_BLOCKS,
            f"{where} has {len(table)} blocks, {positions[-1] + 1} are needed",
        )
    try:
        picked = np.array([table[i] for i in positions], dtype=np.uint64)
    except OverflowError as error:
        raise HandoffError(Reason.MISSING_BLOCKS, f"{where} names no block: {error}") from error
    if np.any(picked == NULL_BLOCK):
        raise HandoffError(Reason.MISSING_BLOCKS, f"{where} no longer holds a block that is needed")
    return picked


def _runs(
    ours: NDArray[np.uint64], theirs: NDArray[np.uint64]
) -> tuple[NDArray[np.intp], NDArray[np.uint64]]:
    """Return (start index, length in blocks) of each stretch that ascends by one on both sides."""
    if len(ours) == 0:
        return np.empty(0, np.intp), np.empty(0, np.uint64)
    breaks = (np.diff(ours) != 1) | (np.diff(theirs) != 1)
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1)).astype(np.intp)
    return starts, np.diff(np.append(starts, len(ours))).astype(np.uint64)


def _check_bounds(blocks: NDArray[np.uint64], region: Region) -> None:
    if len(blocks) and int(blocks.max()) >= region.num_blocks:
        raise HandoffError(
            Reason.MISSING_BLOCKS,
            f"block {int(blocks.max())} lies outside a region of {region.num_blocks} blocks",
        )


def _descriptors(
    here: Region,
    there: Region,
    ours: NDArray[np.uint64],
    theirs: NDArray[np.uint64],
    lengths: NDArray[np.uint64],
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    return (
        np.uint64(here.base) + ours * np.uint64(here.stride_bytes),
        np.uint64(there.base) + theirs * np.uint64(there.stride_bytes),
        lengths * np.uint64(here.block_bytes),
    )

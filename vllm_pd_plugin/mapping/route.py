"""How one rank of ours reads from an engine: once for each peer."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from vllm_pd_plugin.mapping.kv_cache import EngineKvCache
from vllm_pd_plugin.mapping.match import Share, match
from vllm_pd_plugin.memory.layout import forward_order


class Turn(NamedTuple):
    """When a layer's KV is written there: as the how manieth of its pipeline stage."""

    stage: int
    number: int


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """What one of our ranks takes from an engine.

    turns: for each of our regions when it is written there.
    num_stages, num_groups: their pipeline stages, and their KV cache groups.
    counterpart: the rank of theirs that has exactly our pages, region by region: whole blocks may
        be moved, packed and compared as they are. None where there is none.
    """

    shares: tuple[Share, ...]
    turns: tuple[Turn, ...]
    num_stages: int
    num_groups: int
    counterpart: int | None

    @property
    def source_ranks(self) -> tuple[int, ...]:
        """Their ranks that have something for ours."""
        return tuple(sorted({share.source_rank for share in self.shares}))


def find_route(
    theirs: EngineKvCache, ours: EngineKvCache, rank: int, allow_fp8: bool = False
) -> Route:
    """Return how one of our ranks reads from an engine.

    ours: what that rank can say (``EngineKvCache.seen_by_rank``), or more.

    Raises:
        PeerError: see ``match``.
    """
    shares = match(theirs, ours, allow_fp8, is_whole=False)[rank]
    turns: dict[str, Turn] = {}
    for stage in range(theirs.pipeline_parallel_size):
        layers = theirs.layers_of(stage)
        for number, region in enumerate(forward_order(layers)):
            turns[layers[region]] = Turn(stage, number)
    our_layers = ours.layers_of(rank // ours.tensor_parallel_size)
    return Route(
        shares,
        tuple(turns[layer] for layer in our_layers),
        theirs.pipeline_parallel_size,
        len(theirs.groups),
        _counterpart(theirs, ours, shares, len(our_layers)),
    )


def _counterpart(
    theirs: EngineKvCache, ours: EngineKvCache, shares: tuple[Share, ...], num_layers: int
) -> int | None:
    ranks = {share.source_rank for share in shares}
    stages = {rank // theirs.tensor_parallel_size for rank in ranks}
    if len(ranks) != 1 or len(theirs.groups) != len(ours.groups):
        return None
    if len(theirs.layers_of(stages.pop())) != num_layers:
        return None
    for share in shares:
        there, here = theirs.groups[share.source_group], ours.groups[share.group]
        are_alike = (
            share.source_group == share.group
            and share.source_regions == share.regions
            and share.is_whole
            and there.layout.is_like(here.layout)
        )
        if not are_alike:
            return None
    return ranks.pop()

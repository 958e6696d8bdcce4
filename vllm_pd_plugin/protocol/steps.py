"""The steps of an engine that make exports grow: what each computes, and which ranks have written
it; pure."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from vllm_pd_plugin.ids import HandoffId
from vllm_pd_plugin.memory.layout import BlockTables

_REMEMBERED_STEPS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Advance:
    """What one engine step adds to an export: KV up to ``num_tokens``, in these block tables.

    after_layers: for each pipeline stage numbers of its layers, in the order of the forward pass,
        after which its consumer is told; besides that of all layers.
    """

    handoff_id: HandoffId
    epoch: int
    num_tokens: int
    blocks: BlockTables
    after_layers: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(slots=True, eq=False)
class _Step:
    """What one step of the engine computes, and which ranks have finished it."""

    advances: Sequence[Advance]
    after: Mapping[tuple[int, int], Sequence[Advance]]
    """Those whose consumers are told, by pipeline stage and the number of layers that are written
    there."""
    finished_ranks: set[int] = dataclasses.field(default_factory=set)


class Steps:
    """The steps of the engine that not every rank has finished; the last of them."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._open: OrderedDict[int, _Step] = OrderedDict()

    def begin(self, step: int, advances: Sequence[Advance]) -> None:
        after: dict[tuple[int, int], list[Advance]] = {}
        for advance in advances:
            for stage, numbers in enumerate(advance.after_layers):
                for num_layers in numbers:
                    after.setdefault((stage, num_layers), []).append(advance)
        self._open[step] = _Step(advances, after)
        while len(self._open) > _REMEMBERED_STEPS:
            self._open.popitem(last=False)

    def advances(
        self, step: int, stage: int, num_layers: int, is_finished: bool
    ) -> Sequence[Advance]:
        """Return of what it is worth to say that so many layers of a stage are written in a step;
        nothing of a step that is over. is_finished: these are all that it has."""
        if step not in self._open:
            return ()
        if is_finished:
            return self._open[step].advances
        return self._open[step].after.get((stage, num_layers), ())

    def finish(self, step: int, rank: int) -> None:
        if step in self._open:
            finished = self._open[step].finished_ranks
            finished.add(rank)
            if len(finished) >= self._num_ranks:
                del self._open[step]

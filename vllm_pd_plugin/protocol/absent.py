"""What is known of exports that nobody holds; pure."""

from __future__ import annotations

from collections import OrderedDict

from vllm_pd_plugin.ids import HandoffId
from vllm_pd_plugin.protocol.export_states import ExportState
from vllm_pd_plugin.protocol.outbox import ReturnAddress

_MAX_AWAITED = 10_000
_REMEMBERED_ENDINGS = 4096


class Absent:
    """Who waits for an export that has not come, and how the last ones ended: both are bounded, and
    what is forgotten is UNKNOWN."""

    def __init__(self) -> None:
        self._awaited: dict[HandoffId, ReturnAddress] = {}
        self._endings: OrderedDict[HandoffId, ExportState] = OrderedDict()

    @property
    def num_awaited(self) -> int:
        return len(self._awaited)

    @property
    def is_full(self) -> bool:
        """Whether no more can be waited for."""
        return len(self._awaited) >= _MAX_AWAITED

    def state_of(self, handoff_id: HandoffId) -> ExportState:
        if handoff_id in self._awaited:
            return ExportState.AWAITED
        return self._endings.get(handoff_id, ExportState.UNKNOWN)

    def put(self, handoff_id: HandoffId, state: ExportState, who: ReturnAddress | None) -> None:
        """It is in this state now; AWAITED: by whoever is at this address."""
        self.take(handoff_id)
        if state is ExportState.AWAITED and who is not None:
            self._awaited[handoff_id] = who
        elif state.is_over:
            self._endings[handoff_id] = state
            while len(self._endings) > _REMEMBERED_ENDINGS:
                self._endings.popitem(last=False)

    def take(self, handoff_id: HandoffId) -> ReturnAddress | None:
        """It is UNKNOWN from now on. Returns who has waited for it."""
        self._endings.pop(handoff_id, None)
        return self._awaited.pop(handoff_id, None)

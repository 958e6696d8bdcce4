"""Room in the KV cache for requests whose KV comes from elsewhere.

They hold blocks from the first read on, cannot be preempted before they run, and vLLM's scheduler
lets nothing pass the first of them. Two cases in which it would park them for ever are mended here.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm_pd_plugin.edge.compositions import own_connector
from vllm_pd_plugin.protocol.params import wants_seed

if TYPE_CHECKING:
    from vllm.v1.request import Request

_MARK = "_vllm_pd_plugin_room"


def mend() -> None:
    """Wrap ``Scheduler``; does nothing when that was done."""
    from vllm.v1.core.sched.scheduler import Scheduler

    if getattr(Scheduler, _MARK, False):
        return
    reserved, schedule = Scheduler._inflight_prefill_reserved_blocks, Scheduler.schedule

    @functools.wraps(reserved)
    def and_for_seeds(self: Scheduler) -> int:
        """Asked before a load is let in: how many blocks those in flight need beside their own. To
        vLLM that is none. One that goes on after its producer's token needs a place for it."""
        num_blocks: int = reserved(self)
        if own_connector(self.connector) is None:
            return num_blocks
        let_in: Request = (self.kv_holding_waiting or self.waiting).peek_request()
        loads = [*self._inflight_prefills, let_in]
        num_seeded = sum(wants_seed(load.kv_transfer_params) for load in loads)
        return num_blocks + num_seeded * len(self.kv_cache_config.kv_cache_groups)

    @functools.wraps(schedule)
    def in_order(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        """A request whose load has failed has given its blocks back, and is to be computed here. It
        waits with those that have none: else the others, which hold what it needs, wait for it."""
        first = self.kv_holding_waiting
        if first and own_connector(self.connector) is not None:
            while first and not self._holds_kv_blocks(first.peek_request()):
                self.waiting.prepend_request(first.pop_request())
        return schedule(self, *args, **kwargs)

    Scheduler._inflight_prefill_reserved_blocks, Scheduler.schedule = and_for_seeds, in_order
    setattr(Scheduler, _MARK, True)

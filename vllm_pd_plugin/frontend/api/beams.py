"""Beam search is one request of a client, though each step of each beam is one to the engines."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

from vllm_pd_plugin.frontend.api.client import PoolLLM

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from vllm import RequestOutput

_MARK = "_pd_keeps_beams_together"


def keep_beams_together() -> None:
    """Let this process's API server tell the pool which requests are the steps of one search: vLLM
    begins each as if it were a client's own, for one token."""
    if getattr(BeamSearchOnlineMixin, _MARK, False):
        return
    beam_search = BeamSearchOnlineMixin.beam_search

    @functools.wraps(beam_search)
    async def in_one(
        self: BeamSearchOnlineMixin, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        async def search() -> list[RequestOutput]:
            with client.dispatch.metrics.one_request(are_beams=True):
                return [output async for output in beam_search(self, *args, **kwargs)]

        client = self.engine_client
        assert isinstance(client, PoolLLM)
        # A task has a context of its own: a generator runs in that of whoever asks it.
        for output in await asyncio.create_task(search(), name="beam search"):
            yield output

    BeamSearchOnlineMixin.beam_search = in_one
    setattr(BeamSearchOnlineMixin, _MARK, True)

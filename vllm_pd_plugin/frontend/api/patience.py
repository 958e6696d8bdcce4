"""Clients that do not read what they have asked for, and how much of it is kept for them.

A stream's bytes go through three places, each of which is full before the one ahead of it fills:
what the client's machine and the kernel take (the client's own receive window, and
``UNSENT_BYTES``), the server's write buffer (64 KiB and one event), and then vLLM's collector, in
which what comes meanwhile is merged into the next event. The engine goes on all the while. So there
are two bounds: a client that takes nothing for ``CLIENT_TIMEOUT_S`` is dropped, as if it had left;
and one that reads on, but so slowly that more than ``MOST_UNREAD`` waits in the collector, is told
that its answer ends. Both give the engines' blocks back at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol
from vllm.outputs import RequestOutput

if TYPE_CHECKING:
    from vllm.v1.engine.output_processor import OutputProcessor

logger = logging.getLogger(__name__)

CLIENT_TIMEOUT_S = 60.0
"""As other HTTP servers have it for the time between two writes."""
MOST_UNREAD = 65_536
"""Of a request: tokens, each with its log-probabilities; see ``unread``. That is 25 MB at most."""

_Base: Any = AutoHTTPProtocol


def impatient(
    on_drop: Callable[[], None], timeout_s: float = CLIENT_TIMEOUT_S
) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol, for clients that may not stop reading for so long.

    on_drop: called for each connection that is closed for that.
    """

    class Impatient(_Base):
        """Looks at a connection whose buffer is full, or that is to be closed and is not."""

        _timer: asyncio.TimerHandle | None = None
        _num_left = 0

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch()

        def resume_writing(self) -> None:
            self._stop()
            super().resume_writing()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch_end()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._watch_end()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _watch_end(self) -> None:
            """A connection that is to be closed stays until its client has taken the rest."""
            if self.transport.is_closing():
                self._watch()

        def _watch(self) -> None:
            self._stop()
            self._num_left = self.transport.get_write_buffer_size()
            if self._num_left:
                self._timer = self.loop.call_later(timeout_s, self._look)

        def _look(self) -> None:
            if self.transport.get_write_buffer_size() < self._num_left:
                self._watch()  # it is slow, and reads
                return
            text = "client %s has read nothing for %g s, and is dropped"
            logger.warning(text, self.client, timeout_s)
            on_drop()
            self.transport.abort()  # not close(), which waits until everything is taken

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Impatient


def unread(processor: OutputProcessor, vocabulary: int) -> Iterator[tuple[str, int]]:
    """Return, of each stream of which something waits in its collector, one of the requests that
    it is made of, and how much waits: a token counts one, and each of its log-probabilities one
    more.

    vocabulary: how many log-probabilities -1 asks for.
    """
    for request_id, state in processor.request_states.items():
        queue = state.queue
        if queue is None or not queue.aggregate or not isinstance(queue.output, RequestOutput):
            continue
        tokens = sum(len(choice.token_ids) for choice in queue.output.outputs)
        logprobs = state.logprobs_processor.num_logprobs or 0
        yield request_id, tokens * (1 + (vocabulary if logprobs == -1 else logprobs))

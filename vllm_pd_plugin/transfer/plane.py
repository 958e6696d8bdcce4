"""The consumer's data plane on one worker rank: fetch what the scheduler has allocated.

A ``TransferPlane`` is owned by the rank's transfer thread. It knows nothing of vLLM; the worker
hands it ``FetchSpec``s and collects one ``FetchResult`` for each, whatever happens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.containment import LOOK_AGAIN_S, Containment
from vllm_pd_plugin.deadlines import Deadlines
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import RequestId
from vllm_pd_plugin.protocol.peers import MakePeers
from vllm_pd_plugin.transfer.fetch import Fetch
from vllm_pd_plugin.transfer.peer_source import PeerSource
from vllm_pd_plugin.transfer.rank import Rank
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchResult, FetchSpec

LENDING_INTERVAL_S = 0.002
"""How often a side that is being read drives its transport."""

_REMEMBERED_SUCCESSES = 4096


class TransferPlane:
    """All fetches of one rank.

    on_result: called for every spec that was handed in, once for each attempt.
    """

    def __init__(
        self, rank: Rank, make_peers: MakePeers, on_result: Callable[[FetchResult], None]
    ) -> None:
        self._contain = Containment("transfer")
        self._clock = rank.clock
        self._transport = rank.transport
        self._peers = PeerSource(rank, make_peers)
        self._on_result = on_result
        self._fetches: dict[RequestId, Fetch] = {}
        self._alarms = Deadlines[RequestId]()
        """When a fetch has something to do that nobody tells it of."""
        self._successors: dict[RequestId, FetchSpec] = {}
        """What takes the place of a fetch when it has ended."""
        self._succeeded: OrderedDict[RequestId, None] = OrderedDict()
        self._lending = False

    @property
    def control_bytes(self) -> int:
        """Of all messages to and from producers."""
        return self._peers.num_bytes

    @property
    def dropped_messages(self) -> int:
        return self._peers.dropped_messages

    @property
    def faults(self) -> int:
        """How many were caught; see ``Containment``."""
        return self._contain.faults + self._peers.faults

    def fetch(self, spec: FetchSpec) -> None:
        """Start a fetch; one that is under way for the same request, from elsewhere, ends first."""
        self._contain.each(
            "fetches", [spec], self._start, lambda spec: self.refuse(spec.request_id)
        )

    def _start(self, spec: FetchSpec) -> None:
        if spec.request_id in self._succeeded:
            return
        if before := self._fetches.get(spec.request_id):
            self._successors[spec.request_id] = spec
            self._act(before, lambda: before.fail(Reason.CANCELLED))
            return
        fetch = Fetch(spec, self._peers.open, self._clock, self._act, self._ended)
        self._fetches[spec.request_id] = fetch
        self._act(fetch, fetch.begin)

    def cancel(self, request_id: RequestId, reason: Reason) -> None:
        """End a fetch early; its result follows once nothing writes to its blocks any more."""
        if fetch := self._fetches.get(request_id):
            self._act(fetch, lambda: fetch.fail(reason))

    def refuse(self, request_id: RequestId) -> None:
        """Report a request as failed, once nothing writes to its blocks any more; unless its fetch
        has succeeded, as that has been reported."""
        if request_id in self._succeeded:
            return
        fetch = self._fetches.get(request_id)
        if fetch is None:
            self._on_result(_never_begun(request_id))
            return
        self._successors.pop(request_id, None)
        self._act(fetch, fetch.refuse)

    def set_lending(self, lending: bool) -> None:
        """Say whether peers may be reading from this rank."""
        self._lending = lending

    def turn(self) -> float | None:
        """Drive what has something to do; return for how many seconds nothing needs to be done."""
        clock, run = self._clock, self._contain.run
        again = clock() + LOOK_AGAIN_S
        if self._lending:
            run("progress", self._transport.progress, None)
        due = [self._fetches[request_id] for request_id in self._alarms.take(clock())]
        for fetch in due:
            if fetch.result is None:  # losing a peer ends others too
                self._act(fetch, fetch.poll)
        peers_due_at = run("peers", self._peers.tick, again)
        run("making room", self._peers.use_room, None)  # one that is lost gives some back
        due_at = [peers_due_at, self._alarms.next()]
        waits = [at - clock() for at in due_at if at is not None]
        if self._lending:
            waits.append(LENDING_INTERVAL_S)
        return max(0.0, min(waits)) if waits else None

    def _act(self, fetch: Fetch, act: Callable[[], None]) -> None:
        """Let something happen to a fetch, which may wait for another thing then. A fault ends it:
        it may have taken for done what was not."""
        self._contain.each("fetches", [fetch], lambda _: act(), Fetch.give_up)
        self._set_alarm(fetch)

    def _set_alarm(self, fetch: Fetch) -> None:
        request_id = fetch.spec.request_id
        if self._fetches.get(request_id) is fetch:
            wait_s = self._contain.run("fetches", fetch.wait_s, LOOK_AGAIN_S)
            self._alarms.set(request_id, self._clock() + wait_s)

    def close(self) -> None:
        """Fail what is open and disconnect."""
        self._successors.clear()
        error = PeerError(Reason.CANCELLED, "this engine is shutting down")
        self._peers.close_connections(error)
        for fetch in list(self._fetches.values()):
            self._act(fetch, partial(fetch.fail, error.reason))
        self._lending = False
        self._peers.close()
        self._transport.close()

    def _ended(self, fetch: Fetch, result: FetchResult) -> None:
        request_id = fetch.spec.request_id
        del self._fetches[request_id]
        self._alarms.remove(request_id)
        if successor := self._successors.pop(request_id, None):
            self.fetch(successor)
            return
        if result.reason is None and not result.is_last:  # others may be told to try elsewhere
            self._succeeded[request_id] = None
            while len(self._succeeded) > _REMEMBERED_SUCCESSES:
                self._succeeded.popitem(last=False)
        self._on_result(result)


def _never_begun(request_id: RequestId) -> FetchResult:
    return FetchResult(request_id, Reason.INTERNAL, FetchCounts(), Codec.RAW, 0.0, 0)

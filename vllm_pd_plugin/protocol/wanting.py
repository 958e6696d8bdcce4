"""The consumer's half of the control plane: it asks for handoffs, keeps them alive, and gives up.

Owned by the engine's control thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from vllm_pd_plugin.containment import LOOK_AGAIN_S, Containment
from vllm_pd_plugin.deadlines import Deadlines
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.ids import Address, RequestId, Source
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.events import Event, Lost, Offered
from vllm_pd_plugin.protocol.peers import MakePeers, Peer
from vllm_pd_plugin.protocol.wants import ConsumerTable, Wanted, WantEvent

_HEARTBEATS_PER_LEASE = 4
_MAX_HEARTBEAT_INTERVAL_S = 1.0


class Wanting:
    """What this engine wants of others.

    fits: raises PeerError where what a peer says of itself does not fit this engine.
    emit: takes each event.
    """

    def __init__(
        self,
        make_peers: MakePeers,
        fits: Callable[[wire.Welcome], None],
        queue_timeout_s: float,
        emit: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        self._contain = Containment("what is wanted")
        self._fits = fits
        self._queue_timeout_s = queue_timeout_s
        self._emit = emit
        self._clock = clock
        self._consuming = ConsumerTable()
        self._peers = make_peers(self)
        self._heartbeats = Deadlines[Address]()
        self._cancels: dict[Address, list[Source]] = {}
        """What is to be told to who is there, once that is known."""

    def __len__(self) -> int:
        return len(self._consuming)

    @property
    def num_bytes(self) -> int:
        """Of all messages to and from producers."""
        return self._peers.num_bytes

    @property
    def dropped_messages(self) -> int:
        return self._peers.dropped_messages

    @property
    def faults(self) -> int:
        return self._contain.faults + self._peers.faults

    def want(self, request_id: RequestId, source: Source) -> None:
        """Ask for a handoff; an ``Offered`` or ``Lost`` event follows."""
        deadline = self._clock() + self._queue_timeout_s
        wanted = self._consuming.want(request_id, source, deadline)
        if wanted is None:
            text = "another request already fetches this handoff"
            self._emit(Lost(request_id, Reason.BAD_PARAMS, text, source))
            return
        peer = self._peers.get(source.address)
        if peer is None:
            return
        if source.address not in self._heartbeats:
            self._heartbeats.set(source.address, self._clock() + _interval_s(peer))
        if source.incarnation in (None, peer.incarnation):
            self._ask(peer)
        else:
            self._peers.refresh(source.address)

    def allocated(self, request_id: RequestId) -> None:
        """The request has its blocks; its workers fetch."""
        self._consuming.allocated(request_id)

    def close(self, request_id: RequestId, cancel: bool) -> None:
        """The handoff is over for a request; ``cancel`` tells the producer to let go."""
        wanted = self._forget(request_id)
        if wanted is None or not cancel:
            return
        source = wanted.source
        peer = self._peers.get(source.address)
        if peer is not None and source.incarnation in (None, peer.incarnation):
            self._cancel(peer, source)
            return
        self._cancels.setdefault(source.address, []).append(source)
        if peer is not None:
            self._peers.refresh(source.address)

    def turn(self) -> float | None:
        """Do what is due; return when to call again (absolute), or None."""
        duties: dict[str, Callable[[], float | None]] = {
            "peers": self._peers.tick,
            "heartbeats": self._beat,
            "what is overdue": self._give_up,
        }
        again = self._clock() + LOOK_AGAIN_S
        due = [self._contain.run(name, duty, again) for name, duty in duties.items()]
        return min((at for at in due if at is not None), default=None)

    def look_again(self) -> None:
        """What this engine's KV is has changed: peers that do not fit any more are lost."""
        self._peers.check_all()

    def give_up_all(self, reason: Reason, text: str) -> None:
        """Nothing that was offered until now is of use any more."""
        for wanted in self._consuming.all():
            if not wanted.is_offered:
                continue
            self._emit(Lost(wanted.request_id, reason, text, wanted.source))
            self.close(wanted.request_id, cancel=True)

    def shut_down(self) -> None:
        self._peers.close()

    # --- what becomes of peers ---------------------------------------------------------------

    def check_fit(self, welcome: wire.Welcome) -> None:
        self._fits(welcome)

    def peer_ready(self, address: Address, peer: Peer) -> None:
        # An introduction puts none off.
        if self._consuming.is_wanted_from(address) and address not in self._heartbeats:
            self._heartbeats.set(address, self._clock() + _interval_s(peer))
        self._cancel_all(peer)
        self._ask(peer)

    def peer_lost(self, address: Address, error: PeerError) -> None:
        restarted = error.reason is Reason.PEER_RESTARTED
        if not restarted:
            self._cancels.pop(address, None)
        waits = address in self._cancels
        for wanted in self._consuming.at(address):
            if restarted and (not wanted.is_asked or wanted.ask_again()):
                waits = True
            else:
                self._lose(wanted.request_id, error.reason, str(error))
        if restarted and waits:
            self._peers.get(address)  # something is meant for the new incarnation

    def peer_replied(self, peer: Peer, message: wire.Message) -> None:
        match message:
            case wire.Offer():
                self._offered(peer, message)
            case wire.Refuse(handoff_id, reason):
                if wanted := self._consuming.get(handoff_id):
                    self._lose(wanted.request_id, reason, f"the producer refused: {reason}")
            case wire.Alive(lost):
                for handoff_id, reason in lost.items():
                    if wanted := self._consuming.get(handoff_id):
                        # It may have begun to compute for us all the same.
                        self._cancel(peer, wanted.source)
                        text = "the producer no longer holds the handoff"
                        self._lose(wanted.request_id, reason, text)

    def needs_peer(self, address: Address) -> bool:
        return address in self._cancels or self._consuming.is_wanted_from(address)

    def peer_let_go(self, address: Address) -> None:
        """Nothing is kept of a peer here."""

    # --- inside --------------------------------------------------------------------------------

    def _ask(self, peer: Peer) -> None:
        for wanted in self._consuming.at(peer.address):
            if wanted.is_asked:
                continue
            if wanted.source.incarnation is None:
                wanted.source = dataclasses.replace(wanted.source, incarnation=peer.incarnation)
            if wanted.source.incarnation != peer.incarnation:
                self._lose(wanted.request_id, Reason.PEER_RESTARTED, "the producer was restarted")
                continue
            wanted.follow(WantEvent.ASK)
            # No answer is due before the producer has its request; heartbeats tell that it lives.
            want = wire.Want(wanted.source.handoff_id)
            self._peers.send(peer, want, expects_answer=False)

    def _give_up(self) -> float | None:
        """End what has waited too long for its KV or for blocks; return when to look again."""
        overdue = self._consuming.overdue(self._clock())
        self._contain.each("what is overdue", overdue, self._end_overdue)
        return self._consuming.next_deadline()

    def _end_overdue(self, wanted: Wanted) -> None:
        missing = "free blocks here" if wanted.is_offered else "offer from the producer"
        text = f"no {missing} within {self._queue_timeout_s:g} s"
        self._emit(Lost(wanted.request_id, Reason.QUEUE_TIMEOUT, text, wanted.source))
        self.close(wanted.request_id, cancel=True)

    def _beat(self) -> float | None:
        """Send the heartbeats that are due; return when the next one is."""
        now = self._clock()
        due = self._heartbeats.take(now)
        self._contain.each("heartbeats", due, partial(self._beat_at, now))
        return self._heartbeats.next()

    def _beat_at(self, now: float, address: Address) -> None:
        peer = self._peers.get(address)
        if peer is None:  # until it has introduced itself
            return
        self._heartbeats.set(address, now + _interval_s(peer))
        if asked := self._consuming.asked_at(address):
            self._peers.send(peer, wire.Heartbeat(asked))

    def _cancel(self, peer: Peer, source: Source) -> None:
        if source.incarnation in (None, peer.incarnation):
            self._peers.send(peer, wire.Cancel(source.handoff_id), expects_answer=False)

    def _cancel_all(self, peer: Peer) -> None:
        for source in self._cancels.pop(peer.address, ()):
            self._cancel(peer, source)

    def _offered(self, peer: Peer, offer: wire.Offer) -> None:
        if offer.revision == peer.welcome.revision:
            if wanted := self._consuming.offered(offer.handoff_id, peer.incarnation):
                found = Offered(wanted.request_id, wanted.source, offer.num_tokens, offer.prompt)
                self._emit(found)
            return
        # Its KV may not be any more what it said it was: who is there is asked first.
        wanted = self._consuming.get(offer.handoff_id)
        if wanted is None or wanted.is_offered or wanted.source.incarnation != peer.incarnation:
            return
        if wanted.doubt():
            self._peers.refresh(peer.address)
        else:
            text = "the producer does not say what its KV is"
            self._lose(wanted.request_id, Reason.PEER_INCOMPATIBLE, text)

    def _lose(self, request_id: RequestId, reason: Reason, message: str) -> None:
        wanted = self._forget(request_id)
        self._emit(Lost(request_id, reason, message, wanted.source if wanted else None))

    def _forget(self, request_id: RequestId) -> Wanted | None:
        wanted = self._consuming.close(request_id)
        if wanted is not None and not self._consuming.is_wanted_from(wanted.source.address):
            self._heartbeats.remove(wanted.source.address)
        return wanted


def _interval_s(peer: Peer) -> float:
    """Return how often a peer hears that its handoffs are still wanted."""
    return min(peer.welcome.lease_s / _HEARTBEATS_PER_LEASE, _MAX_HEARTBEAT_INTERVAL_S)

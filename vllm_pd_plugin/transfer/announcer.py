"""Per process: a worker rank tells its own engine's control plane how far the forward pass is, what
its blocks contain, and which pieces are packed.

An ``Announcer`` is owned by the rank's transfer thread. The hooks in the forward pass only hand it
``Mark``s; on a GPU a mark counts once its stream has come to it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable

from vllm_pd_plugin.containment import Containment
from vllm_pd_plugin.ids import Address, Incarnation
from vllm_pd_plugin.packing.packer import Packer
from vllm_pd_plugin.protocol import framing, wire
from vllm_pd_plugin.protocol.peers import Channel, Connect
from vllm_pd_plugin.transfer.rank import Digest

POLL_INTERVAL_S = 0.0005


@dataclasses.dataclass(frozen=True, slots=True)
class Announcement:
    """What the scheduler wants to hear of one step.

    after_layers: for each pipeline stage numbers of its layers, in the order of the forward pass,
        after which to announce; the last is that of all its layers.
    """

    step: int
    after_layers: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """The first ``num_layers`` layers of a step are written, once ``is_reached`` says so."""

    announcement: Announcement
    num_layers: int
    is_reached: Callable[[], bool]


class Announcer:
    """Sends ``wire.Announce`` for each mark, in order; and ``wire.Nudge``. Answers ``wire.Examine``
    and, where there is a packer, ``wire.Stage``."""

    def __init__(
        self,
        incarnation: Incarnation,
        rank: int,
        digest: Digest,
        packer: Packer | None,
        connect: Connect,
    ) -> None:
        self._contain = Containment("announcer")
        self._incarnation = incarnation
        self._rank = rank
        self._digest = digest
        self._packer = packer
        self._connect = connect
        self._channel: Channel | None = None
        self._address: Address | None = None
        self._control = Incarnation("")
        self._marks: deque[Mark] = deque()

    def connect(self, control: Address, incarnation: Incarnation) -> None:
        """Take the engine's own control channel and its incarnation; before anything else.

        The control channel learns where this rank is: a step 0 is none of an engine's."""
        self._address, self._control = control, incarnation
        self._contain.run("connecting", self._open, None)

    def _open(self) -> None:
        if self._address is not None:
            self._channel = self._connect(self._address, self._receive)
            self._send(wire.Announce(0, self._rank, 0))

    @property
    def faults(self) -> int:
        """How many were caught; see ``Containment``."""
        packed = self._packer.faults if self._packer is not None else 0
        return self._contain.faults + packed

    def nudge(self) -> None:
        """Wake an engine that only waits."""
        self._send(wire.Nudge())

    def add(self, mark: Mark) -> None:
        self._marks.append(mark)

    def turn(self) -> float | None:
        """Announce what has been reached, and pack a piece; return for how many seconds nothing
        needs to be done."""
        if self._channel is None:
            self._contain.run("connecting", self._open, None)
        while self._marks:
            reached = self._contain.run("a mark", self._marks[0].is_reached, None)
            if reached is False:
                break
            mark = self._marks.popleft()
            if reached:  # one that cannot be asked is passed over: later ones say more
                step = mark.announcement.step
                self._send(wire.Announce(step, self._rank, mark.num_layers))
        if self._packer is not None and (staged := self._packer.turn()):
            self._send(staged)
            return 0.0  # there may be more to pack
        is_writing = self._packer is not None and self._packer.is_writing
        return POLL_INTERVAL_S if self._marks or is_writing else None

    def set_lending(self, lending: bool) -> None:
        """Say whether consumers may want anything of this rank."""
        if self._packer is not None and not lending:
            self._packer.clear()

    def _receive(self, frames: list[bytes]) -> None:
        _, message = framing.decode(frames)
        match message:
            case wire.Examine(check, tables):
                digest = self._digest(tables, check.first_token, check.num_tokens)
                self._send(wire.Examined(check, digest))
            case wire.Stage() if self._packer is not None:
                self._packer.stage(message)
            case wire.Unstage() if self._packer is not None:
                self._packer.unstage(message)

    def _send(self, message: wire.FromWorker) -> None:
        if channel := self._channel:
            # What cannot be sent is a message lost.
            frames = framing.encode(message, self._incarnation, self._control)
            self._contain.run("sending", lambda: channel.send(frames), None)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()


def layers_worth_a_message(
    num_layers: int, layer_bytes: int, stretch_bytes: int
) -> tuple[int, ...]:
    """Return after which numbers of layers to announce, so that each stretch is of
    ``stretch_bytes`` or somewhat more, when every layer adds ``layer_bytes``.

    The last is ``num_layers``; what remains at the end is spread, rather than a stretch of its own.
    """
    enough = -(-stretch_bytes // layer_bytes) if layer_bytes else num_layers
    stretches = max(1, num_layers // max(1, enough))
    return tuple(num_layers * (i + 1) // stretches for i in range(stretches))

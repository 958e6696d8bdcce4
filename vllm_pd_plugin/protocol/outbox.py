"""Answers that wait for the end of a turn; those to one peer go out together.

A step of the engine says something about each of its prompts, and one peer may be the consumer of
many of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from vllm_pd_plugin.containment import Containment
from vllm_pd_plugin.ids import Incarnation
from vllm_pd_plugin.protocol import framing, wire

_MAX_BATCH = 256


class ReturnAddress(NamedTuple):
    """Where an answer goes: the channel's opaque identity of a consumer, its incarnation, and the
    version that it speaks."""

    identity: bytes
    incarnation: Incarnation
    version: int = framing.PROTOCOL_VERSION


Answer = tuple[ReturnAddress, wire.Reply]
"""To whom, and what."""

Sendable = wire.Reply | framing.Encoded


class Outbox:
    """Keeps the order of what goes to one peer.

    send(identity, frames): sends to a peer that has spoken to us.
    """

    def __init__(
        self,
        sender: Incarnation,
        send: Callable[[bytes, list[bytes]], None],
        contain: Containment,
    ) -> None:
        self._sender = sender
        self._send = send
        self._contain = contain
        self._waiting: dict[ReturnAddress, list[Sendable]] = {}

    def add(self, who: ReturnAddress, message: Sendable) -> None:
        self._waiting.setdefault(who, []).append(message)

    def flush(self) -> None:
        """Send everything."""
        waiting, self._waiting = self._waiting, {}
        for who, messages in waiting.items():
            self._send_all(who, messages)

    def _send_all(self, who: ReturnAddress, messages: Sequence[Sendable]) -> None:
        for message in _batched(messages):
            sent = self._contain.run("answering", partial(self._send_one, who, message), False)
            if not sent and isinstance(message, wire.Batch):  # one fault is to cost one message
                for one in message.messages:
                    self._contain.run("answering", partial(self._send_one, who, one), False)

    def _send_one(self, who: ReturnAddress, message: Sendable) -> bool:
        # What cannot be sent is a message lost, and whoever waits for it asks again.
        frames = framing.encode(message, self._sender, who.incarnation, who.version)
        self._send(who.identity, frames)
        return True


def _batched(
    messages: Sequence[Sendable],
) -> list[Sendable]:
    """Return the same, with answers that follow each other put together."""
    result: list[Sendable] = []
    answers: list[wire.Answer] = []
    for message in messages:
        if isinstance(message, wire.Answer):
            answers.append(message)
            continue
        result += [*_batches(answers), message]
        answers = []
    return result + _batches(answers)


def _batches(answers: Sequence[wire.Answer]) -> list[Sendable]:
    if len(answers) < 2:
        return list(answers)
    starts = range(0, len(answers), _MAX_BATCH)
    return [wire.Batch(tuple(answers[start : start + _MAX_BATCH])) for start in starts]

"""The identifiers that cross module and process borders."""

from __future__ import annotations

import dataclasses
import secrets
from typing import NewType

BlockId = int
"""Index of a KV block in one KV cache group's block table."""

NULL_BLOCK: BlockId = 0
"""vLLM's placeholder for a block that a request no longer needs (``BlockPool.null_block``)."""

RequestId = str
"""vLLM's internal request id; unique in one engine while the request lives."""

OwnerId = str
"""What holds an export calls it by; of a request that is handed off, its RequestId."""

HandoffId = NewType("HandoffId", str)
"""Names one handoff for ever: 128 random bits, so that nobody can guess another request's."""

Incarnation = NewType("Incarnation", str)
"""An engine's boot id: 64 random bits, new at every start of the process; in every message."""

EngineId = str
"""vLLM's ``kv_transfer_config.engine_id``; for logs; an engine is told apart by its incarnation."""

Address = tuple[str, int]
"""Host and port of an engine's control channel."""


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a consumer is to fetch a handoff from.

    incarnation: None when the dispatcher does not know it; whoever answers first is meant.
    """

    handoff_id: HandoffId
    address: Address
    incarnation: Incarnation | None


def new_handoff_id() -> HandoffId:
    """Return a fresh, unguessable handoff id (32 hexadecimal digits)."""
    return HandoffId(secrets.token_hex(16))


def new_incarnation() -> Incarnation:
    """Return a fresh boot id (16 hexadecimal digits)."""
    return Incarnation(secrets.token_hex(8))

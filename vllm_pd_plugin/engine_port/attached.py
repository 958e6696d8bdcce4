"""A frontend that is attached to an engine, and the requests that it has under way there."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from vllm_pd_plugin.ids import Incarnation, RequestId

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """How far a request is on its way into the core; two threads look at it, under one lock.

    number: that its frontend has given it. needs_adapter: it waits until one is loaded.
    """

    number: int = 0
    is_in_core: bool = False
    is_given_up: bool = False
    needs_adapter: bool = False


@dataclasses.dataclass(slots=True, eq=False)
class AttachedFrontend:
    """identity: of the connection on which it has attached.

    last_add: the number of its last request that has come.
    grammars: requests whose grammar may yet turn out to be none.
    """

    name: str
    incarnation: Incarnation
    client_index: int
    identity: bytes
    expires_at: float
    num_outputs: int = 0
    last_add: int = 0
    open: dict[RequestId, Entry] = dataclasses.field(default_factory=dict)
    grammars: dict[RequestId, Request] = dataclasses.field(default_factory=dict)

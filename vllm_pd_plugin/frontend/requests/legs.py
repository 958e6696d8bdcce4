"""The requests that engines get for one request of a client; pure.

Each engine's part is a leg. A prefill leg computes the prompt and samples one token; a decode leg
takes the prompt's KV over and goes on; a whole leg does everything on one engine.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from typing import TYPE_CHECKING, Any

from vllm_pd_plugin.ids import Address, HandoffId, RequestId

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from vllm_pd_plugin.frontend.routing.choice import EngineKey


class LegKind(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    WHOLE = "whole"


@dataclasses.dataclass(slots=True, eq=False)
class Leg:
    """One engine's part in one attempt.

    num_tokens: length of its prompt. uncached: how much of that is likely not to be cached there;
    None: all of it. begun_at: since when its engine is known to work on it; 0 while it waits there.
    is_preempted: it has given something out, and waits again.
    """

    id: RequestId
    engine: EngineKey
    kind: LegKind
    num_tokens: int
    started_at: float
    has_output: bool = False
    begun_at: float = 0.0
    is_preempted: bool = False
    uncached: int | None = None

    @property
    def to_compute(self) -> int:
        return self.num_tokens if self.uncached is None else self.uncached

    @property
    def is_waiting(self) -> bool:
        """Whether it waits in its engine's queue, as far as is known."""
        return self.is_preempted if self.has_output else not self.begun_at


@dataclasses.dataclass(frozen=True, slots=True)
class Handoff:
    """A handoff between two legs. address: the prefill engine's control channel.

    seeds: whether the decode engine goes on after the token that the prefill engine samples.
    """

    id: HandoffId
    address: Address
    incarnation: str
    seeds: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What is left to do of a client's request: its prompt, with tokens that the client has got
    already, if the request goes on after them, and how many more there may be."""

    request: EngineCoreRequest
    prompt: list[int]
    max_tokens: int


def prefill_leg(work: Work, leg_id: RequestId, handoff: Handoff) -> EngineCoreRequest:
    """Return the prefill engine's part."""
    produce = {"do_remote_decode": True, "handoff_id": handoff.id}
    if handoff.seeds:
        params = _with_params(work, produce)
    else:
        # Its token is not used: the simplest sampling will do.
        params = type(_params(work))(temperature=0.0, detokenize=False)
        params.extra_args = {"kv_transfer_params": produce}
    params.max_tokens = 1
    return _leg(work, leg_id, params)


def decode_leg(work: Work, leg_id: RequestId, handoff: Handoff) -> EngineCoreRequest:
    """Return the decode engine's part."""
    consume: dict[str, Any] = {
        "do_remote_prefill": True,
        "remote_host": handoff.address[0],
        "remote_port": handoff.address[1],
        "remote_incarnation": handoff.incarnation,
        "remote_handoff_id": handoff.id,
    }
    if handoff.seeds:
        consume["seed_first_token"] = True
    if (codec := client_codec(work.request)) is not None:
        consume["codec"] = codec
    params = _with_params(work, consume)
    params.max_tokens = work.max_tokens - (1 if handoff.seeds else 0)
    return _leg(work, leg_id, params)


def whole_leg(work: Work, leg_id: RequestId) -> EngineCoreRequest:
    """Return the one engine's part that does everything."""
    params = _with_params(work, None)
    params.max_tokens = work.max_tokens
    return _leg(work, leg_id, params)


def client_codec(request: EngineCoreRequest) -> Any:
    """Return the codec that the client asks for, if any."""
    assert request.sampling_params is not None
    wanted = (request.sampling_params.extra_args or {}).get("kv_transfer_params") or {}
    return wanted.get("codec")


def _params(work: Work) -> SamplingParams:
    assert work.request.sampling_params is not None
    return work.request.sampling_params


def _with_params(work: Work, transfer: dict[str, Any] | None) -> SamplingParams:
    params = copy.copy(_params(work))
    arguments = {k: v for k, v in (params.extra_args or {}).items() if k != "kv_transfer_params"}
    if transfer is not None:
        arguments["kv_transfer_params"] = transfer
    params.extra_args = arguments or None
    return params


def _leg(work: Work, leg_id: RequestId, params: SamplingParams) -> EngineCoreRequest:
    leg = copy.copy(work.request)
    leg.request_id = leg_id
    leg.external_req_id = None
    leg.prompt_token_ids = work.prompt
    leg.sampling_params = params
    return leg

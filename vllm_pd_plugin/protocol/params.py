"""``kv_transfer_params``: the ecosystem's per-request protocol, which arrives from outside.

A router asks a producer with ``do_remote_decode``, gets the parameters of a handoff back with
the answer, and passes them to a consumer with ``do_remote_prefill``. The keys that we share with
vLLM's NixlConnector keep their names. Block ids never travel this way: a consumer learns them
from the producer itself, so no client can name another request's blocks.

A dispatcher that need not wait chooses a handoff id itself and asks both at the same moment: the
producer with ``do_remote_decode`` and ``handoff_id``, the consumer with ``do_remote_prefill``,
``remote_host``, ``remote_port`` (the producer's control channel) and ``remote_handoff_id``. An id
is used once: a request with one that has ended before is ended with an error. With
``remote_alternatives``, a list of further places, the consumer turns to the next when one fails;
the dispatcher sends the producer's request there, with the same id.

With ``seed_first_token`` the consumer goes on after the token that the producer has sampled: its
first output is the second token, and ``max_tokens`` counts from there. Only the dispatcher knows
whether the request's sampling allows that. Such a request is never computed afresh here when its
handoff fails: it ends with an error, whatever the failure policy, and the dispatcher decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vllm_pd_plugin.codecs.codec import AUTO, Codec, CodecChoice
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.errors import ParamsError
from vllm_pd_plugin.ids import Address, EngineId, HandoffId, Incarnation, RequestId, Source
from vllm_pd_plugin.net.hosts import is_host, is_loopback

MAX_ALTERNATIVES = 8
_HANDOFF_ID = re.compile(r"[0-9a-f]{32}")
_INCARNATION = re.compile(r"[0-9a-f]{16}")


def wants_to_produce(params: Mapping[str, Any] | None) -> bool:
    """Say whether the request's KV is to be handed off. Raises ParamsError."""
    return _flag(params, "do_remote_decode")


def parse_handoff_id(params: Mapping[str, Any] | None) -> HandoffId | None:
    """Return the id that a dispatcher chose for what the request produces, so that it could tell
    the consumer at the same time; None when the producer is to choose. Raises ParamsError."""
    if params is None or params.get("handoff_id") is None:
        return None
    return HandoffId(_matching(params, "handoff_id", _HANDOFF_ID))


def parse_sources(params: Mapping[str, Any] | None, trusted_network: bool) -> tuple[Source, ...]:
    """Return where the request's KV is to be fetched from, the first choice first; empty when it is
    not.

    trusted_network: whether peers are authenticated; without, only loopback is allowed.

    Raises:
        ParamsError: a key is absent, of the wrong type, or not allowed.
    """
    if params is None or not _flag(params, "do_remote_prefill"):
        return ()
    if _flag(params, "do_remote_decode"):
        raise ParamsError("do_remote_prefill and do_remote_decode exclude each other")
    handoff_id = HandoffId(_matching(params, "remote_handoff_id", _HANDOFF_ID))
    others = params.get("remote_alternatives") or []
    if not isinstance(others, list) or len(others) > MAX_ALTERNATIVES:
        raise ParamsError(
            f"remote_alternatives={_short(others)} is not a list of at most {MAX_ALTERNATIVES}"
        )
    if not all(isinstance(other, Mapping) for other in others):
        raise ParamsError(f"remote_alternatives={_short(others)} is not a list of objects")
    return tuple(_source(each, handoff_id, trusted_network) for each in (params, *others))


def wants_seed(params: Mapping[str, Any] | None) -> bool:
    """Say whether a consumer is to go on after the token that the producer sampled, instead of
    sampling that one again. Raises ParamsError."""
    return _flag(params, "seed_first_token")


def parse_codec(params: Mapping[str, Any] | None, config: PdConfig) -> CodecChoice:
    """Return the codec that a request asks for, or else that of the configuration.

    Raises:
        ParamsError: it is not known, or narrower than the operator allows.
    """
    narrowest = config.narrowest
    wanted = None if params is None else params.get("codec")
    name = config.codec if wanted is None else wanted
    allowed = allowed_codecs(config)
    if name not in allowed:
        raise ParamsError(
            f"codec={_short(name)} is not allowed here; allowed are {', '.join(allowed)}"
        )
    return CodecChoice(None if name == AUTO else Codec(name), narrowest)


def allowed_codecs(config: PdConfig) -> tuple[str, ...]:
    """Return what a request may ask for."""
    narrowest = config.narrowest
    return (AUTO, *(codec.value for codec in Codec if codec.rank <= narrowest.rank))


def _source(place: Mapping[str, Any], handoff_id: HandoffId, trusted_network: bool) -> Source:
    host = place.get("remote_host")
    if not isinstance(host, str) or not is_host(host):
        raise ParamsError(f"remote_host={_short(host)} is absent or no host")
    if not trusted_network and not is_loopback(host):
        raise ParamsError(f"remote_host={host!r} is not loopback, and no cluster key is set")
    port = place.get("remote_port")
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
        raise ParamsError(f"remote_port={_short(port)} is not a port")
    incarnation = None
    if place.get("remote_incarnation") is not None:
        incarnation = Incarnation(_matching(place, "remote_incarnation", _INCARNATION))
    return Source(handoff_id, (host, port), incarnation)


def describe_handoff(
    source: Source, engine_id: EngineId, request_id: RequestId, num_tokens: int, tp_size: int
) -> dict[str, Any]:
    """Return the parameters that a consumer needs, to be sent with the producer's answer."""
    address: Address = source.address
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": engine_id,
        "remote_request_id": request_id,
        "remote_host": address[0],
        "remote_port": address[1],
        "remote_handoff_id": source.handoff_id,
        "remote_incarnation": source.incarnation,
        "remote_num_tokens": num_tokens,
        "tp_size": tp_size,
    }


def _flag(params: Mapping[str, Any] | None, name: str) -> bool:
    if params is not None and not isinstance(params, Mapping):
        # OpenAI's API types them, but `vllm_xargs` lets a client put any JSON value here.
        raise ParamsError(f"kv_transfer_params={_short(params)} is not an object")
    value = None if params is None else params.get(name)
    if value is not None and not isinstance(value, bool):
        raise ParamsError(f"{name}={_short(value)} is neither true nor false")
    return bool(value)


def _matching(params: Mapping[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    value = params.get(name)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ParamsError(f"{name}={_short(value)} is absent or malformed")
    return value


def _short(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number or a nesting too large to print
        return f"({type(value).__name__})"
    return text if len(text) <= 60 else text[:57] + "..."

"""What a client is told in the place of an answer: that its request is refused, or has failed."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from vllm_pd_plugin.codecs.codec import AUTO
from vllm_pd_plugin.frontend.admission import Refusal
from vllm_pd_plugin.frontend.requests.endings import Ending

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

_CLIENT_PARAMS = {"codec"}
"""What a client may say in ``kv_transfer_params``; the rest is between frontend and engines."""

_FAILURES = {
    Ending.NO_ENGINE: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "no engine that could take the request came up in time; try again later",
    ),
    Ending.OVERLOADED: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "all engines have too much to do; try again later",
    ),
    Ending.SHUTDOWN: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "this frontend is shutting down; try another one",
    ),
    Ending.ATTEMPTS_EXHAUSTED: (
        HTTPStatus.BAD_GATEWAY,
        "several engines failed one after another; try again",
    ),
    Ending.NOT_REPLAYABLE: (
        HTTPStatus.BAD_GATEWAY,
        "the engine was lost, and what it had sampled cannot be sampled again: penalties or "
        "structured output at a temperature above 0 need a seed for that",
    ),
    Ending.REPLAY_DIFFERS: (
        HTTPStatus.BAD_GATEWAY,
        "the engine was lost, and another one sampled something else",
    ),
    Ending.DEADLINE: (HTTPStatus.GATEWAY_TIMEOUT, "the request took longer than is allowed"),
    Ending.REFUSED: (HTTPStatus.BAD_REQUEST, "the engines refuse the request"),
    Ending.SUSPECT: (
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "two engines were lost one after the other while they worked on this request, so it is not "
        "tried on a third; see their logs before you send it again",
    ),
    Ending.UNREAD: (
        HTTPStatus.REQUEST_TIMEOUT,
        "the answer is read much more slowly than it is written; read faster, or ask for fewer "
        "log-probabilities",
    ),
    Ending.UNSENDABLE: (
        HTTPStatus.BAD_REQUEST,
        "the request has a number or a text in it that cannot be sent",
    ),
    Ending.INTERNAL: (HTTPStatus.INTERNAL_SERVER_ERROR, "the frontend failed; see its log"),
}
_REFUSALS = {
    Refusal.OVERLOADED: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "too many requests wait already; try again later, or another frontend",
    ),
    Refusal.FRONTEND_OVERLOADED: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "overloaded: this frontend is late with what it has to do; try again later, or another "
        "frontend",
    ),
    Refusal.OVER_SHARE: (
        HTTPStatus.TOO_MANY_REQUESTS,
        "too many of your requests wait already, and those of others do, too; try again later",
    ),
    Refusal.STOPPING: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "this frontend is shutting down; try another one",
    ),
}


class PoolError(GracefulHTTPError):
    """A request ended without an answer."""

    def __init__(self, ending: Ending, detail: str = "") -> None:
        status, text = _FAILURES[ending]
        super().__init__(f"{text}: {detail}" if detail else text, status)


def refusal(why: Refusal) -> GracefulHTTPError:
    """Return what a request ends with that is turned away."""
    status, text = _REFUSALS[why]
    return GracefulHTTPError(text, status)


def refuse_transfer_params(
    extra_args: Mapping[str, Any], allowed_codecs: Callable[[], Collection[str]]
) -> None:
    """Refuse what a client may not say to the connector.

    allowed_codecs: returns those that every engine allows. Raises VLLMValidationError.
    """
    transfer = extra_args.get("kv_transfer_params")
    if transfer is None:
        return
    if not isinstance(transfer, dict) or set(transfer) - _CLIENT_PARAMS:
        text = f"kv_transfer_params may hold {', '.join(_CLIENT_PARAMS)}, and nothing else"
        raise VLLMValidationError(text, parameter="kv_transfer_params")
    codecs = allowed_codecs()
    if transfer.get("codec", AUTO) not in codecs:
        text = f"codec must be one of {', '.join(sorted(codecs))}"
        raise VLLMValidationError(text, parameter="kv_transfer_params")

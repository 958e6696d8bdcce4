"""Requests of clients, what engines make of them, and a dispatcher that notes what it is told."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from tests.fakes.clock import FakeClock
from vllm_pd_plugin.ids import Address

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

    from vllm_pd_plugin.frontend.requests.blame import Blame
    from vllm_pd_plugin.frontend.requests.course import Course
    from vllm_pd_plugin.frontend.requests.endings import Ending, Failure
    from vllm_pd_plugin.frontend.requests.legs import Leg, LegKind
    from vllm_pd_plugin.frontend.routing.choice import EngineKey, Pair, Reason, Route, Unroutable

PROMPT = [11, 12, 13, 14]
P, D = "http://prefill:8000", "http://decode:8000"
DISAGGREGATED = Route(P, D, Reason.DISAGGREGATED)
WHOLE = Route(None, D, Reason.NO_PREFILL)


def make_request(
    request_id: str = "r", prompt: Sequence[int] = PROMPT, max_tokens: int = 8, **sampling: Any
) -> EngineCoreRequest:
    """A request as vLLM's API server makes it; greedy, unless the sampling says otherwise."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **sampling})
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id=f"{request_id} as the client calls it",
    )


def sampling_of(request: EngineCoreRequest) -> SamplingParams:
    assert request.sampling_params is not None
    return request.sampling_params


def transfer_of(request: EngineCoreRequest) -> dict[str, Any] | None:
    """What a request says to the connector of the engine that gets it."""
    transfer = (sampling_of(request).extra_args or {}).get("kv_transfer_params")
    assert transfer is None or isinstance(transfer, dict)
    return transfer


def control_address(engine: EngineKey) -> tuple[Address, str]:
    return (f"control of {engine}", 7000), f"life of {engine}"


class FakeDispatcher:
    """Does nothing by itself; a course must never be told of a leg twice.

    next_route: where the next attempt goes.
    sent: each leg, and what its engine got. dropped: each leg, and whether its engine is told.
    blamed, counted: which engines may be at fault for each failure, and whose breaker counts it.
    """

    def __init__(self, route: Route | Unroutable = DISAGGREGATED) -> None:
        self.clock = FakeClock()
        self.next_route = route
        self.sent: list[tuple[Leg, EngineCoreRequest]] = []
        self.dropped: list[tuple[Leg, bool]] = []
        self.emitted: list[EngineCoreOutput] = []
        self.retries: list[Failure] = []
        self.blamed: list[set[EngineKey]] = []
        self.counted: list[EngineKey | Pair | None] = []
        self.queued: list[Unroutable] = []
        self.endings: list[Ending | None] = []

    # --- the protocol

    def now(self) -> float:
        return self.clock()

    def route(self, course: Course) -> Route | Unroutable:
        return self.next_route

    def control_address(self, engine: EngineKey) -> tuple[Address, str]:
        return control_address(engine)

    def send(self, course: Course, leg: Leg, request: EngineCoreRequest) -> None:
        assert leg.id == request.request_id
        assert leg.id not in {before.id for before, _ in self.sent}, "a leg was sent twice"
        self.sent.append((leg, request))

    def drop(self, leg: Leg, abort: bool) -> None:
        assert leg in self.open_legs, "a leg was dropped that is not open"
        self.dropped.append((leg, abort))

    def emit(self, output: EngineCoreOutput) -> None:
        assert not self.endings, "something was given out after the end"
        seen = copy.copy(output)
        seen.new_token_ids = list(output.new_token_ids)
        self.emitted.append(seen)

    def failed(self, blame: Blame) -> None:
        self.blamed.append(set(blame.engines))
        self.counted.append(blame.counts_for)

    def try_again(self, course: Course, failure: Failure) -> None:
        self.retries.append(failure)

    def queue(self, course: Course, why: Unroutable) -> None:
        self.queued.append(why)

    def ended(self, course: Course, ending: Ending | None) -> None:
        assert not self.endings, "a course ended twice"
        self.endings.append(ending)

    # --- what a test asks and does

    @property
    def open_legs(self) -> list[Leg]:
        """Those that were sent and not dropped."""
        dropped = [leg for leg, _ in self.dropped]
        return [leg for leg, _ in self.sent if leg not in dropped]

    @property
    def aborted(self) -> list[LegKind]:
        """Kinds of the legs that an engine is told to end, if it is still there; in order."""
        return [leg.kind for leg, abort in self.dropped if abort]

    @property
    def tokens(self) -> list[int]:
        """What the client has got."""
        return [token for output in self.emitted for token in output.new_token_ids]

    @property
    def finish(self) -> FinishReason | None:
        """How the client's answer has ended; None: not yet."""
        finished = [output for output in self.emitted if output.finish_reason is not None]
        assert finished in ([], self.emitted[-1:]), "an answer has ended before its end"
        return finished[0].finish_reason if finished else None

    def begin(self, request: EngineCoreRequest | None = None) -> Course:
        """A request arrives and starts."""
        course = Course(request or make_request(), self)
        course.start()
        return course

    def leg(self, kind: LegKind) -> Leg:
        """The open leg of a kind."""
        (leg,) = (leg for leg in self.open_legs if leg.kind is kind)
        return leg

    def request(self, kind: LegKind) -> EngineCoreRequest:
        """What the engine of the open leg of a kind has got."""
        leg = self.leg(kind)
        (request,) = (request for other, request in self.sent if other is leg)
        return request

    def give(
        self,
        course: Course,
        kind: LegKind,
        *tokens: int,
        finish: FinishReason | None = None,
        **more: Any,
    ) -> None:
        """The engine of the open leg of a kind gives something out."""
        leg = self.leg(kind)
        output = EngineCoreOutput(leg.id, list(tokens), finish_reason=finish, **more)
        course.take(leg, output)

    def give_first(self, course: Course, token: int) -> None:
        """The prefill engine gives its token out, and with that all that it was asked for."""
        self.give(course, LegKind.PREFILL, token, finish=FinishReason.LENGTH)

    def lose(self, course: Course, engine: EngineKey) -> None:
        """An engine is lost; the attempt that fails is followed by another at once."""
        before = len(self.retries)
        course.engine_lost(engine)
        self.retry(course, before)

    def retry(self, course: Course, before: int) -> None:
        assert len(self.retries) <= before + 1, "one failure leads to two attempts"
        if len(self.retries) > before:
            course.start()

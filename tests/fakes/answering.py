"""Engines that all continue a request in the same way, as slowly and as badly as a test wants."""

from __future__ import annotations

import dataclasses
import warnings

from tests.fakes.courses import PROMPT, FakeDispatcher, sampling_of, transfer_of
from vllm_pd_plugin.ids import HandoffId

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

    from vllm_pd_plugin.frontend.requests.course import Course
    from vllm_pd_plugin.frontend.requests.legs import Leg
    from vllm_pd_plugin.frontend.routing.choice import EngineKey

PREFILL_ENGINES = ["p0", "p1"]
DECODE_ENGINES = ["d0", "d1"]
ENGINES = PREFILL_ENGINES + DECODE_ENGINES

_UNUSED_TOKEN = 7
"""What is sampled without the client's own sampling."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """The one right answer to ``PROMPT``: its token at a position is a function of that.

    last: position of the token that ends it by itself.
    """

    last: int
    max_tokens: int

    @property
    def tokens(self) -> list[int]:
        return [self.token(position) for position in range(self._num_tokens)]

    @property
    def finish(self) -> FinishReason:
        is_cut = self.last >= self.max_tokens
        return FinishReason.LENGTH if is_cut else FinishReason.STOP

    @property
    def _num_tokens(self) -> int:
        return min(self.last + 1, self.max_tokens)

    def token(self, position: int) -> int:
        return 1000 + position

    def position_after(self, prompt: list[int]) -> int:
        """Which position comes next; a prompt must be the client's, with right tokens behind."""
        num_tokens = len(prompt) - len(PROMPT)
        assert prompt == PROMPT + [self.token(position) for position in range(num_tokens)]
        assert num_tokens <= self.last, "an answer was continued behind its end"
        return num_tokens


@dataclasses.dataclass(slots=True, eq=False)
class Part:
    """A leg, as the engine sees it that has got it.

    outbox: given out, and not yet with the frontend. is_over: the engine does no more for it.
    position: of its next token; None until a prompt is there. left: how many it may still give.
    """

    leg: Leg
    request: EngineCoreRequest
    outbox: list[EngineCoreOutput] = dataclasses.field(default_factory=list)
    is_over: bool = False
    position: int | None = None
    left: int = 0


class AnsweringPool(FakeDispatcher):
    """Four engines, and what is under way on them.

    down: engines that are lost. parts: what every engine that is up has ever got.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer
        self.down: set[EngineKey] = set()
        self.parts: list[Part] = []
        self._computed: dict[HandoffId, EngineKey] = {}
        self._delivered_to_the_end: set[str] = set()

    # --- the protocol

    def send(self, course: Course, leg: Leg, request: EngineCoreRequest) -> None:
        super().send(course, leg, request)
        assert leg.engine not in self.down
        part = Part(leg, request)
        assert sampling_of(request).max_tokens is not None
        part.left = sampling_of(request).max_tokens or 0
        self.parts.append(part)

    def drop(self, leg: Leg, abort: bool) -> None:
        super().drop(leg, abort)
        assert abort != (leg.id in self._delivered_to_the_end), "told the wrong engine, or none"
        for part in self.parts:
            if part.leg is leg:
                part.is_over = True  # what it has given out may still arrive

    # --- what engines do

    @property
    def working(self) -> list[Part]:
        return [part for part in self.parts if not part.is_over]

    @property
    def with_mail(self) -> list[Part]:
        return [part for part in self.parts if part.outbox]

    def compute(self, course: Course, part: Part, num_tokens: int) -> bool:
        """An engine goes on with a part; False when it has to wait for KV."""
        transfer = transfer_of(part.request) or {}
        if part.position is None and not self._begin(part, transfer):
            return False
        if part.is_over:
            return True  # it has failed
        assert part.position is not None
        if transfer.get("do_remote_decode"):
            self._computed[transfer["handoff_id"]] = part.leg.engine
            if not self._samples_as_the_client_wants(course, part):
                self._give(part, [_UNUSED_TOKEN], FinishReason.LENGTH)
                return True
        start, tokens, finish = part.position, [], None
        while len(tokens) < num_tokens and finish is None:
            tokens.append(self.answer.token(start + len(tokens)))
            if start + len(tokens) > self.answer.last:
                finish = FinishReason.STOP
            elif len(tokens) == part.left:
                finish = FinishReason.LENGTH
        part.position += len(tokens)
        part.left -= len(tokens)
        self._give(part, tokens, finish)
        return True

    def end(self, part: Part, finish: FinishReason) -> None:
        """An engine ends a part for a reason of its own."""
        self._give(part, [], finish)

    def deliver(self, course: Course, part: Part) -> None:
        output = part.outbox.pop(0)
        if output.finish_reason is not None:
            self._delivered_to_the_end.add(part.leg.id)
        course.take(part.leg, output)

    def lose_engine(self, course: Course, engine: EngineKey) -> None:
        self.down.add(engine)
        self.parts = [part for part in self.parts if part.leg.engine != engine]
        self._computed = {k: v for k, v in self._computed.items() if v != engine}
        course.engine_lost(engine)

    def _begin(self, part: Part, transfer: dict[str, object]) -> bool:
        position = self.answer.position_after(part.request.prompt_token_ids or [])
        if transfer.get("do_remote_prefill"):
            handoff = HandoffId(str(transfer["remote_handoff_id"]))
            if handoff not in self._computed:
                if self._computes(handoff):
                    return False
                self.end(part, FinishReason.ERROR)
                return True
            position += bool(transfer.get("seed_first_token"))
        part.position = position
        return True

    def _computes(self, handoff: HandoffId) -> bool:
        """Whether an engine is at it."""
        transfers = [transfer_of(part.request) or {} for part in self.working]
        return handoff in [transfer.get("handoff_id") for transfer in transfers]

    def _samples_as_the_client_wants(self, course: Course, part: Part) -> bool:
        return sampling_of(part.request).presence_penalty == course.params.presence_penalty

    def _give(self, part: Part, tokens: list[int], finish: FinishReason | None) -> None:
        part.is_over = finish is not None
        part.outbox.append(EngineCoreOutput(part.leg.id, tokens, finish_reason=finish))

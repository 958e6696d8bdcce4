"""Those who send the two halves of each request, and wait for its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.simulation.plan import Dispatch, Oddity, RequestPlan
from vllm_pd_plugin.ids import Address, RequestId
from vllm_pd_plugin.simulation.clock import Clock
from vllm_pd_plugin.simulation.engine import Output, SimulatedEngine

NOWHERE: Address = ("127.0.0.1", 9)


@dataclasses.dataclass(slots=True, eq=False)
class Leg:
    """A request at one engine. ended: how, as vLLM says it, or "lost" with its engine."""

    engine: SimulatedEngine
    is_consumer: bool
    tokens: list[int] = dataclasses.field(default_factory=list)
    ended: str = ""


class Client:
    """One request. engine(i): who is there now, or None.

    ended: how it has ended for its client, empty while it has not.
    """

    def __init__(
        self,
        plan: RequestPlan,
        clock: Clock,
        engine: Callable[[int], SimulatedEngine | None],
        address: Callable[[int], Address],
        handoff_id: str,
        log: Callable[[str], None],
    ) -> None:
        self.plan = plan
        self.ended = ""
        self.legs: dict[RequestId, Leg] = {}
        self._clock = clock
        self._engine = engine
        self._address = address
        self._handoff_id = handoff_id
        self._log = log
        self._producers = [plan.producer, *plan.others]

    @property
    def name(self) -> str:
        return f"r{self.plan.number}"

    # --- sending -----------------------------------------------------------------------------

    def start(self) -> None:
        plan = self.plan
        if plan.oddity is Oddity.WRONG_ROLE:
            self._send_to_the_wrong_role()
        elif plan.dispatch is Dispatch.ALONE:
            self._add(f"{self.name}w", plan.consumer, True, None, plan.max_tokens)
        elif plan.dispatch is Dispatch.SERIAL:
            self._add(f"{self.name}p", plan.producer, False, {"do_remote_decode": True})
        else:
            first, second = self._consume, self._produce
            if plan.gap_s > 0:
                first, second = second, first
            first()
            self._clock.after(abs(plan.gap_s), second)

    def _produce(self) -> None:
        plan = self.plan
        if plan.oddity is Oddity.NO_PRODUCER or self.ended or not self._producers:
            return
        params = {"do_remote_decode": True, "handoff_id": self._handoff_id}
        attempt = len(self.legs)
        name = f"{self.name}p{attempt}"
        if not self._add(name, self._producers.pop(0), False, params):
            self._clock.after(0.05, self._produce)

    def _consume(self) -> None:
        plan = self.plan
        places = [self._place(i) for i in (plan.producer, *plan.others)]
        first, *others = places
        params = {"do_remote_prefill": True, "remote_handoff_id": self._handoff_id, **first}
        if others:
            params["remote_alternatives"] = others
        self._receive(params)

    def _place(self, index: int) -> dict[str, Any]:
        host, port = self._address(index)
        place: dict[str, Any] = {"remote_host": host, "remote_port": port}
        if self.plan.oddity is Oddity.NOWHERE:
            place["remote_port"] = NOWHERE[1]
        engine = self._engine(index)
        if self.plan.oddity is Oddity.INVENTED:
            place["remote_incarnation"] = "0123456789abcdef"
        elif self.plan.knows and engine is not None:
            place["remote_incarnation"] = engine.incarnation
        return place

    def _receive(self, params: dict[str, Any]) -> None:
        plan = self.plan
        if self.ended:
            return
        if plan.oddity is Oddity.BAD_PARAMS:
            params["remote_handoff_id"] = "no id"
        if plan.seeds:
            params["seed_first_token"] = True
        sampling: dict[str, Any] = {}
        if plan.oddity is Oddity.PROMPT_LOGPROBS:
            sampling["prompt_logprobs"] = 1
        self._add(f"{self.name}d", plan.consumer, True, params, plan.max_tokens, **sampling)
        if plan.oddity is Oddity.SIBLING:
            self._add(f"{self.name}e", plan.consumer, True, dict(params), plan.max_tokens)

    def _send_to_the_wrong_role(self) -> None:
        """A prefill engine is to fetch, or a decode engine to hand off, where there is one."""
        plan = self.plan
        params = {"do_remote_prefill": True, "remote_handoff_id": self._handoff_id}
        params |= self._place(plan.producer)
        if plan.number % 2:
            self._add(f"{self.name}d", plan.consumer, True, {"do_remote_decode": True})
        else:
            self._add(f"{self.name}d", plan.producer, True, params)

    def _add(
        self,
        name: RequestId,
        index: int,
        is_consumer: bool,
        params: dict[str, Any] | None,
        max_tokens: int | None = None,
        **sampling: Any,
    ) -> bool:
        engine = self._engine(index)
        if engine is None:
            self._log(f"{name}: nobody at engine {index}")
            if is_consumer or self.plan.dispatch is Dispatch.SERIAL:
                self._end("lost")
            return False
        prompt = list(self.plan.prompt)
        if is_consumer and self.plan.oddity is Oddity.OTHER_PROMPT:
            prompt[len(prompt) // 2] += 1
        self.legs[name] = Leg(engine, is_consumer)
        self._log(f"{name} to {engine.name}: {len(prompt)} tokens, {params}")
        engine.add(name, prompt, params, max_tokens or self.plan.producer_tokens, **sampling)
        return True

    # --- what comes of it --------------------------------------------------------------------

    def take(self, engine: SimulatedEngine, output: Output) -> None:
        leg = self.legs[output.request_id]
        assert leg.engine is engine
        if leg.ended == "aborted":  # the engine does not know it yet
            return
        assert not leg.ended, f"{output.request_id} goes on after its end"
        leg.tokens += output.tokens
        if output.finish_reason is None:
            return
        leg.ended = output.finish_reason
        self._log(f"{output.request_id} ended: {leg.ended}, {len(leg.tokens)} tokens")
        if leg.is_consumer:
            self._check_answer(leg)
            self._end_if_all_are(leg.ended)
        elif self.plan.dispatch is Dispatch.SERIAL:
            if output.params:
                receive = partial(self._receive, dict(output.params))
                self._clock.after(abs(self.plan.gap_s), receive)
            else:
                self._end("the producer failed")
        elif leg.ended == "error" and self._producers:
            self._clock.after(0.02, self._produce)

    def _check_answer(self, leg: Leg) -> None:
        if leg.ended == "length" and self.plan.oddity is not Oddity.WRONG_ROLE:
            assert len(leg.tokens) == self.plan.max_tokens, f"{self.name} has not all its tokens"

    def lost(self, engine: SimulatedEngine) -> None:
        """An engine has died."""
        for leg in [leg for leg in self.legs.values() if leg.engine is engine and not leg.ended]:
            leg.ended = "lost"
            if leg.is_consumer:
                self._end_if_all_are("lost")
            elif self.plan.dispatch is Dispatch.SERIAL:
                self._end("lost")
            else:
                self._clock.after(0.05, self._produce)

    def abort(self, consumer: bool) -> None:
        for name, leg in self.legs.items():
            if leg.is_consumer == consumer and not leg.ended:
                leg.ended = "aborted"
                leg.engine.abort(name)
                self._log(f"{name}: its client leaves")
                if consumer or self.plan.dispatch is Dispatch.SERIAL:
                    self._end_if_all_are("aborted")

    def _end_if_all_are(self, how: str) -> None:
        if all(leg.ended for leg in self.legs.values() if leg.is_consumer):
            self._end(how)

    def _end(self, how: str) -> None:
        self.ended = self.ended or how

"""Pools of engines that compute nothing, under the real autoscaling policy."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import deque
from types import SimpleNamespace
from typing import Any

from benchmarks.common.statistics import percentile
from vllm_pd_plugin.frontend.routing.choice import Role
from vllm_pd_plugin.frontend.telemetry.metrics import Totals
from vllm_pd_plugin.frontend.telemetry.outcomes import Objectives
from vllm_pd_plugin.ray_serve.demand import Targets, decode_need, prefill_need, replicas
from vllm_pd_plugin.ray_serve.registry_frontend import DemandMeter

PHASES = ((120.0, 0.2), (300.0, 1.0), (480.0, 0.2))
"""Seconds, and how much of the high rate arrives in them."""
PROMPT_TOKENS, ANSWER_TOKENS = 512, 64
HIGH_LOAD = 3.0
"""Prefill engines that the high rate would keep busy."""
MAX_REPLICAS, MAX_RUNNING = 8, 64
START_S = 30.0
UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 5.0, 60.0
TICK_S, POLICY_S, SAMPLE_S = 0.005, 0.25, 2.0
PROMPTS_OF_TTFT, STEPS_OF_TPOT = 6.0, 12.0

DESCRIPTION = (
    f"Simulation: {PHASES[0][0]:.0f} s of low load, {PHASES[1][0]:.0f} s of five times as much, "
    f"{PHASES[2][0]:.0f} s of low load; {PROMPT_TOKENS} tokens in, {ANSWER_TOKENS} out, Poisson "
    f"arrivals; the high load would keep {HIGH_LOAD:.0f} prefill engines busy. An engine starts in "
    f"{START_S:.0f} s; upscale_delay_s {UPSCALE_DELAY_S:.0f}, downscale_delay_s "
    f"{DOWNSCALE_DELAY_S:.0f}, at most {MAX_REPLICAS} engines a pool. SLO: TTFT within "
    f"{PROMPTS_OF_TTFT:.0f} times a prompt's time alone, TPOT within that of {STEPS_OF_TPOT:.0f} "
    "requests on one engine. The policy (`demand.py`, with the meter of a frontend) is the real "
    "one; Serve's delays are rebuilt; an engine that is given up takes nothing new and ends when "
    "it is empty."
)


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """How fast an engine is: prompt tokens a second; a decode step takes ``step_s`` and
    ``step_each_s`` for each request."""

    prefill_rate: float
    step_s: float
    step_each_s: float

    def step(self, running: int) -> float:
        return self.step_s + self.step_each_s * running

    @property
    def objectives(self) -> Objectives:
        prompt_s = PROMPT_TOKENS / self.prefill_rate
        return Objectives(PROMPTS_OF_TTFT * prompt_s, self.step(int(STEPS_OF_TPOT)))


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """fixed: engines of each pool; None: the policy decides, from one of each."""

    fixed: int | None


ARMS = {"fixed 1P1D": Arm(1), "fixed 4P4D": Arm(4), "autoscaling": Arm(None)}


@dataclasses.dataclass(slots=True)
class Request:
    arrived_at: float
    left: float = float(PROMPT_TOKENS)
    first_at: float = 0.0
    given: float = 1.0
    ended_at: float = 0.0


@dataclasses.dataclass(slots=True, eq=False)
class SimEngine:
    role: Role
    ready_at: float
    work: deque[Request] = dataclasses.field(default_factory=deque)
    is_leaving: bool = False


@dataclasses.dataclass(slots=True)
class Result:
    """timeline: time, prefill and decode engines that are up, prompts that wait, requests that
    decode, share within the SLO of what ended since the last sample (None where nothing did)."""

    attainment: float
    engine_s: float
    ttft_p90_ms: float
    tpot_p90_ms: float
    timeline: list[tuple[float, int, int, int, int, float | None]]


class Pool:
    """The engines of one role, and Serve's delays before their number changes."""

    def __init__(self, role: Role, number: int) -> None:
        self.role = role
        self.engines = [SimEngine(role, 0.0) for _ in range(number)]
        self._since: float | None = None
        self._direction = 0

    def usable(self, now: float) -> list[SimEngine]:
        return [e for e in self.engines if e.ready_at <= now and not e.is_leaving]

    def staying(self) -> list[SimEngine]:
        return [engine for engine in self.engines if not engine.is_leaving]

    def decide(self, need: float, now: float) -> None:
        current = len(self.staying())
        wanted = min(MAX_REPLICAS, max(1, replicas(need, current)))
        direction = (wanted > current) - (wanted < current)
        if direction != self._direction or direction == 0:
            self._since, self._direction = now, direction
        delay_s = UPSCALE_DELAY_S if direction > 0 else DOWNSCALE_DELAY_S
        if direction == 0 or now - (self._since or now) < delay_s:
            return
        self._since = now
        if wanted > current:
            self.engines += [SimEngine(self.role, now + START_S) for _ in range(wanted - current)]
        else:
            leaving = sorted(self.staying(), key=lambda e: (e.ready_at <= now, len(e.work)))
            for engine in leaving[: current - wanted]:
                engine.is_leaving = True

    def clear(self) -> None:
        self.engines = [e for e in self.engines if e.work or not e.is_leaving]


def run(arm: Arm, pace: Pace, seed: int) -> Result:
    """Simulate one arm; a seed gives every arm the same arrivals."""
    chooser = random.Random(seed)
    high_rate = HIGH_LOAD * pace.prefill_rate / PROMPT_TOKENS
    objectives = pace.objectives
    targets = Targets(objectives.ttft_s, objectives.tpot_s)
    prefill, decode = (Pool(role, arm.fixed or 1) for role in (Role.PREFILL, Role.DECODE))
    now = 0.0
    totals = Totals()
    meter = DemandMeter(lambda: now)
    ended: list[Request] = []
    every: list[Request] = []
    waiting: deque[Request] = deque()
    """That no decode engine has a slot for."""
    timeline: list[tuple[float, int, int, int, int, float | None]] = []
    engine_s, sampled = 0.0, 0
    next_arrival = chooser.expovariate(high_rate * PHASES[0][1])
    next_policy = next_sample = 0.0
    end = sum(seconds for seconds, _ in PHASES)
    while now < end or len(ended) < len(every):
        now += TICK_S
        while next_arrival <= now and next_arrival < end:
            request = Request(next_arrival)
            every.append(request)
            totals.requests += 1
            totals.prompt_tokens += PROMPT_TOKENS
            least = min(prefill.usable(now), key=lambda e: sum(r.left for r in e.work))
            least.work.append(request)
            next_arrival += chooser.expovariate(high_rate * _share(next_arrival))
        for engine in prefill.engines:
            _prefill(engine, pace, now, waiting)
        _place(waiting, decode, now)
        for engine in decode.engines:
            _decode(engine, pace, now, totals, ended)
        for pool in (prefill, decode):
            pool.clear()
            engine_s += TICK_S * len(pool.engines)
        if arm.fixed is None and now >= next_policy:
            next_policy = now + POLICY_S
            demand = meter.measure(totals, _as_dispatch(prefill, decode, waiting, pace, now))
            prefill.decide(prefill_need(demand, targets), now)
            decode.decide(decode_need(demand, targets), now)
        if now >= next_sample:
            next_sample = now + SAMPLE_S
            fresh, sampled = ended[sampled:], len(ended)
            good = sum(_is_good(each, objectives) for each in fresh)
            timeline.append(
                (
                    round(now, 2),
                    len(prefill.usable(now)),
                    len(decode.usable(now)),
                    sum(len(engine.work) for engine in prefill.engines),
                    sum(len(engine.work) for engine in decode.engines) + len(waiting),
                    good / len(fresh) if fresh else None,
                )
            )
    ttfts = [1e3 * (each.first_at - each.arrived_at) for each in ended]
    tpots = [1e3 * _tpot(each) for each in ended]
    return Result(
        sum(_is_good(each, objectives) for each in ended) / len(every),
        engine_s,
        percentile(ttfts, 90) or math.nan,
        percentile(tpots, 90) or math.nan,
        timeline,
    )


def _share(now: float) -> float:
    for seconds, share in PHASES:
        if now < seconds:
            return share
        now -= seconds
    return PHASES[-1][1]


def _prefill(engine: SimEngine, pace: Pace, now: float, waiting: deque[Request]) -> None:
    budget = TICK_S * pace.prefill_rate
    while engine.work and budget > 0:
        request = engine.work[0]
        done = min(budget, request.left)
        request.left -= done
        budget -= done
        if request.left <= 0:
            engine.work.popleft()
            request.first_at = now
            waiting.append(request)


def _place(waiting: deque[Request], decode: Pool, now: float) -> None:
    while waiting:
        least = min(decode.usable(now), key=lambda engine: len(engine.work))
        if len(least.work) >= MAX_RUNNING:
            return
        least.work.append(waiting.popleft())


def _decode(
    engine: SimEngine, pace: Pace, now: float, totals: Totals, ended: list[Request]
) -> None:
    if not engine.work:
        return
    step = TICK_S / pace.step(len(engine.work))
    totals.intervals += step * len(engine.work)  # fractions of a token
    totals.itl_s += TICK_S * len(engine.work)
    for request in list(engine.work):
        request.given += step
        if request.given >= ANSWER_TOKENS:
            request.ended_at = now
            engine.work.remove(request)
            ended.append(request)
            totals.answers += 1
            totals.answer_tokens += ANSWER_TOKENS


def _as_dispatch(
    prefill: Pool, decode: Pool, waiting: deque[Request], pace: Pace, now: float
) -> Any:
    """Return what the meter looks at of a frontend's dispatch."""

    def member(engine: SimEngine) -> Any:
        is_prefill = engine.role is Role.PREFILL
        running = 0 if is_prefill else len(engine.work)
        left = int(sum(request.left for request in engine.work)) if is_prefill else 0
        return SimpleNamespace(
            key=str(id(engine)),
            role=engine.role,
            load=SimpleNamespace(waiting_tokens=left, running=running, waiting=0, kv_usage=0.0),
            prefill_rate=pace.prefill_rate if is_prefill else None,
            link=SimpleNamespace(description=SimpleNamespace(max_num_seqs=MAX_RUNNING)),
            is_up=True,
            is_draining=False,
        )

    engines = [*prefill.usable(now), *decode.usable(now)]
    return SimpleNamespace(
        pool=[member(engine) for engine in engines], num_waiting=len(waiting), waiting_tokens=0
    )


def _tpot(request: Request) -> float:
    return (request.ended_at - request.first_at) / (ANSWER_TOKENS - 1)


def _is_good(request: Request, objectives: Objectives) -> bool:
    return objectives.are_met(request.first_at - request.arrived_at, _tpot(request))

"""Which engines work on a request where other frontends choose among the same ones."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.routing.choice import Chance, Engine, Policy, Prompt, Role, Route
    from vllm_pd_plugin.frontend.routing.choosing import choose

STATE_AGE_S = 0.5
PROMPT = Prompt(1000, 100)
NUM_FRONTENDS, NUM_ENGINES, NUM_REQUESTS = 4, 8, 2400


def decode(number: int, **known: int) -> Engine:
    return Engine(f"d{number}", Role.DECODE, **known)  # type: ignore[arg-type]


def decodes_on(engines: list[Engine], chance: Chance, prompt: Prompt = PROMPT) -> str:
    route = choose(engines, prompt, Policy(), chance=chance)
    assert isinstance(route, Route)
    return route.decode


class Site:
    """Frontends over engines, in virtual time. Each knows its own requests, and those of others as
    they were when the engines have told it last."""

    def __init__(self, requests_a_s: float, request_s: float) -> None:
        self.chosen: Counter[str] = Counter()
        self._random = Random(1)
        self._requests_a_s, self._request_s = requests_a_s, request_s
        self._open: list[tuple[float, int, int]] = []
        self._others = [[0] * NUM_ENGINES for _ in range(NUM_FRONTENDS)]
        self._next_state_at = [self._random.random() * STATE_AGE_S for _ in range(NUM_FRONTENDS)]
        self._now = 0.0

    def ask(self, tells: bool) -> None:
        """A request comes to a frontend. tells: whether engines tell how many there are."""
        random = self._random
        self._now += random.expovariate(self._requests_a_s)
        self._open = [each for each in self._open if each[0] > self._now]
        for frontend, at in enumerate(self._next_state_at):
            if at <= self._now:
                self._next_state_at[frontend] = self._now + STATE_AGE_S
                self._others[frontend] = self._running(lambda owner, own=frontend: owner != own)
        frontend = random.randrange(NUM_FRONTENDS)
        own = self._running(lambda owner: owner == frontend)
        running = [a + b for a, b in zip(own, self._others[frontend], strict=True)]
        others = NUM_FRONTENDS - 1 if tells else 0
        engines = [decode(n, running=r, other_frontends=others) for n, r in enumerate(running)]
        chance = Chance(0, random.random(), random.random(), f"frontend {frontend}")
        key = decodes_on(engines, chance)
        self.chosen[key] += 1
        self._open.append((self._now + self._request_s, int(key[1:]), frontend))

    def _running(self, is_counted: Callable[[int], bool]) -> list[int]:
        counts = Counter(engine for _, engine, owner in self._open if is_counted(owner))
        return [counts[number] for number in range(NUM_ENGINES)]


@pytest.mark.parametrize("requests_a_s", [2.0, 20.0, 200.0])
def test_frontends_that_see_the_same_do_not_all_choose_the_same_engine(
    requests_a_s: float,
) -> None:
    site = Site(requests_a_s, request_s=0.2)
    for _ in range(NUM_REQUESTS):
        site.ask(tells=True)
    busiest = max(site.chosen.values()) / (NUM_REQUESTS / NUM_ENGINES)
    assert busiest <= 1.3


def test_of_equals_each_frontend_has_its_own_where_engines_do_not_tell_of_others() -> None:
    idle = [decode(number) for number in range(NUM_ENGINES)]
    liked = [decodes_on(idle, Chance(frontend=f"frontend {n}")) for n in range(64)]
    assert len(set(liked)) == NUM_ENGINES
    assert liked == [decodes_on(idle, Chance(frontend=f"frontend {n}")) for n in range(64)]


def test_engines_that_clearly_differ_are_not_taken_for_equals() -> None:
    """Three other frontends may have sent the best one three requests that are not known yet."""
    engines = [decode(0, running=14), decode(1, running=10), decode(2, running=40)]
    for others, allowed in ((0, {"d1"}), (3, {"d1"}), (4, {"d0", "d1"}), (40, {"d0", "d1", "d2"})):
        known = [dataclasses.replace(engine, other_frontends=others) for engine in engines]
        chances = [Chance(0, i / 10, j / 10, "f") for i in range(10) for j in range(10)]
        chosen = {decodes_on(known, chance) for chance in chances}
        assert chosen <= allowed
        assert "d1" in chosen
    assert "d2" not in chosen, "of two the better one is taken"


@pytest.mark.parametrize("others", [0, 3])
def test_prompts_are_spread_over_prefill_engines_as_well(others: int) -> None:
    idle = [Engine(f"p{n}", Role.PREFILL, other_frontends=others) for n in range(4)]
    random, chosen = Random(2), Counter[str]()
    for number in range(400):
        chance = Chance(0, random.random(), random.random(), f"frontend {number % 40}")
        route = choose([*idle, decode(0)], PROMPT, Policy(local_below=0), chance=chance)
        assert isinstance(route, Route)
        assert route.prefill is not None
        chosen[route.prefill] += 1
    assert len(chosen) == 4
    assert max(chosen.values()) < 200
    busy = [dataclasses.replace(each, prefill_tokens=10_000) for each in idle[1:]]
    route = choose([idle[0], *busy, decode(0)], PROMPT, Policy(local_below=0))
    assert isinstance(route, Route)
    assert route.prefill == "p0"

"""How long a frontend takes to choose engines, without any engine, connection or client.

The pool, the streams under way and the prefix caches are the frontend's own; links that do nothing
stand for the engines. Every prompt begins with the same text, which all engines have cached, and
between two choices some engines say how busy they are. A choice begins with a prompt that was never
looked at, so that to name its blocks is a part of it.

    python -m benchmarks.frontend.routing --engines 1000 --streams 10000
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import time
from typing import Any

from vllm.v1.engine import FinishReason

from benchmarks.common.statistics import Row, percentile
from tests.fakes.courses import make_request
from tests.fakes.dispatching import World
from tests.fakes.links import FakeLink, link_of, make_member, output_of
from vllm_pd_plugin.engine_port.messages import Blocks, EngineLoad, State, Stored
from vllm_pd_plugin.frontend.requests.course import Course
from vllm_pd_plugin.frontend.routing.choice import Policy, Role

BLOCK_TOKENS = 16
SHARED_TOKENS, PROMPT_TOKENS = 512, 2048
PREFILLS_OF = 5
"""One of so many engines prefills."""
STATES_A_CHOICE = 6
PREFILL_RATE = 10_000.0


def measure(num_engines: int, num_streams: int, samples: int = 2000) -> Row:
    """Return quantiles of the time of one choice, ms, with so many engines and open streams."""
    return asyncio.run(_measure(num_engines, num_streams, samples))


async def _measure(num_engines: int, num_streams: int, samples: int) -> Row:
    chance = random.Random(1)
    shared = [chance.randrange(40_000) for _ in range(SHARED_TOKENS)]
    world = World(Policy())
    dispatch = world.dispatch
    links = [_add(world, number, shared) for number in range(num_engines)]

    def course(name: str, length: int) -> Course:
        more = [chance.randrange(40_000) for _ in range(length - SHARED_TOKENS)]
        return Course(make_request(name, prompt=shared + more, max_tokens=100), dispatch)

    for number in range(num_streams):
        dispatch.add(course(f"open-{number}", SHARED_TOKENS + BLOCK_TOKENS).request)
        if number % 100 == 99:
            await asyncio.sleep(0)
    for link in links:
        for leg_id in list(link.requests):
            ends = leg_id.endswith("p")
            world.give(link, output_of(leg_id, 1, finish=FinishReason.LENGTH if ends else None))
            if not ends:
                world.give(link, output_of(leg_id, 1))
    courses = [course(f"new-{number}", PROMPT_TOKENS) for number in range(samples)]
    route_ms, refuse_ms = [], []
    for each in courses:
        for _ in range(STATES_A_CHOICE):
            link: Any = chance.choice(links)
            load = EngineLoad(len(dispatch.pool[link.url].legs), num_steps=chance.randrange(10**6))
            dispatch.loaded(link, State(load, 0))
        start = time.perf_counter()
        dispatch.refuse(1)
        middle = time.perf_counter()
        dispatch.route(each)
        end = time.perf_counter()
        refuse_ms.append(1e3 * (middle - start))
        route_ms.append(1e3 * (end - middle))
    num_open = len(dispatch)
    logging.disable(logging.CRITICAL)  # every stream that is still open would say so
    await dispatch.close()
    logging.disable(logging.NOTSET)
    return {
        "engines": num_engines,
        "streams": num_open,
        "samples": samples,
        "route_ms_p50": percentile(route_ms, 50),
        "route_ms_p99": percentile(route_ms, 99),
        "admit_ms_p50": percentile(refuse_ms, 50),
        "admit_ms_p99": percentile(refuse_ms, 99),
    }


def _add(world: World, number: int, shared: list[int]) -> FakeLink:
    """An engine comes up, with the text that all prompts begin with in its cache."""
    role = Role.DECODE if number % PREFILLS_OF else Role.PREFILL
    member = make_member(f"http://engine-{number}", role)
    world.dispatch.pool.add(member)
    member.prefill_rate = PREFILL_RATE
    link: Any = link_of(member)
    hashes = tuple(b"%d-%d" % (number, block) for block in range(SHARED_TOKENS // BLOCK_TOKENS))
    stored = Stored(None, hashes, tuple(shared), BLOCK_TOKENS)
    world.dispatch.cached(link, Blocks((stored,)))
    return link_of(member)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontend.routing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engines", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--streams", type=int, default=10_000, help="(%(default)s)")
    args = parser.parse_args()
    for name, value in measure(args.engines, args.streams).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()

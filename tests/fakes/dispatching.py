"""A frontend's dispatch, engines that do nothing by themselves, and what its clients get."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

from tests.fakes.courses import make_request
from vllm_pd_plugin.engine_port.messages import EngineLoad

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    from tests.fakes.engine_core import describe
    from tests.fakes.links import FakeLink, SkippingLoop, link_of, make_member, outputs_of
    from vllm_pd_plugin.frontend.dispatch import Dispatch
    from vllm_pd_plugin.frontend.requests.course import Course
    from vllm_pd_plugin.frontend.requests.endings import Ending
    from vllm_pd_plugin.frontend.routing.choice import Policy, Role
    from vllm_pd_plugin.frontend.underway import Limits

LIMITS = Limits(request_s=100.0, first_token_s=20.0, stall_s=10.0, queue_s=5.0)
SWEEP_S = 0.25
BACKOFF_S = 0.5
HANDED_OFF = Policy(local_below=0)


class Counts:
    """Takes what a frontend counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.to_compute: tuple[int, ...] = ()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self._note(name, args)

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        self.calls.append(name)
        if name == "is_to_compute":
            self.to_compute += args


class World:
    """A dispatch, its engines, and what its clients get. metrics: what takes its counts."""

    def __init__(self, policy: Policy = HANDED_OFF, metrics: Any = None) -> None:
        self.batches: list[list[EngineCoreOutput]] = []
        self.failed: list[tuple[str, Ending]] = []
        self.on_failed: Callable[[Course, Ending], None] = lambda course, ending: None
        self.metrics = metrics or Counts()
        self.dispatch = Dispatch(policy, LIMITS, self.metrics, self._give, self._fail)

    def engine(self, url: str, role: Role, started_as: str | None = None) -> FakeLink:
        """An engine comes up."""
        member = make_member(url, role)
        if started_as is not None:
            link_of(member).description = describe(role=started_as)
        self.dispatch.pool.add(member)
        self.dispatch.attached(member.link, EngineLoad())
        return link_of(member)

    def pair(self) -> tuple[FakeLink, FakeLink]:
        return self.engine("p", Role.PREFILL), self.engine("d", Role.DECODE)

    def add(self, request_id: str = "r", **sampling: Any) -> None:
        self.dispatch.add(make_request(request_id, **sampling))

    def give(self, link: FakeLink, *outputs: EngineCoreOutput, timestamp: float = 1.0) -> None:
        """A step of an engine gives something out."""
        there: Any = link
        self.dispatch.gave_out(there, outputs_of(*outputs, timestamp=timestamp))

    def lose(self, link: FakeLink) -> None:
        link.is_attached = False
        there: Any = link
        self.dispatch.lost(there, "silence")

    def come_back(self, link: FakeLink) -> None:
        link.is_attached = True
        there: Any = link
        self.dispatch.attached(there, EngineLoad())

    @property
    def tokens(self) -> list[int]:
        return [t for batch in self.batches for each in batch for t in each.new_token_ids]

    def _give(self, outputs: EngineCoreOutputs) -> None:
        self.batches.append(list(outputs.outputs))

    def _fail(self, course: Course, ending: Ending) -> None:
        self.failed.append((course.id, ending))
        self.on_failed(course, ending)


def run(
    story: Callable[[World], Coroutine[Any, Any, None]],
    policy: Policy = HANDED_OFF,
    metrics: Any = None,
) -> None:
    """Let a story happen in a loop that does not wait."""

    async def tell() -> None:
        world = World(policy, metrics)
        await story(world)
        await world.dispatch.close()

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(tell())

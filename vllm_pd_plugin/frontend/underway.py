"""What a frontend notes of each request that is under way, and how long things may take."""

from __future__ import annotations

import dataclasses

from vllm_pd_plugin.frontend.pool.members import Member
from vllm_pd_plugin.frontend.requests.course import Course
from vllm_pd_plugin.frontend.telemetry.metrics import Timeline
from vllm_pd_plugin.frontend.telemetry.tracing import Marks


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, in seconds.

    request_s: a whole request. first_token_s: one attempt, until its first token.
    stall_s: between two tokens. queue_s: until an engine is up that can take it.
    """

    request_s: float = 3600.0
    first_token_s: float = 300.0
    stall_s: float = 120.0
    queue_s: float = 30.0


@dataclasses.dataclass(slots=True, eq=False)
class Underway:
    """A course, and what is noted of it for metrics and traces."""

    course: Course
    timeline: Timeline
    marks: Marks
    deadline: float


def is_on(underway: Underway, member: Member) -> bool:
    """Say whether an engine works on a course, or was to hand KV to it."""
    course = underway.course
    handed_off = course.route is not None and course.route.prefill == member.key
    return handed_off or any(leg.engine == member.key for leg in course.legs)

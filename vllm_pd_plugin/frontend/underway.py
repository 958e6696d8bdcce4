"""What a frontend notes of each request that is under way, and how long things may take."""

from __future__ import annotations

import dataclasses

from vllm_pd_plugin.frontend.admission import Tenant
from vllm_pd_plugin.frontend.requests.course import Course
from vllm_pd_plugin.frontend.telemetry.outcomes import Timeline
from vllm_pd_plugin.frontend.telemetry.tracing import Marks


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, in seconds.

    request_s: a whole request. first_token_s: from when an engine begins with it to the first
    output. stall_s: between two outputs. queue_s: until there is an engine that can take it.
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
    tenant: Tenant
    is_queued: bool = True
    """Whether it has got nothing yet."""

"""The parts of one request of a client: its choices (``n``), or each step of each beam.

To engines each part is a request. They have the prompt in common, so that whoever has computed it
for one part has it for the others.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_pd_plugin.frontend.routing.choice import Route


@dataclasses.dataclass(slots=True)
class Siblings:
    """are_beams: they are the steps of a beam search, each of which goes on after one before.

    route: where the last of them that was routed has gone; None while none was.
    """

    are_beams: bool = False
    route: Route | None = None

    @property
    def is_going_on(self) -> bool:
        """Whether what comes now goes on with something that has begun."""
        return self.are_beams and self.route is not None

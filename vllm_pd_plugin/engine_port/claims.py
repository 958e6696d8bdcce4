"""Which link has which engine: one engine under two addresses is one engine."""

from __future__ import annotations

import dataclasses

from vllm_pd_plugin.engine_port.messages import EngineDescription

_Engine = tuple[str, str, int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Claims:
    """Of all links of a frontend, by what engines say of themselves: their id, which each start
    makes anew, and where their control channel is. Owned by the event loop."""

    _owners: dict[_Engine, str] = dataclasses.field(default_factory=dict)

    def take(self, engine: EngineDescription, url: str) -> str | None:
        """Claim an engine for the link to ``url``; return None, or whose it is already."""
        key = (
            engine.engine_id,
            engine.control_host,
            engine.control_port,
            engine.data_parallel_rank,
        )
        owner = self._owners.setdefault(key, url)
        return None if owner == url else owner

    def release(self, url: str) -> None:
        """The link to ``url`` has no engine any more."""
        for key in [key for key, owner in self._owners.items() if owner == url]:
            del self._owners[key]

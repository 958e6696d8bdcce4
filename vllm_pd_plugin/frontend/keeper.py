"""Keeps the pool as the operator wants it: who is in it, as what, and who of them can be used.

Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from vllm_pd_plugin.engine_port.link import Link, server_of
from vllm_pd_plugin.frontend.pool.fitness import Requirement, misfit
from vllm_pd_plugin.frontend.pool.members import Member, Pool
from vllm_pd_plugin.frontend.pool.membership import Engines, Wanted
from vllm_pd_plugin.frontend.routing.choice import EngineKey, Role
from vllm_pd_plugin.memory.identity import KvIdentity, difference

logger = logging.getLogger(__name__)


class Keeper:
    """on_leave: takes an engine that leaves; what is under way on it goes on elsewhere."""

    def __init__(self, pool: Pool, on_leave: Callable[[Member], None]) -> None:
        self._pool = pool
        self._on_leave = on_leave
        self._loop = asyncio.get_running_loop()
        self._requirement: Requirement | None = None
        self._engines: Engines = {}
        self._make_link: Callable[[EngineKey], Link]
        self._draining: dict[EngineKey, float] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def require(self, requirement: Requirement) -> None:
        """From now on use engines only that meet it."""
        self._requirement = requirement
        self.judge()

    def use(self, engines: Engines, make_link: Callable[[EngineKey], Link]) -> None:
        """Make the pool what is wanted: the engines of these servers."""
        self._engines, self._make_link = dict(engines), make_link
        for member in self._pool:
            if server_of(member.key) not in engines:
                self._remove(member)
        for key, wanted in engines.items():
            self._keep(key, wanted)
        for member in self._pool:  # the others of a server whose first cannot be asked now, too
            self._keep(member.key, engines[server_of(member.key)])
        self.judge()

    def _keep(self, key: EngineKey, wanted: Wanted) -> None:
        if self._pool.get(key) is None:
            self._pool.add(Member(key, wanted.role, self._make_link(key)))
        member = self._pool[key]
        member.generation = wanted.generation
        self._set_role(member, wanted.role)
        self._set_draining(member, wanted.drain_until)

    def _keep_others(self) -> None:
        """Keep every engine of a server like its first, which says what others there are."""
        for member in self._pool:
            server = server_of(member.key)
            first, wanted = self._pool.get(server), self._engines.get(server)
            if first is None or wanted is None or not first.link.is_attached:
                continue
            if member is first:
                for key in first.link.others:
                    self._keep(key, wanted)
            elif member.key not in first.link.others:
                self._remove(member)

    def judge(self) -> None:
        """Look at every engine that is there: can it be used? What is under way on one stays."""
        self._keep_others()
        reference = self._reference()
        for member in self._pool:
            if not member.link.is_attached:
                continue
            before = member.mismatch
            member.mismatch = misfit(
                member.link.description, member.role, self._requirement, reference
            )
            if member.mismatch and member.mismatch != before:
                logger.error("engine %s is not used: %s", member.key, member.mismatch)
        self._tell_kinds_apart()
        self._pool.changed()

    def _tell_kinds_apart(self) -> None:
        """Give engines that can hand KV to each other a kind in common, as far as is known now.

        Those of a kind that decode are to answer alike; one that only prefills is of the first kind
        for which its KV can be converted, where none is like it."""
        first_of: list[tuple[Member, KvIdentity]] = []
        there = [member for member in self._pool if member.link.is_attached]
        for member in sorted(there, key=lambda member: not member.role.decodes):
            kv = member.link.description.kv
            kinds = [one for one in first_of if one[0].generation == member.generation]
            goes_with = [
                first
                for is_strict in ((True,) if member.role.decodes else (True, False))
                for first, its_kv in kinds
                if difference(its_kv, kv, is_strict) is None
            ]
            if not goes_with:
                first_of.append((member, kv))
            member.kind = str(goes_with[0].key if goes_with else member.key)

    def _reference(self) -> KvIdentity | None:
        """Return what the pool's KV is: that of the decode engine that was named first, of those
        that are there, or else of those that have been."""
        if self._requirement is not None and self._requirement.several_kinds:
            return None
        known = [
            member
            for member in self._pool
            if member.kv is not None
            and member.role.decodes
            and not misfit(member.link.description, member.role, self._requirement)
        ]
        there = [member for member in known if member.link.is_attached]
        # One whose weights are nobody else's, as after a change in place, speaks for itself only.
        shared = [m for m in there if m.kv is not None and m.kv.weights.is_known]
        return next((member.kv for member in (*shared, *there, *known)), None)

    def _set_role(self, member: Member, role: Role) -> None:
        """Sort an engine in elsewhere; what is under way on it stays there, if it can do both."""
        if role is member.role:
            return
        logger.info("engine %s is of role %s from now on", member.key, role)
        member.role = role
        if member.link.is_attached and misfit(member.link.description, role, self._requirement):
            self._on_leave(member)

    def _set_draining(self, member: Member, until: float | None) -> None:
        if until == member.drain_until:
            return
        member.drain_until = until
        if until is None:
            self._draining.pop(member.key, None)
        else:
            self._draining[member.key] = self._loop.time() + until - time.time()

    def _remove(self, member: Member) -> None:
        self._on_leave(member)
        self._pool.remove(member.key)
        self._draining.pop(member.key, None)
        self._closing = {task for task in self._closing if not task.done()}
        self._closing.add(self._loop.create_task(member.link.close()))

    def hand_over_drained(self, now: float) -> None:
        """Let what is left on engines that were to drain until now go on elsewhere."""
        for key, deadline in list(self._draining.items()):
            member = self._pool.get(key)
            if member is None or not member.legs:
                del self._draining[key]
                logger.info("engine %s is drained", key)
            elif now >= deadline:
                del self._draining[key]
                text = "engine %s is drained: %d requests go on elsewhere"
                logger.info(text, key, len(member.legs))
                self._on_leave(member)

    async def close(self) -> None:
        """End all connections."""
        for member in self._pool:
            await member.link.close()
        await asyncio.gather(*self._closing, return_exceptions=True)

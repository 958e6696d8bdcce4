"""One handoff between two engines, stage by stage, over the parts that a frontend is made of."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.engine_port.link import NOT_ASKED, Link
from vllm_pd_plugin.frontend.doctor.fetches import Fetches
from vllm_pd_plugin.frontend.doctor.findings import Finding, wrong
from vllm_pd_plugin.frontend.doctor.judgement import (
    describe,
    judge_alike,
    judge_alone,
    judge_handoff,
    judge_kv,
    judge_tokens,
)
from vllm_pd_plugin.frontend.doctor.witness import Witness
from vllm_pd_plugin.frontend.pool.fitness import Requirement
from vllm_pd_plugin.frontend.routing.choice import EngineKey
from vllm_pd_plugin.ids import RequestId
from vllm_pd_plugin.net.hosts import in_url

MAX_TOKENS = 8
_LIKELIEST = 5
_LEAST_PROMPT, _BLOCKS = 256, 4
_LOOK_S = 0.002
_COUNTED_S, _COUNT_LOOK_S = 3.0, 0.1
"""An engine's counts leave it with its next step, and reach its API server a little later."""

Fetched = Callable[[EngineKey], Awaitable[Fetches | None]]
"""Asks an engine what it has fetched so far; None where it does not say."""


class Examination:
    """P and D are the engines that prefill and decode, both in the pool of ``witness``.

    deadline: of all of it, by the event loop's clock. vllm_version: this process's.
    """

    def __init__(
        self,
        witness: Witness,
        prefill: EngineKey,
        decode: EngineKey,
        fetched: Fetched,
        deadline: float,
        vllm_version: str,
    ) -> None:
        self._witness = witness
        self._urls = {"P": prefill, "D": decode}
        self._fetched = fetched
        self._deadline = deadline
        self._vllm_version = vllm_version
        self._clock = asyncio.get_running_loop().time

    async def run(self, say: Callable[[Finding], None]) -> bool:
        """Say what is found, as it is found; return whether all is right. What comes after
        something wrong is not tried."""
        stages: list[Callable[[], Coroutine[Any, Any, list[Finding]]]] = [
            self._come_up, self._fit, self._hand_off,
        ]  # fmt: skip
        for stage in stages:
            findings = await stage()
            for finding in findings:
                say(finding)
            if not all(finding.is_right for finding in findings):
                return False
        return True

    # --- the engines -------------------------------------------------------------------------

    async def _come_up(self) -> list[Finding]:
        both = await asyncio.gather(*(self._reach(name) for name in self._urls))
        return [finding for findings in both for finding in findings]

    async def _reach(self, name: str) -> list[Finding]:
        """Wait until an engine is attached, or cannot be."""
        link, url = self._link(name), self._urls[name]
        http, control = f"{name} over HTTP", f"{name} attached"
        started_at = self._clock()
        await self._until(lambda: _is_found(link) or _has_failed(link))
        found_at = self._clock()
        if not _is_found(link):
            return [wrong(http, f"{url}: {_why(link)}", found_at - started_at)]
        engine = link.description
        found = Finding(http, f"{url}: {describe(engine)}", found_at - started_at)
        await self._until(lambda: link.is_attached or _has_failed(link))
        seconds = self._clock() - found_at
        if not link.is_attached:
            return [found, wrong(control, _why(link), seconds)]
        load = self._witness.pool[url].load
        busy = f", busy with {load.running + load.waiting} requests" if load.running else ""
        address = f"{in_url(engine.control_host)}:{engine.control_port}"
        return [found, Finding(control, f"control channel {address}{busy}", seconds)]

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so() and self._clock() < self._deadline:
            await asyncio.sleep(_LOOK_S)

    async def _fit(self) -> list[Finding]:
        """Ask what a frontend would ask before it used them."""
        p, d = (self._link(name).description for name in self._urls)
        longest = min(p.max_model_len, d.max_model_len)  # what a frontend would serve
        self._witness.require(Requirement(longest, d.vocab_size, False, self._vllm_version))
        members = {name: self._witness.pool[url] for name, url in self._urls.items()}
        problems = {name: member.problem for name, member in members.items()}
        return [judge_alike(problems, p, d)]

    # --- the requests ------------------------------------------------------------------------

    async def _hand_off(self) -> list[Finding]:
        prompt = self._prompt()
        # First D alone: if that goes wrong the handoff is not to blame. It leaves nothing in the
        # prefix cache that the other request could find there.
        alone = await self._witness.ask(_request("alone", prompt, alone=True), self._deadline)
        findings = [judge_alone(alone, len(prompt))]
        if not findings[0].is_right:
            return findings
        decode = self._urls["D"]
        before = await self._fetched(decode)
        answer = await self._witness.ask(_request("handoff", prompt), self._deadline)
        fetched = None if before is None else await self._fetched_since(before)
        findings.append(judge_handoff(answer, fetched))
        if findings[-1].is_right:
            findings += [judge_kv(answer, fetched), judge_tokens(alone, answer)]
        return findings

    def _prompt(self) -> list[int]:
        """Return a prompt that no cache has: tokens of the vocabulary's middle, where special ones
        are not."""
        p, d = (self._link(name).description for name in self._urls)
        length = max(_LEAST_PROMPT, _BLOCKS * d.block_tokens) + 1
        longest = min(p.max_model_len, d.max_model_len) - MAX_TOKENS - 1
        quarter = d.vocab_size // 4
        chooser = random.SystemRandom()
        return [chooser.randrange(quarter, 3 * quarter) for _ in range(min(length, longest))]

    async def _fetched_since(self, before: Fetches) -> Fetches | None:
        """Return what D has fetched since, as soon as it counts a handoff as over."""
        until = min(self._clock() + _COUNTED_S, self._deadline)
        while True:
            now = await self._fetched(self._urls["D"])
            since = None if now is None else now.since(before)
            if since is None or since.has_ended or self._clock() >= until:
                return since
            await asyncio.sleep(_COUNT_LOOK_S)

    def _link(self, name: str) -> Link:
        return self._witness.pool[self._urls[name]].link


def _is_found(link: Link) -> bool:
    """Whether its HTTP server has said what it is."""
    return hasattr(link, "description")


def _has_failed(link: Link) -> bool:
    return not link.is_attached and link.problem != NOT_ASKED


def _why(link: Link) -> str:
    return link.problem if _has_failed(link) else "no answer in time; raise --timeout"


def _request(name: str, prompt: list[int], *, alone: bool = False) -> EngineCoreRequest:
    """Return a request as a frontend's API server makes it. alone: for D, whatever is cached."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=_LIKELIEST,
        skip_reading_prefix_cache=alone,
        # Bit for bit, whatever the engine would choose: the tokens are compared.
        extra_args={"kv_transfer_params": {"codec": Codec.RAW.value}},
    )
    return EngineCoreRequest(
        request_id=RequestId(f"doctor-{name}-{secrets.token_hex(8)}"),
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=secrets.token_hex(8) if alone else None,
        data_parallel_rank=None,
    )

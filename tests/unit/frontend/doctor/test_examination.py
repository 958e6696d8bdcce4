"""A handoff that is looked at stage by stage, over engines that answer as a test wants."""

from __future__ import annotations

import asyncio
import dataclasses
import warnings
from collections import Counter
from typing import Any

import msgspec
import pytest

from tests.fakes.courses import D, P, sampling_of, transfer_of
from vllm_pd_plugin.engine_port.messages import EngineLoad
from vllm_pd_plugin.frontend.doctor.fetches import Fetches
from vllm_pd_plugin.frontend.doctor.findings import Finding

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import EngineCoreRequest, FinishReason
    from vllm.v1.metrics.stats import PrefillStats

    from tests.fakes.dispatching import Counts
    from tests.fakes.links import FakeLink, SkippingLoop, output_of, outputs_of
    from vllm_pd_plugin.frontend.doctor.examination import MAX_TOKENS, Examination
    from vllm_pd_plugin.frontend.doctor.witness import Witness
    from vllm_pd_plugin.frontend.pool.members import Member
    from vllm_pd_plugin.frontend.routing.choice import EngineKey, Policy, Role
    from vllm_pd_plugin.frontend.underway import Limits
    from vllm_pd_plugin.ids import RequestId

TOKENS = list(range(500, 500 + MAX_TOKENS))
TIMEOUT_S = 60.0
COMPUTE_S, STEP_S = 0.5, 0.1
OK = ["P over HTTP", "P attached", "D over HTTP", "D attached", "alike"]


class AnsweringLink(FakeLink):
    """An engine that computes a prompt in COMPUTE_S and gives a token each STEP_S.

    fails: it ends handoffs with an error. is_silent: it does nothing. recomputes: it computes what
    was to be handed to it. waits_for: the engine without which it does not go on with a handoff.
    tokens: its answer to everything.
    """

    def __init__(self, url: str, witness: Witness, **description: Any) -> None:
        fields = {"max_model_len": 4096, "vocab_size": 1000, "engine_id": url, **description}
        super().__init__(url, **fields)
        self.fails = self.is_silent = self.recomputes = False
        self.waits_for: AnsweringLink | None = None
        self.tokens = TOKENS
        self._witness = witness
        self._loop = asyncio.get_running_loop()

    def add(self, request_id: RequestId, payload: list[bytes]) -> None:
        super().add(request_id, payload)
        if not self.is_silent:
            self._loop.create_task(self._answer(request_id, self.requests[request_id]))

    async def _answer(self, request_id: RequestId, request: EngineCoreRequest) -> None:
        transfer = transfer_of(request) or {}
        fetches = bool(transfer.get("do_remote_prefill"))
        await asyncio.sleep(COMPUTE_S + STEP_S * fetches)
        if fetches and self.waits_for is not None and self.waits_for.is_silent:
            return
        if fetches and self.fails:
            self._give(output_of(request_id, finish=FinishReason.ERROR))
            return
        number = sampling_of(request).max_tokens or 0
        length = len(request.prompt_token_ids or ())
        external = length - 1 if fetches and not self.recomputes else 0
        stats = PrefillStats(length, length - external, external, 0, external)
        first = MAX_TOKENS - number if fetches else 0
        for position in range(first, first + number):
            finish = FinishReason.LENGTH if position == first + number - 1 else None
            self._give(
                output_of(request_id, self.tokens[position], finish=finish, prefill_stats=stats)
            )
            await asyncio.sleep(STEP_S)

    def _give(self, *outputs: Any) -> None:
        there: Any = self
        self._witness.gave_out(there, outputs_of(*outputs))


@dataclasses.dataclass(slots=True)
class Case:
    """Two engines, and what is found. fetched: what D says at each question; the last for ever."""

    witness: Witness
    p: AnsweringLink
    d: AnsweringLink
    findings: list[Finding] = dataclasses.field(default_factory=list)
    fetched: list[Fetches | None] = dataclasses.field(
        default_factory=lambda: [
            Fetches(),
            Fetches(),
            Fetches(2**20, 2**20, 2, 0.1, 1, Counter(raw=1)),
        ]
    )
    took_s: float = 0.0

    @property
    def lines(self) -> list[str]:
        return [str(finding) for finding in self.findings]

    @property
    def stages(self) -> list[str]:
        return [finding.stage for finding in self.findings]

    @property
    def wrong(self) -> str:
        """The one thing that is wrong, which comes last."""
        (found,) = (finding for finding in self.findings if not finding.is_right)
        assert found is self.findings[-1]
        return str(found)

    async def examine(self) -> bool:
        for role, link in ((Role.PREFILL, self.p), (Role.DECODE, self.d)):
            there: Any = link
            self.witness.pool.add(Member(link.url, role, there))
            if link.is_attached:
                self.witness.attached(there, EngineLoad())
        loop = asyncio.get_running_loop()
        started_at = loop.time()

        async def fetched(url: EngineKey) -> Fetches | None:
            assert url == D
            return self.fetched.pop(0) if len(self.fetched) > 1 else self.fetched[0]

        examination = Examination(
            self.witness, P, D, fetched, started_at + TIMEOUT_S, vllm_version="0.32.0"
        )
        is_right = await examination.run(self.findings.append)
        self.took_s = loop.time() - started_at
        return is_right


def examine(change: Any = lambda case: None, **of_p: Any) -> tuple[bool, Case]:
    """Look at a handoff, after something was changed. of_p: what P says of itself."""

    async def run() -> tuple[bool, Case]:
        limits = Limits(TIMEOUT_S, TIMEOUT_S, TIMEOUT_S, TIMEOUT_S)
        counts: Any = Counts()
        witness = Witness(Policy(local_below=0), limits, counts)
        p = AnsweringLink(P, witness, **{"role": "prefill", **of_p})
        d = AnsweringLink(D, witness, options={"--logprobs-mode": "raw_logprobs"})
        case = Case(witness, p, d)
        change(case)
        try:
            return await case.examine(), case
        finally:
            await witness.close()

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        return runner.run(run())


def test_a_good_handoff_is_right_in_every_stage() -> None:
    is_right, case = examine()
    assert is_right, case.lines
    assert case.stages == [*OK, "D by itself", "handoff", "KV", "tokens"]
    text = "\n".join(case.lines)
    assert "next token 100 ms later from D, then 100 ms a step" in text
    assert "  256 of 257 prompt tokens came from P: 1.0 MiB in 2 reads, raw" in text


def test_the_same_prompt_goes_to_d_alone_and_then_to_both() -> None:
    _, case = examine()
    (prefill,) = case.p.requests.values()
    alone, decode = case.d.requests.values()
    prompts = [each.prompt_token_ids for each in (alone, prefill, decode)]
    assert prompts[0] == prompts[1] == prompts[2]
    assert transfer_of(alone) is None
    assert (transfer_of(decode) or {})["do_remote_prefill"] is True
    assert (transfer_of(decode) or {})["codec"] == "raw"
    for each in (alone, prefill, decode):
        assert (sampling_of(each).temperature, sampling_of(each).ignore_eos) == (0.0, True)


def test_no_prefix_cache_can_hide_a_handoff() -> None:
    _, case = examine()
    alone, decode = case.d.requests.values()
    assert alone.cache_salt
    assert decode.cache_salt is None
    assert sampling_of(alone).skip_reading_prefix_cache
    assert not sampling_of(decode).skip_reading_prefix_cache
    _, again = examine()
    assert alone.prompt_token_ids != next(iter(again.d.requests.values())).prompt_token_ids


@pytest.mark.parametrize(
    ("block_tokens", "max_model_len", "expected"), [(16, 4096, 257), (128, 4096, 513), (16, 99, 90)]
)
def test_the_prompt_has_several_blocks_and_fits(
    block_tokens: int, max_model_len: int, expected: int
) -> None:
    def change(case: Case) -> None:
        case.d.description = msgspec.structs.replace(
            case.d.description, block_tokens=block_tokens, max_model_len=max_model_len
        )

    _, case = examine(change, block_tokens=block_tokens)
    prompt = next(iter(case.d.requests.values())).prompt_token_ids or []
    assert len(prompt) == expected
    assert 0 <= min(prompt) <= max(prompt) < 1000


def test_an_engine_that_is_not_there_is_found_first_and_nothing_is_sent() -> None:
    def change(case: Case) -> None:
        case.p.is_attached, case.p.problem = False, "nothing listens there"
        del case.p.description

    is_right, case = examine(change)
    assert not is_right
    assert case.stages == ["P over HTTP", "D over HTTP", "D attached"]
    assert case.lines[0].startswith("FAIL")
    assert f"{P}: nothing listens there" in case.lines[0]
    assert not case.d.sent


def test_a_control_channel_that_refuses_is_told_from_an_engine_that_is_not_there() -> None:
    def change(case: Case) -> None:
        case.d.is_attached, case.d.problem = False, "is VLLM_PD_CLUSTER_KEY the same?"

    is_right, case = examine(change)
    assert not is_right
    assert case.stages == OK[:4]
    assert case.wrong.startswith("FAIL  D attached")
    assert "VLLM_PD_CLUSTER_KEY" in case.wrong


def test_an_engine_that_never_says_anything_costs_no_more_than_the_timeout() -> None:
    def change(case: Case) -> None:
        case.d.is_attached, case.d.problem = False, "not asked yet"

    is_right, case = examine(change)
    assert not is_right
    assert "no answer in time; raise --timeout" in case.wrong
    assert case.took_s < TIMEOUT_S + 1


@pytest.mark.parametrize(
    ("of_p", "words"),
    [
        ({"role": "decode"}, "P: it is named as prefill, and was started with --kv-role decode"),
        ({"vllm_version": "0.33.1"}, "P: it runs vLLM 0.33.1, and this frontend 0.32.0"),
        ({"vocab_size": 7}, "P: it runs model, which has another vocabulary"),
        ({"block_tokens": 64}, "P has blocks of 64 tokens, D of 16"),
        (
            {"options": {"--logprobs-mode": "raw_logits"}},
            "P: its --logprobs-mode is raw_logits, and D's is raw_logprobs; give both the same",
        ),
    ],
)
def test_engines_that_do_not_fit_are_not_asked_for_a_handoff(
    of_p: dict[str, Any], words: str
) -> None:
    is_right, case = examine(**of_p)
    assert not is_right
    assert case.stages == OK
    assert words in case.wrong
    assert not case.d.sent


def test_an_engine_of_role_both_can_prefill() -> None:
    assert examine(role="both")[0]


def test_a_d_that_cannot_answer_by_itself_is_not_blamed_on_the_handoff() -> None:
    def change(case: Case) -> None:
        case.d.is_silent = True

    is_right, case = examine(change)
    assert not is_right
    assert case.stages == [*OK, "D by itself"]
    assert "it has not answered in time; look into D's log" in case.wrong
    assert case.took_s < TIMEOUT_S + 1
    assert not case.p.sent


def test_a_handoff_that_fails_says_what_d_counts_as_the_reason() -> None:
    def change(case: Case) -> None:
        case.d.fails = True
        case.fetched[2:] = [Fetches(failures=Counter(peer_unreachable=1))]

    is_right, case = examine(change)
    assert not is_right
    assert case.stages == [*OK, "D by itself", "handoff"]
    assert "D gives peer_unreachable as the reason" in case.wrong


def test_a_p_that_does_not_compute_is_named_when_time_is_up() -> None:
    def change(case: Case) -> None:
        case.p.is_silent = True
        case.d.waits_for = case.p

    is_right, case = examine(change)
    assert not is_right
    assert "P has not computed the prompt in time" in case.wrong
    assert case.took_s < TIMEOUT_S + 1


def test_kv_that_d_has_computed_itself_is_wrong() -> None:
    def change(case: Case) -> None:
        case.d.recomputes = True

    is_right, case = examine(change)
    assert not is_right
    found = {finding.stage: finding for finding in case.findings}
    assert not found["KV"].is_right
    assert found["tokens"].is_right


def test_other_tokens_are_wrong() -> None:
    def change(case: Case) -> None:
        case.p.tokens = [7, *TOKENS[1:]]

    is_right, case = examine(change)
    assert not is_right
    assert "P computes another token 1 than D by itself" in case.wrong


def test_counts_that_are_late_are_waited_for_and_not_for_ever() -> None:
    late = [Fetches()] * 5 + [Fetches(2**20, 2**20, 2, 0.1, 1, Counter(raw=1))]
    _, case = examine(lambda case: setattr(case, "fetched", list(late)))
    assert "1.0 MiB" in "\n".join(case.lines)
    is_right, case = examine(lambda case: setattr(case, "fetched", [Fetches()]))
    assert is_right
    assert "how many bytes, D's /metrics does not say" in "\n".join(case.lines)
    assert case.took_s < 10


def test_d_that_has_no_metrics_is_no_reason_to_stop() -> None:
    is_right, case = examine(lambda case: setattr(case, "fetched", [None]))
    assert is_right
    assert "D's /metrics does not say" in "\n".join(case.lines)

"""Is a handoff right, and what is to be done where it is not; pure."""

from __future__ import annotations

from collections.abc import Mapping

from vllm.v1.engine import FinishReason

from vllm_pd_plugin.engine_port.messages import EngineDescription
from vllm_pd_plugin.engine_port.served_options import differing_option
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.frontend.doctor.fetches import Fetches
from vllm_pd_plugin.frontend.doctor.findings import Finding, wrong
from vllm_pd_plugin.frontend.doctor.witness import Answer
from vllm_pd_plugin.frontend.requests.legs import LegKind
from vllm_pd_plugin.frontend.routing.choice import Reason as RouteReason

_TIE = 0.1
"""Two tokens whose log-probabilities are less apart may change places by rounding."""
_REMEDIES: Mapping[str, str] = {
    Reason.BAD_PARAMS: "engines on several machines need VLLM_PD_CLUSTER_KEY",
    Reason.WRONG_ROLE: "start P with --kv-role prefill or both, D with decode or both",
    Reason.PEER_UNREACHABLE: "let D's machine reach P's control channel (its option "
    "advertise_host and port), and give both the same VLLM_PD_CLUSTER_KEY",
    Reason.PEER_RESTARTED: "P was restarted meanwhile; try again",
    Reason.PEER_INCOMPATIBLE: "D's log names what differs: model, weights, types, --block-size, "
    "--tensor-parallel-size, or a NIXL that cannot use P",
    Reason.READ_FAILED: "look for UCX and NIXL in both logs; let D's machine reach P's on the "
    "ports that UCX uses, over the device that UCX_NET_DEVICES names",
    Reason.FETCH_TIMEOUT: "the network stands still or is slow: let D's machine reach P's on the "
    "ports that UCX uses, or raise fetch_timeout_s",
    Reason.QUEUE_TIMEOUT: "P or D has too much to do; try again when they are idle",
    Reason.DIGEST_MISMATCH: "what was read is not what P holds: look for faulty memory or network "
    "hardware",
}
_ELSE = "D's log says more; docs/metrics.md has all reasons"


def describe(engine: EngineDescription) -> str:
    """Return what an engine says of itself."""
    kv = engine.kv
    kv_type = kv.dtype if kv.kv_cache_dtype == "auto" else kv.kv_cache_dtype
    return (
        f"{engine.model}, role {engine.role}, KV {kv_type} in blocks of {engine.block_tokens} "
        f"tokens, vLLM {engine.vllm_version}"
    )


def judge_alike(problems: Mapping[str, str], p: EngineDescription, d: EngineDescription) -> Finding:
    """problems: why a frontend does not use an engine, by its name here; empty where it does."""
    if unused := [f"{name}: {problem}" for name, problem in problems.items() if problem]:
        return wrong("alike", "; ".join(unused))
    if found := differing_option(d.options, p.options, "D's"):
        return wrong("alike", f"P: {found}")
    if p.block_tokens != d.block_tokens:
        text = f"P has blocks of {p.block_tokens} tokens, D of {d.block_tokens}"
        return wrong("alike", f"{text}; give both the same --block-size")
    return Finding("alike", f"{d.kv.architecture}, weights {d.kv.weights}")


def judge_alone(answer: Answer, num_prompt_tokens: int) -> Finding:
    """Of the prompt that D has computed by itself."""
    if answer.is_whole:
        text = f"{num_prompt_tokens} prompt tokens computed, {len(answer.tokens)} given"
        return Finding("D by itself", text, answer.seconds)
    why = _unanswered(answer) or "it has not answered in time"
    return wrong("D by itself", f"{why}; look into D's log", answer.seconds)


def judge_handoff(answer: Answer, fetched: Fetches | None) -> Finding:
    """Of the prompt that P has computed for D. fetched: by D meanwhile; None if it does not say."""
    prefill, decode = answer.part(LegKind.PREFILL), answer.part(LegKind.DECODE)
    if problem := _problem(answer, fetched):
        return wrong("handoff", problem, answer.seconds)
    text = [f"prompt {_ms(prefill.compute_s)} on P"]
    if prefill.queue_s:
        text[0] += f" (and {_ms(prefill.queue_s)} in its queue)"
    if prefill.times and decode.times:
        text.append(f"next token {_ms(decode.times[0] - prefill.times[0])} later from D")
    text.append(f"then {_ms(decode.step_s)} a step")
    return Finding("handoff", ", ".join(text), answer.seconds)


def judge_kv(answer: Answer, fetched: Fetches | None) -> Finding:
    """Did the KV come from P, or has D computed it?"""
    part = answer.part(LegKind.DECODE)
    if part.external_tokens is None:
        return wrong("KV", "D does not say where the prompt's KV came from; look at its metrics")
    if not part.external_tokens:
        why = _reasons(fetched) or _ELSE
        return wrong("KV", f"none came from P: D has computed the prompt by itself; {why}")
    text = f"{part.external_tokens} of {part.prompt_tokens} prompt tokens came from P"
    if fetched is None or not fetched.fetches:
        return Finding("KV", f"{text}; how many bytes, D's /metrics does not say")
    codecs = ", ".join(sorted(fetched.codecs))
    text += f": {_size(fetched.num_bytes)} in {fetched.reads:.0f} reads, {codecs}"
    if fetched.fetches > 1:
        text += f" (all that D has fetched meanwhile, over {fetched.fetches:.0f} ranks or handoffs)"
    return Finding("KV", text, fetched.seconds / fetched.fetches)


def judge_tokens(alone: Answer, handed_off: Answer) -> Finding:
    """Are the tokens those that D gives by itself?"""
    expected, got = alone.tokens, handed_off.tokens
    pairs = zip(expected, got, strict=True)
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if at is None:
        return Finding("tokens", f"all {len(expected)} are those of D by itself")
    likely = alone.likeliest[at] if at < len(alone.likeliest) else {}
    if expected[at] in likely and got[at] in likely:
        apart = likely[expected[at]] - likely[got[at]]
        if apart < _TIE:
            text = f"the first {at} are those of D by itself; the next is another by rounding"
            return Finding("tokens", f"{text}: two are as likely ({apart:.3f} apart)")
    who = "P computes" if at == 0 else "after the handoff D computes"
    return wrong(
        "tokens",
        f"{who} another token {at + 1} than D by itself; give both engines the same --dtype and "
        "--attention-backend, and the option integrity: digest to see whether the KV came whole",
    )


def _problem(answer: Answer, fetched: Fetches | None) -> str:
    """Say why a handoff has failed; empty where it has not."""
    prefill, decode = answer.part(LegKind.PREFILL), answer.part(LegKind.DECODE)
    if not answer.routes:
        return _unanswered(answer) or "the engines are full; try again when they are idle"
    if answer.routes[0].reason is not RouteReason.DISAGGREGATED:
        return f"a frontend does not hand it off ({answer.routes[0].reason})"
    if answer.refusal:
        return f"an engine refuses it: {answer.refusal}"
    if prefill.finish in (FinishReason.ERROR, FinishReason.ABORT):
        return f"P has ended the prompt ({prefill.finish}); look into P's log"
    if answer.is_late and not decode.times:
        if not prefill.times:
            return "P has not computed the prompt in time; look into P's log, or raise --timeout"
        known = _reasons(fetched) or _REMEDIES[Reason.FETCH_TIMEOUT]
        return f"P has computed the prompt, and D has not got its KV in time; {known}"
    if len(answer.routes) > 1 or not answer.is_whole:
        return _reasons(fetched) or f"it has failed; {_unanswered(answer) or _ELSE}"
    return ""


def _reasons(fetched: Fetches | None) -> str:
    """Say what D counts as the reasons of failed handoffs; empty where there is none."""
    if fetched is None or not fetched.failures:
        return ""
    named = ", ".join(sorted(fetched.failures))
    remedies = {_REMEDIES.get(reason, _ELSE) for reason in fetched.failures}
    return f"D gives {named} as the reason; {'; '.join(sorted(remedies))}"


def _unanswered(answer: Answer) -> str:
    if answer.ending is None:
        return ""
    return f"it has ended without an answer ({answer.refusal or answer.ending})"


def _ms(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds * 1000:.0f} ms"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"

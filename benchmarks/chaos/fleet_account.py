"""What became of each request of a chaos run on a fleet, token by token. Pure.

Failing is no excuse here: engines were killed, but there were others.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from benchmarks.chaos.account import Fate
from benchmarks.chaos.run import judge_answer
from benchmarks.chaos.stream import Received
from benchmarks.common.output import markdown
from tests.engine import Completion

_MIN_RUN = 3
"""So many tokens must go on as they should before others count as missing or sent twice."""


class Verdict(StrEnum):
    """Each request has exactly one. A client that left got what it should up to then."""

    ANSWERED = "answered"
    LEFT = "left"
    FAILED = "failed"
    WRONG = "wrong"
    DUPLICATED = "duplicated"
    MISSING = "missing"
    HUNG = "hung"


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    """What became of one request. ``what``: why it failed, or how its answer differs."""

    index: int
    kind: str
    verdict: Verdict
    what: str = ""
    is_tie: bool = False


def judge(index: int, kind: str, fate: Fate, received: Received, reference: Completion) -> Judged:
    """Compare what has come with what one engine alone answers."""
    is_whole = fate is Fate.ENDED and not received.error
    verdict, what, is_tie = _compare(received, reference, is_whole)
    if verdict is Verdict.ANSWERED and not is_whole:
        got = f"after {len(received.token_ids)} of {len(reference.token_ids)} tokens"
        match fate:
            case Fate.LEFT:
                verdict, what = Verdict.LEFT, ""
            case Fate.HUNG:
                verdict, what = Verdict.HUNG, got
            case Fate.ENDED:
                started = "in its stream: " if received.arrivals else ""
                verdict, what = Verdict.FAILED, f"{started}{received.error[:160]}"
    return Judged(index, kind, verdict, what, is_tie)


def _compare(
    received: Received, reference: Completion, is_whole: bool
) -> tuple[Verdict, str, bool]:
    """Return ANSWERED where nothing differs up to where the answer ends."""
    answer = received.completion()
    if not is_whole:
        num_tokens = len(answer.token_ids)
        if not num_tokens:
            return Verdict.ANSWERED, "", False
        reference = dataclasses.replace(
            reference,
            text=answer.text,
            token_ids=reference.token_ids[:num_tokens],
            token_logprobs=reference.token_logprobs[:num_tokens],
            logprobs=reference.logprobs[:num_tokens],
            finish_reason=answer.finish_reason,
        )
    difference, is_tie = judge_answer(reference, answer)
    if difference is None:
        return Verdict.ANSWERED, "", is_tie
    return deviation(reference.token_ids, answer.token_ids) or Verdict.WRONG, difference, False


def deviation(expected: Sequence[int], got: Sequence[int]) -> Verdict | None:
    """Say in what way tokens differ; None if they do not."""
    same = 0
    while same < min(len(expected), len(got)) and expected[same] == got[same]:
        same += 1
    rest, tail = expected[same:], got[same:]
    if not rest and not tail:
        return None
    if not tail:
        return Verdict.MISSING
    if not rest:
        return Verdict.DUPLICATED
    if any(_goes_on(rest[skipped:], tail) for skipped in range(1, len(rest))):
        return Verdict.MISSING
    if any(_goes_on(rest, tail[again:]) for again in range(1, len(tail))):
        return Verdict.DUPLICATED
    return Verdict.WRONG


def _goes_on(expected: Sequence[int], got: Sequence[int]) -> bool:
    length = min(len(expected), len(got))
    return length >= _MIN_RUN and tuple(expected[:length]) == tuple(got[:length])


@dataclasses.dataclass(frozen=True, slots=True)
class Aftermath:
    """What there is to say of an arm beside its requests.

    kills: by engine.
    leaked_blocks: in use at the end, by engine; None where one does not tell.
    engine_deaths: engines that ended by themselves.
    counts: what the frontend counted, by name and reason; None where there is none.
    """

    kills: Mapping[str, int]
    leaked_blocks: Mapping[str, int | None]
    came_to_rest: bool
    engine_deaths: int
    counts: Mapping[str, Mapping[str, int]] | None


def longest_waits(
    streams: Sequence[tuple[float, Sequence[float]]],
) -> tuple[float | None, float | None]:
    """Return the longest time to a first token, and the longest between two tokens, in seconds.

    streams: when each request was sent, and when its tokens came.
    """
    first = [arrivals[0] - sent for sent, arrivals in streams if arrivals]
    gaps = [
        later - earlier
        for _, arrivals in streams
        for earlier, later in zip(arrivals, arrivals[1:], strict=False)
    ]
    return (
        round(max(first), 2) if first else None,
        round(max(gaps), 2) if gaps else None,
    )


def row(
    arm: str,
    topology: str,
    judged: Sequence[Judged],
    streams: Sequence[tuple[float, Sequence[float]]],
    after: Aftermath,
) -> dict[str, Any]:
    """Return the arm's row."""
    verdicts = Counter(each.verdict for each in judged)
    leaked = [count for count in after.leaked_blocks.values() if count is not None]
    first_s, pause_s = longest_waits(streams)
    found: dict[str, Any] = {"arm": arm, "topology": topology, "sent": len(judged)}
    found |= {verdict.value: verdicts[verdict] for verdict in Verdict}
    found |= {
        "retried": None if after.counts is None else sum(after.counts["retries"].values()),
        "longest_pause_s": pause_s,
        "longest_ttft_s": first_s,
        "leaked_blocks": sum(leaked) if len(leaked) == len(after.leaked_blocks) else None,
        "came_to_rest": after.came_to_rest,
        "engine_deaths": after.engine_deaths,
        "ties": sum(each.is_tie for each in judged),
        "kills": dict(after.kills),
        "failed_reasons": _reasons(judged),
        "differences": [
            f"request {each.index} ({each.kind}), {each.verdict}: {each.what}"
            for each in judged
            if each.verdict in (Verdict.WRONG, Verdict.DUPLICATED, Verdict.MISSING, Verdict.HUNG)
        ],
        "kinds": dict(sorted(Counter(each.kind for each in judged).items())),
        "counts": after.counts,
        "leaked_blocks_by_engine": dict(after.leaked_blocks),
    }
    return found


def _reasons(judged: Sequence[Judged]) -> dict[str, int]:
    failed = Counter(each.what for each in judged if each.verdict is Verdict.FAILED)
    return dict(failed.most_common())


def is_clean(row: Mapping[str, Any]) -> bool:
    """Say whether engines were killed, every client that stayed got its whole answer, and nothing
    is held any more."""
    names = ("failed", "wrong", "duplicated", "missing", "hung", "leaked_blocks", "engine_deaths")
    was_tried = row["sent"] > 0 and sum(row["kills"].values()) > 0
    return row["came_to_rest"] and was_tried and all(row[name] == 0 for name in names)


def reason_counts(metrics: Mapping[str, float]) -> dict[str, dict[str, int]]:
    """Return what a frontend has counted of routes, retries and failures, by reason."""
    counts: dict[str, dict[str, int]] = {"routes": {}, "retries": {}, "failures": {}}
    for key, value in metrics.items():
        found = re.fullmatch(r'pd_frontend_(\w+)_total\{reason="([^"]+)"[^}]*\}', key)
        if found and found[1] in counts and value:
            of_name = counts[found[1]]  # a reason comes once for each class of requests
            of_name[found[2]] = of_name.get(found[2], 0) + int(value)
    return counts


_COLUMNS = {
    "sent": "sent",
    "answered": "answered",
    "failed": "failed",
    "wrong": "wrong",
    "duplicated": "tokens twice",
    "missing": "tokens missing",
    "hung": "hung",
    "left": "client left",
    "retried": "retried",
    "longest_pause_s": "longest pause s",
    "longest_ttft_s": "longest TTFT s",
    "leaked_blocks": "leaked blocks",
    "engine_deaths": "engines died by themselves",
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table, and under it what else there is to say of each arm."""
    lines = [
        [row["arm"], *("unknown" if row[name] is None else str(row[name]) for name in _COLUMNS)]
        for row in rows
    ]
    parts = [markdown(("arm", *_COLUMNS.values()), lines)]
    for row in rows:
        named = {"kills": row["kills"], "failed": row["failed_reasons"]}
        named |= {f"frontend's {name}": counted for name, counted in (row["counts"] or {}).items()}
        said = [f"- {name}: {_listed(counted)}" for name, counted in named.items()]
        said += [f"- {difference}" for difference in row["differences"][:10]]
        if not row["came_to_rest"]:
            said.append(f"- still held at the end: {_listed(row['leaked_blocks_by_engine'])}")
        parts += [f"`{row['arm']}`, {row['topology']}:", "\n".join(said)]
    return "\n\n".join(parts)


def _listed(counted: Mapping[str, int | None]) -> str:
    return ", ".join(f"{what} {count}" for what, count in counted.items()) or "none"

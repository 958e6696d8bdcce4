"""What became of each request of a chaos run, judged at its end.

Pure: takes what the client saw and when the engines lived, gives a verdict for each request.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

DEATH_NOTICE_S = 5.0
"""How long before its end was noticed an engine that died by itself may have been failing."""

NO_FAILED_ANSWER = frozenset({"aborted", "not_loaded"})
"""Counted reasons that fail no request that a client still waits for."""

_UNTELLING = re.compile(
    r"|internal server error|request failed; please retry|enginecore encountered .*",
    re.IGNORECASE | re.DOTALL,
)
_PD_FAILURE = re.compile(r'pd_handoff_failures_total\{reason="(?P<reason>\w+)"\}')
_NIXL_FAILURES = "vllm:nixl_num_failed_transfers_total"
_NUM_BLOCKS = re.compile(r'vllm:cache_config_info\{(?:.*,)?num_gpu_blocks="(?P<blocks>\d+)"')


class Side(StrEnum):
    PRODUCER = "producer"
    CONSUMER = "consumer"


class Ending(StrEnum):
    """How one life of an engine ended, as a reason for the requests that it took along."""

    KILLED = "was killed"
    DIED = "died by itself"


@dataclasses.dataclass(slots=True)
class Life:
    """One process at an engine's address. All times are of the same monotonic clock.

    stops: from when to when it was stopped.
    failures: handoffs that failed on it, by reason, as last read from its metrics.
    """

    started_s: float
    ready_s: float = math.inf
    ended_s: float = math.inf
    ending: Ending | None = None
    stops: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    failures: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def excuse(self, begun_s: float, ended_s: float) -> str | None:
        """Say why a connection of that time may have broken; None if it should not have."""
        if self.ending is not None:
            notice_s = DEATH_NOTICE_S if self.ending is Ending.DIED else 0.0
            if ended_s >= self.ended_s - notice_s:
                return self.ending.value
        if begun_s <= self.ready_s:
            return "was starting"
        if any(begun_s <= until and since <= ended_s for since, until in self.stops):
            return "was stopped"
        return None

    def counted_failures(self) -> int:
        """Return how many failed answers the engine's own counts can explain, at most."""
        return sum(n for reason, n in self.failures.items() if reason not in NO_FAILED_ANSWER)


@dataclasses.dataclass(frozen=True, slots=True)
class Leg:
    """What one engine answered. ``status`` is None where the connection broke.

    life: index of the engine's life when the leg began.
    message: of the error; empty without one.
    """

    side: Side
    life: int
    begun_s: float
    ended_s: float
    status: int | None
    message: str = ""


class Fate(StrEnum):
    """How the client's wait ended."""

    ENDED = "ended"
    LEFT = "client left"
    HUNG = "hung"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One request, as the client saw it.

    difference: how the consumer's answer differs from the reference; None if it does not.
    is_tie: the answers part where the reference held two tokens for equally likely.
    """

    index: int
    fate: Fate
    legs: tuple[Leg, ...] = ()
    difference: str | None = None
    is_tie: bool = False

    def deciding_leg(self) -> Leg | None:
        """Return the consumer's leg, or the producer's if the consumer was not asked."""
        for side in (Side.CONSUMER, Side.PRODUCER):
            for leg in self.legs:
                if leg.side is side:
                    return leg
        return None


@dataclasses.dataclass(slots=True)
class Tally:
    """Every request sent is in exactly one of answered, wrong, failed, unexplained and hung."""

    sent: int = 0
    answered: int = 0
    wrong: int = 0
    failed: int = 0
    unexplained: int = 0
    hung: int = 0
    ties: int = 0
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    mysteries: Counter[str] = dataclasses.field(default_factory=Counter)
    differences: list[str] = dataclasses.field(default_factory=list)

    def fail(self, reason: str) -> None:
        self.failed += 1
        self.reasons[reason] += 1

    def leave_unexplained(self, what: str) -> None:
        self.unexplained += 1
        self.mysteries[what] += 1


def judge(
    records: Sequence[Record], lives: Mapping[Side, Sequence[Life]], recomputes: bool = False
) -> Tally:
    """Give every request its verdict.

    vLLM tells the client of a failed handoff nothing but "Internal server error"; the reason is
    in the engine's counts. So of the untelling errors of one life, as many have a reason as that
    life counted failures. The rest is unexplained, unless the engine died by itself.

    recomputes: a failed handoff fails no request, so that no count explains an error.
    """
    tally = Tally(sent=len(records))
    untelling: Counter[tuple[Side, int]] = Counter()
    for record in records:
        leg = record.deciding_leg()
        if record.fate is Fate.HUNG:
            tally.hung += 1
        elif record.fate is Fate.LEFT:
            tally.fail("client left")
        elif leg is None:
            tally.leave_unexplained("no engine was asked")
        elif leg.status == 200:
            _judge_answer(tally, record, leg)
        elif leg.status is None:
            excuse = lives[leg.side][leg.life].excuse(leg.begun_s, leg.ended_s)
            if excuse is None:
                tally.leave_unexplained(f"{leg.side}: {leg.message}")
            else:
                tally.fail(f"{leg.side} {excuse}")
        elif _UNTELLING.fullmatch(leg.message.strip()):
            untelling[leg.side, leg.life] += 1
        else:
            tally.fail(f"{leg.side}, HTTP {leg.status}: {leg.message[:200]}")
    for (side, index), count in untelling.items():
        life = lives[side][index]
        counted = 0 if recomputes else min(count, life.counted_failures())
        _judge_untelling(tally, side, life, counted, count - counted)
    return tally


def _judge_answer(tally: Tally, record: Record, leg: Leg) -> None:
    if leg.side is Side.PRODUCER:
        tally.leave_unexplained("producer gave no kv_transfer_params")
    elif record.difference is None:
        tally.answered += 1
        tally.ties += record.is_tie
    else:
        tally.wrong += 1
        tally.differences.append(f"request {record.index}: {record.difference}")


def _judge_untelling(tally: Tally, side: Side, life: Life, counted: int, others: int) -> None:
    for _ in range(counted):
        tally.fail(f"failure counted by the {side}")
    for _ in range(others):
        if life.ending is Ending.DIED:
            tally.fail(f"{side} {Ending.DIED.value}")
        else:
            tally.leave_unexplained(f"{side}: server error, and no failure counted")


def failure_counts(metrics: Mapping[str, float]) -> dict[str, int]:
    """Return the failed handoffs that an engine has counted, by reason."""
    counts: dict[str, int] = {}
    for key, value in metrics.items():
        if found := _PD_FAILURE.fullmatch(key):
            counts[found["reason"]] = int(value)
        elif key.startswith(_NIXL_FAILURES):
            counts["nixl_failed_transfer"] = int(value)
    return {reason: count for reason, count in counts.items() if count}


def num_blocks(metrics: Mapping[str, float]) -> int:
    """Return the size of an engine's pool of KV blocks. Raises LookupError if it is not told."""
    for key in metrics:
        if found := _NUM_BLOCKS.match(key):
            return int(found["blocks"])
    raise LookupError("the engine does not tell num_gpu_blocks in vllm:cache_config_info")


def used_blocks(usage: float, pool_blocks: int) -> int:
    """Turn vLLM's usage into blocks; one block of the pool is never given out."""
    return round(usage * (pool_blocks - 1))


def row(
    arm: str,
    tally: Tally,
    lives: Mapping[Side, Sequence[Life]],
    leaked: Mapping[Side, int | None],
    came_to_rest: bool,
    events: Mapping[str, int],
) -> dict[str, Any]:
    """Return the arm's row.

    leaked: blocks in use at the end; None where an engine no longer tells.
    came_to_rest: whether no request and no handoff was open at the end.
    events: disturbances carried out, by name.
    """
    known = [count for count in leaked.values() if count is not None]
    counted: Counter[str] = Counter()
    for life in (life for those in lives.values() for life in those):
        counted.update(life.failures)
    return {
        "arm": arm,
        "sent": tally.sent,
        "answered": tally.answered,
        "wrong": tally.wrong,
        "failed": tally.failed,
        "unexplained": tally.unexplained,
        "hung": tally.hung,
        "leaked_blocks": sum(known) if len(known) == len(leaked) else None,
        "engine_deaths": sum(
            life.ending is Ending.DIED for those in lives.values() for life in those
        ),
        "came_to_rest": came_to_rest,
        "ties": tally.ties,
        "failed_reasons": dict(tally.reasons.most_common()),
        "unexplained_errors": dict(tally.mysteries.most_common()),
        "wrong_answers": tally.differences,
        "counted_failures": dict(counted.most_common()),
        "leaked_blocks_by_engine": {side.value: count for side, count in leaked.items()},
        "events": dict(events),
    }


def is_clean(row: Mapping[str, Any]) -> bool:
    """Say whether nothing happened that must not: failing with a reason is allowed."""
    names = ("wrong", "unexplained", "hung", "leaked_blocks", "engine_deaths")
    return row["came_to_rest"] and all(row[name] == 0 for name in names)


_COLUMNS = {
    "sent": "sent",
    "answered": "answered",
    "wrong": "wrong",
    "failed": "failed with a reason",
    "unexplained": "failed without",
    "hung": "hung",
    "leaked_blocks": "leaked blocks",
    "engine_deaths": "engines died by themselves",
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table, and under it the reasons of each arm."""
    lines = [
        "| arm | " + " | ".join(_COLUMNS.values()) + " |",
        "| --- " * (1 + len(_COLUMNS)) + "|",
    ]
    for row in rows:
        cells = ["unknown" if row[name] is None else str(row[name]) for name in _COLUMNS]
        lines.append(f"| {row['arm']} | " + " | ".join(cells) + " |")
    for row in rows:
        lines += ["", f"`{row['arm']}`:", ""]
        for name in ("events", "failed_reasons", "unexplained_errors", "counted_failures"):
            listed = ", ".join(f"{what} {count}" for what, count in row[name].items())
            lines.append(f"- {name.replace('_', ' ')}: {listed or 'none'}")
    return "\n".join(lines)

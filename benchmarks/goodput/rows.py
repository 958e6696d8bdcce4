"""What `benchmarks.goodput` makes of what it measured: rows, and tables made from them. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from benchmarks.common.output import markdown
from benchmarks.common.statistics import Ratio, Row, median, quartiles
from benchmarks.goodput.plan import Slo

BASE_ARM = "alone x2"
TARGET = 0.9
"""Which share of the requests must meet an SLO."""
HOPELESS = 0.5
"""Where fewer meet even the loosest SLO, higher rates are not tried."""

NOTES = (
    "Open loop: requests arrive by a Poisson process. Seed, arrival times and prompts are the same "
    "for every arm; a repetition has its own. Prompts are random tokens; what is shared is said "
    "above. Greedy, streamed over /v1/completions, ignore_eos.",
    "Arms: {arms}.",
    "Cores: each arm has two engines; the thread that computes of the first one is on core "
    "{first}, that of the second one on core {second}. Every other thread (EngineCore, API "
    "servers, transfer and progress threads, frontend, router, client) is free to run on both. The "
    "same for every arm.",
    "vLLM's NixlConnector pins the thread that computes to the last core of a NUMA node; that is "
    "undone. Its progress threads spin, as shipped.",
    "Only one arm runs at a time, the engines of the others are stopped (SIGSTOP). In a repetition "
    "each arm takes all its rates, then the next one has its turn, in an order that rotates. The "
    "prefix caches are emptied at the start of a turn.",
    "At each rate {warm_up:g} s of arrivals come first that do not count, then {seconds:g} s that "
    "do; arrivals go on until the last one that counts has ended, or has missed every SLO. "
    "What is under way {drain:g} s after the last arrival is broken off; that, and what has "
    "failed, has met no SLO.",
    "A request meets an SLO if its TTFT (from when it was due) and its mean TPOT (first to last "
    "token, over the tokens after the first) both do. A ladder of rates is climbed until fewer "
    "than 50 % meet the loosest SLO.",
    "The highest rate: a request's strain is the larger of TTFT and TPOT, each over its limit; "
    "90 % meet the SLO as long as the strain's 90th percentile is 1 at the most. The rate at which "
    "it is 1 lies on a straight line between the last rate of the ladder at which it was not above "
    "1 and the next one; 0 if it was above 1 at the first rate, `>=` if at none. It is taken in "
    "each repetition; shown are median and quartiles.",
    "TTFT p90, TPOT p90 and ITL p99 are of all repetitions together, at the highest rate of the "
    "ladder that at least 90 % have met in all of them together.",
    "Ratios are medians of the ratios of the single repetitions, in brackets their quartiles: the "
    "requests of a repetition are the same for every arm, and others than those of the next.",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One request. Without a first token, or an end, the times are infinite."""

    ttft_ms: float
    tpot_ms: float
    itl_ms: tuple[float, ...]

    @classmethod
    def of(cls, due: float, arrived: Sequence[float], tokens: int) -> Answer:
        """Build it from when it was due and when chunks came, in seconds, of so many tokens.

        Tokens that came in one chunk have no gap between them.
        """
        gaps = [1e3 * (b - a) for a, b in itertools.pairwise(arrived)]
        return cls(1e3 * (arrived[0] - due), sum(gaps) / max(1, tokens - 1), tuple(gaps))

    @classmethod
    def failed(cls) -> Answer:
        return cls(math.inf, math.inf, ())

    @property
    def has_failed(self) -> bool:
        return math.isinf(self.ttft_ms)

    def strain(self, slo: Slo) -> float:
        """Return how close it came to its limits: above 1 it missed one."""
        return max(self.ttft_ms / slo.ttft_ms, self.tpot_ms / slo.tpot_ms)

    def meets(self, slo: Slo) -> bool:
        return self.strain(slo) <= 1


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One rate of one repetition. routes: requests by how they went, where that is counted."""

    rate: float
    answers: Sequence[Answer]
    routes: Mapping[str, float]


Ladder = Sequence[Step]
"""The rates of one repetition, as they were climbed."""


def attainment(answers: Sequence[Answer], slo: Slo) -> float:
    """Return the share of requests that met an SLO; 1 where there were none."""
    return sum(answer.meets(slo) for answer in answers) / len(answers) if answers else 1.0


def is_hopeless(answers: Sequence[Answer], slos: Sequence[Slo]) -> bool:
    return max(attainment(answers, slo) for slo in slos) < HOPELESS


def strain(answers: Sequence[Answer], slo: Slo) -> float:
    """Return what 90 % of the requests kept to, of an SLO's limits: 1 is just met; 0 of none."""
    return _nearest_rank([answer.strain(slo) for answer in answers], TARGET) if answers else 0.0


def met_steps(strains: Sequence[tuple[float, float]]) -> int:
    """Return how many rates, from the first on, were met by enough requests."""
    return sum(1 for _ in itertools.takewhile(lambda each: each[1] <= 1, strains))


def max_rate(strains: Sequence[tuple[float, float]]) -> float:
    """Return the highest rate at which enough requests meet an SLO.

    strains: rates, rising, and ``strain`` at each. Between the last rate before the first that was
    missed, and that one, it is taken to rise in a straight line.
    """
    number = met_steps(strains)
    if number == 0:
        return 0.0
    rate, met = strains[number - 1]
    if number == len(strains):
        return rate
    next_rate, missed = strains[number]
    return rate + (next_rate - rate) * (1 - met) / (missed - met)


def nearest_rank(values: Sequence[float], share: float) -> float | None:
    """Return the smallest value that so large a share of all does not exceed; None of nothing."""
    found = _nearest_rank(values, share) if values else math.inf
    return round(found, 2) if math.isfinite(found) else None


def _nearest_rank(values: Sequence[float], share: float) -> float:
    return sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]


def goodput_rows(
    arm: str, workload: str, slos: Sequence[Slo], ladders: Sequence[Ladder | None]
) -> list[Row]:
    """Return a row for each SLO.

    ladders: by repetition, None where the arm did not answer; at least once it did.
    """
    return [_row(arm, workload, slo, ladders) for slo in slos]


def _row(arm: str, workload: str, slo: Slo, ladders: Sequence[Ladder | None]) -> Row:
    steps = [step for ladder in ladders for step in ladder or ()]
    single = [
        [(step.rate, strain(step.answers, slo)) for step in ladder] if ladder else None
        for ladder in ladders
    ]
    good = [each for each in single if each is not None]
    rates = sorted({step.rate for step in steps})
    steps_at = {rate: [step for step in steps if step.rate == rate] for rate in rates}
    answers_at = {
        rate: [answer for step in taken for answer in step.answers]
        for rate, taken in steps_at.items()
    }
    shares = [(rate, attainment(answers, slo)) for rate, answers in answers_at.items()]
    number = met_steps([(rate, strain(answers, slo)) for rate, answers in answers_at.items()])
    met_rate = shares[number - 1][0] if number else None
    met = answers_at[met_rate] if met_rate is not None else []
    max_rates = [max_rate(each) for each in good]
    low, high = quartiles(max_rates)
    gaps = [gap for answer in met for gap in answer.itl_ms]
    return {
        "arm": arm,
        "workload": workload,
        "slo": slo.name,
        "slo_ttft_ms": slo.ttft_ms,
        "slo_tpot_ms": slo.tpot_ms,
        "n": len(good),
        "max_rate": round(median(max_rates), 3),
        "max_rate_low": round(low, 3),
        "max_rate_high": round(high, 3),
        "max_rates": [None if each is None else round(max_rate(each), 3) for each in single],
        "is_bounded": all(met_steps(each) < len(each) for each in good),
        "attainment": [[rate, round(share, 4)] for rate, share in shares],
        "strains": [[[rate, _finite(value)] for rate, value in each] for each in good],
        "requests": [[rate, len(answers)] for rate, answers in answers_at.items()],
        "failed": [[r, sum(a.has_failed for a in answers)] for r, answers in answers_at.items()],
        "met_rate": met_rate,
        "ttft_p90_ms": nearest_rank([answer.ttft_ms for answer in met], 0.9),
        "tpot_p90_ms": nearest_rank([answer.tpot_ms for answer in met], 0.9),
        "itl_p99_ms": nearest_rank(gaps, 0.99),
        "routes": _routes(steps_at.get(met_rate, []) if met_rate is not None else []),
    }


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _routes(steps: Sequence[Step]) -> dict[str, float]:
    names = sorted({name for step in steps for name in step.routes})
    return {name: sum(step.routes.get(name, 0.0) for step in steps) for name in names}


def to_base(rows: Sequence[Row], row: Row) -> Ratio | None:
    """Return how a row's highest rate compares with that of ``alone x2``; by repetition, as these
    have requests of their own. None where there is nothing to compare."""
    base = _find(rows, row, BASE_ARM)
    if base is None or base is row or len(base["max_rates"]) != len(row["max_rates"]):
        return None
    pairs = zip(row["max_rates"], base["max_rates"], strict=True)
    single = [own / other for own, other in pairs if own is not None and other]
    return Ratio(median(single), *quartiles(single)) if single else None


def _find(rows: Sequence[Row], like: Row, arm: str) -> Row | None:
    wanted = (arm, like["workload"], like["slo"])
    return next((r for r in rows if (r["arm"], r["workload"], r["slo"]) == wanted), None)


def tables(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return title and text of each table, of rows that are in the order of their tables."""
    return [
        ("Requests a second of which 90 % meet the SLO", _goodput_table(rows)),
        ("Share of requests that meet the SLO, by rate", _attainment_table(rows)),
        ("Where the requests went, at the rate of the latencies", _routes_table(rows)),
    ][: 3 if any(row["routes"] for row in rows) else 2]


def _where(row: Row) -> list[str]:
    limits = f"{row['slo_ttft_ms']:g}/{row['slo_tpot_ms']:g} ms"
    return [row["workload"], f"{row['slo']} ({limits})", row["arm"]]


def _goodput_table(rows: Sequence[Row]) -> str:
    head = (
        "workload", "SLO (TTFT/TPOT)", "arm", "n", "highest rate (quartiles)", f"÷ {BASE_ARM}",
        "latencies at", "TTFT p90 ms", "TPOT p90 ms", "ITL p99 ms",
    )  # fmt: skip
    lines = []
    for row in rows:
        bound = "" if row["is_bounded"] else ">= "
        spread = f"{row['max_rate_low']:.2f} to {row['max_rate_high']:.2f}"
        times = ("ttft_p90_ms", "tpot_p90_ms", "itl_p99_ms")
        at = row["met_rate"]
        lines.append(
            [
                *_where(row), str(row["n"]), f"{bound}{row['max_rate']:.2f} ({spread})",
                str(to_base(rows, row) or ""), "" if at is None else f"{at:g}/s",
                *("" if row[name] is None else f"{row[name]:.1f}" for name in times),
            ]
        )  # fmt: skip
    return markdown(head, lines)


def _attainment_table(rows: Sequence[Row]) -> str:
    rates = sorted({rate for row in rows for rate, _ in row["attainment"]})
    lines = []
    for row in rows:
        shares = dict(map(tuple, row["attainment"]))
        cells = [f"{100 * shares[rate]:.0f} %" if rate in shares else "" for rate in rates]
        lines.append([*_where(row), *cells])
    return markdown(("workload", "SLO (TTFT/TPOT)", "arm", *(f"{r:g}/s" for r in rates)), lines)


def _routes_table(rows: Sequence[Row]) -> str:
    lines = [
        [*_where(row), f"{row['met_rate']:g}/s", f"{count:.0f}", name]
        for row in rows
        for name, count in row["routes"].items()
        if count
    ]
    return markdown(("workload", "SLO (TTFT/TPOT)", "arm", "rate", "requests", "way"), lines)

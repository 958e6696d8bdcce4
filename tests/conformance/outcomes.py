"""From what pytest wrote to what counts: outcomes of one run, and of up to three runs together."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum

MAX_RUNS = 3


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    NOT_RUN = "not run"
    """The module's deadline came first, or the process died: no run has anything to say."""


_WORST_FIRST = (Outcome.FAILED, Outcome.SKIPPED, Outcome.PASSED)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One run of a module, or of some of its tests, on one arm.

    tests: outcome by id, with what pytest said of those that failed. trouble: why the run as a
    whole is not to be trusted, like a module that cannot be imported; empty where it is.
    num_servers: how many were started in the place of `vllm serve`.
    """

    tests: Mapping[str, Outcome]
    messages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    trouble: str = ""
    seconds: float = 0.0
    num_servers: int = 0


def parse(junit: str) -> Run:
    """Read a JUnit file of pytest, in which each test has its id as a property."""
    tests: dict[str, Outcome] = {}
    messages: dict[str, str] = {}
    trouble = ""
    for case in ET.fromstring(junit).iter("testcase"):
        properties = {p.get("name"): p.get("value", "") for p in case.iter("property")}
        bad = [*case.findall("failure"), *case.findall("error")]
        name = properties.get("nodeid")
        if name is None:
            # No test, but a file that could not be collected.
            trouble = trouble or next((_said(one) for one in bad), "")
            continue
        if bad:
            messages[name] = _said(bad[0])
            tests[name] = Outcome.FAILED
        elif tests.get(name) is not Outcome.FAILED:  # its fixture may fail when it has passed
            is_skipped = case.find("skipped") is not None
            tests[name] = Outcome.SKIPPED if is_skipped else Outcome.PASSED
    return Run(tests, messages, trouble)


def _said(element: ET.Element) -> str:
    """Return what went wrong in a line; a file's error has it at the end of its text."""
    message = element.get("message", "")
    if message == "collection failure":
        message = (element.text or message).strip().splitlines()[-1]
    return " ".join(message.split())[:300]


def verdict(name: str, runs: Sequence[Run]) -> Outcome:
    """Return what counts for a test on an arm: what two runs agree on, or the worst of them."""
    seen = Counter(run.tests[name] for run in runs if name in run.tests)
    if not seen:
        return Outcome.NOT_RUN
    most, count = seen.most_common(1)[0]
    if count > 1:
        return most
    return next(outcome for outcome in _WORST_FIRST if outcome in seen)


def is_flaky(name: str, runs: Sequence[Run]) -> bool:
    return len({run.tests[name] for run in runs if name in run.tests}) > 1


def names(arms: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return every test that any run knows, in the order in which they were met."""
    return list(dict.fromkeys(name for runs in arms.values() for run in runs for name in run.tests))


def to_rerun(arms: Mapping[str, Sequence[Run]]) -> dict[str, list[str]]:
    """Return which tests each arm has to run again.

    A test that failed on one arm, or was not reached there, runs again on both until two runs of
    an arm agree: at most ``MAX_RUNS`` in all.
    """
    troubled = [
        name
        for name in names(arms)
        if any(
            run.tests.get(name, Outcome.NOT_RUN) in (Outcome.FAILED, Outcome.NOT_RUN)
            for runs in arms.values()
            for run in runs[:1]
        )
    ]
    return {
        arm: [name for name in troubled if not _agreed(name, runs)]
        for arm, runs in arms.items()
        if len(runs) < MAX_RUNS
    }


def _agreed(name: str, runs: Sequence[Run]) -> bool:
    seen = Counter(run.tests[name] for run in runs if name in run.tests)
    return bool(seen) and max(seen.values()) > 1

"""What a run of the plan says: rows for JSON, tables for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.output import markdown
from tests.conformance.arms import ARMS, THEIRS
from tests.conformance.inside.launch import OURS
from tests.conformance.outcomes import Outcome, Run, is_flaky, names, verdict

Runs = Mapping[str, Sequence[Run]]
"""Of one module, by arm."""


def only_ours(arms: Runs) -> list[str]:
    """Return the tests that pass on `vllm serve`, and fail or are not reached on `vllm-pd up`."""
    bad = (Outcome.FAILED, Outcome.NOT_RUN)
    return [
        name
        for name in names(arms)
        if verdict(name, arms[THEIRS]) is Outcome.PASSED and verdict(name, arms[OURS]) in bad
    ]


def rows(modules: Mapping[str, Runs]) -> list[dict[str, Any]]:
    """Return two rows for each module that has run, one of each arm."""
    made = []
    for module, arms in modules.items():
        tests = names(arms)
        for arm in ARMS:
            counts = Counter(verdict(name, arms[arm]) for name in tests)
            made.append(
                {
                    "module": module,
                    "arm": arm,
                    **{outcome.replace(" ", "_"): counts[outcome] for outcome in Outcome},
                    "only_ours": only_ours(arms) if arm == OURS else [],
                    "flaky": [name for name in tests if is_flaky(name, arms[arm])],
                    "trouble": _trouble(arms[arm]),
                    "servers": sum(run.num_servers for run in arms[arm]),
                    "seconds": round(sum(run.seconds for run in arms[arm]), 1),
                }
            )
    return made


def _trouble(runs: Sequence[Run]) -> str:
    return next((run.trouble for run in runs if run.trouble), "")


def tables(modules: Mapping[str, Runs], num_planned: int) -> str:
    """Return the page's part: counts of each module, then each test that fails on ours only.

    num_planned: how many modules there are to run; until all have, the page says so.
    """
    made = rows(modules)
    pairs = list(zip(made[::2], made[1::2], strict=True))
    with_servers = [pair for pair in pairs if pair[0]["servers"] or pair[1]["servers"]]
    within = [pair for pair in pairs if pair not in with_servers]
    parts = ["Passed / failed / skipped / not run, of modules that start servers:"]
    parts.append(_table(with_servers, ARMS))
    if within:
        parts += [
            "The same of modules that start none, and look at vLLM's own code: without this "
            "plug-in in the process, and with it. Of a test that fails without, it says nothing.",
            _table(within, ("without", "with")),
        ]
    is_part = len(modules) < num_planned
    if is_part:
        parts.insert(0, f"{len(modules)} of {num_planned} modules have been run.")
    differences = [
        [f"`{name.removeprefix('tests/')}`", _reason(name, arms[OURS])]
        for arms in modules.values()
        for name in only_ours(arms)
    ]
    if differences:
        parts += [
            f"Passes on `{THEIRS}`, fails on `{OURS}`:",
            markdown(["test", "what it says"], differences),
        ]
    else:
        none = "Of these, no test" if is_part else "No test"
        parts.append(f"{none} passes on `{THEIRS}` and fails on `{OURS}`.")
    troubles = [
        [f"`{row['module'].removeprefix('tests/')}`", row["arm"], _cell(row["trouble"])]
        for row in made
        if row["trouble"]
    ]
    if troubles:
        parts += ["Runs that did not end by themselves:", markdown(["module", "", ""], troubles)]
    return "\n\n".join(parts)


def _table(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], arms: Sequence[str]) -> str:
    head = ["module", *arms, "only ours fails", "servers", "minutes"]
    lines = [
        [
            f"`{theirs['module'].removeprefix('tests/')}`",
            _counts(theirs),
            _counts(ours),
            str(len(ours["only_ours"])),
            f"{theirs['servers']} + {ours['servers']}",
            f"{(theirs['seconds'] + ours['seconds']) / 60:.1f}",
        ]
        for theirs, ours in pairs
    ]
    both = [_sum([pair[arm] for pair in pairs]) for arm in (0, 1)]
    total = sum(len(ours["only_ours"]) for _, ours in pairs)
    lines.append(["all", *map(_counts, both), str(total), "", ""])
    return markdown(head, lines)


def _counts(row: Mapping[str, Any]) -> str:
    return " / ".join(str(row[outcome.replace(" ", "_")]) for outcome in Outcome)


def _sum(made: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    keys = [outcome.replace(" ", "_") for outcome in Outcome]
    return {key: sum(row[key] for row in made) for key in keys}


def _reason(name: str, runs: Sequence[Run]) -> str:
    told = next((run.messages[name] for run in runs if name in run.messages), "not reached")
    return _cell(told)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:200]

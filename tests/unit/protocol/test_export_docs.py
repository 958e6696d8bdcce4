"""The protocol page has the transitions of an export as the code has them."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_pd_plugin.protocol.export_states import TRANSITIONS, ExportEvent, ExportState

PAGE = (Path(__file__).parents[3] / "docs/protocol.md").read_text()
BEGIN, END = "<!-- transitions -->\n\n", "\n<!-- /transitions -->"
NOT_DRAWN = (ExportState.UNKNOWN, ExportState.AWAITED)
"""In the picture an export begins when it has a holder, and ends when it is over."""


def section() -> str:
    return PAGE.split("### Of an export\n")[1].split("\n### ")[0]


def table() -> str:
    lines = ["| state | event | becomes | what is done |", "| --- | --- | --- | --- |"]
    for (state, event), (after, actions) in TRANSITIONS.items():
        done = ", ".join(action.value for action in actions)
        lines.append(f"| {state.name} | {event.value} | {after.name} | {done} |")
    return "".join(f"{line}\n" for line in lines)


def test_the_page_s_table_of_transitions_is_the_code_s() -> None:
    shown = section().split(BEGIN)[1].split(END)[0]
    assert shown == table(), f"put this between the marks:\n{table()}"


def test_the_page_s_picture_has_every_transition_of_what_is_held() -> None:
    drawn: set[tuple[str, str, str]] = set()
    for source, target, label in re.findall(r"^ {4}(\S+) --> (\S+): (.+)$", section(), re.M):
        drawn |= {(source, event, target) for event in label.split(", ")}
    expected = {
        (state.name, event.value, after.name)
        for (state, event), (after, _) in TRANSITIONS.items()
        if state not in NOT_DRAWN and not state.is_over
    }
    assert drawn == expected | {("[*]", ExportEvent.ENQUEUED.value, ExportState.QUEUED.name)}


def test_the_page_says_of_every_event_who_brings_it_about() -> None:
    rows = section().split("| event | by |")[1].split("\n\n")[0]
    assert re.findall(r"^\| ([a-z ]+) \|", rows, re.M) == [event.value for event in ExportEvent]

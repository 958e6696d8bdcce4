"""`benchmarks.chaos --frontend`: engines of a fleet are killed, and nobody is to notice."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.chaos.fleet_account import is_clean, table
from benchmarks.chaos.fleet_plan import LOCAL_BELOW, Request, plan_kills, plan_requests
from benchmarks.chaos.fleet_run import FLEET_FLAGS, FleetPlan, run_arm
from benchmarks.chaos.reference import reference_answers
from benchmarks.common import output
from tests.engine import Completion, Engine, EngineError, say

ARMS = ("frontend", "nixl")

NOTES = (
    "Every answer is compared with that of one engine alone: each token and the log-probabilities "
    "beside it, in float32; of a client that left, what had come until then.",
    f"Arm `frontend`: pdplugin behind `vllm-pd serve --local-below {LOCAL_BELOW}`: shorter prompts "
    "are computed where they are decoded. Arm `nixl`: NixlConnector behind vllm-router with as "
    "many engines, both as shipped, reported for comparison: nothing there promises that a request "
    "survives its engine.",
    "There is a kill (SIGKILL) in each period, at any moment of it, and the engine is started "
    "again at once, at the same address. {spared} A kill that finds no engine to kill waits, and "
    "the later ones with it.",
    "All engines share two cores, also with those that are starting.",
)
SPARED = "The last engine of a role that is up is spared."
NOT_SPARED = "The last engine of a role is not spared; requests wait for the next one."


def run(args: argparse.Namespace, stack: ExitStack) -> int:
    """Ask the reference, run each arm, print and write; return the exit status.

    stack: gets what ends it all.
    """
    facts = output.machine()
    names = ("seed", "minutes", "rate", "hang_after", "policy", "topology", "kill_every")
    facts.append(", ".join(f"{name} {getattr(args, name)}" for name in names) + ".")
    facts += [note.format(spared=NOT_SPARED if args.kill_last else SPARED) for note in NOTES]
    facts.append(f"Engines: {' '.join(FLEET_FLAGS)}.")
    duration_s = 60.0 * args.minutes
    plan = FleetPlan(
        args.topology,
        plan_requests(args.seed, duration_s, args.rate),
        plan_kills(args.seed, duration_s, args.kill_every),
        duration_s,
        args.hang_after,
        args.policy,
        spares_last=not args.kill_last,
    )
    folder = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    folder.mkdir(parents=True, exist_ok=True)
    opened = stack.enter_context(ExitStack())
    questions = {request.index: question(request) for request in plan.requests}
    references = reference_answers(questions, FLEET_FLAGS, folder, opened)
    opened.close()
    rows: list[dict[str, Any]] = []
    for arm in args.arms:
        try:
            rows.append(asyncio.run(run_arm(arm, plan, references, folder, opened)))
        except EngineError as error:
            if arm == "frontend":
                raise
            say(f"{arm}: given up, no row: {error}")
            facts.append(f"`{arm}` could not go on: {str(error).splitlines()[0]}")
        opened.close()
        tables = [("Chaos behind a frontend", table(rows))]
        if args.json:
            output.write(args.json, rows, tables, facts)
        print(output.as_text(tables, facts), flush=True)
    return 0 if all(is_clean(row) for row in rows if row["arm"] == "frontend") else 1


def question(request: Request) -> Callable[[Engine], Completion]:
    def ask(engine: Engine) -> Completion:
        prompt = request.arrival.prompt()
        return engine.complete(prompt, request.max_tokens, **request.options())

    return ask

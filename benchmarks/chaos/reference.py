"""What one plain engine answers to every request of a chaos run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.chaos.run import report
from tests import models
from tests.engine import Completion, Engine, running, say, start

AT_ONCE = 4

Question = Callable[[Engine], Completion]


def reference_answers(
    questions: Mapping[int, Question],
    flags: Sequence[str],
    folder: Path,
    stack: ExitStack,
    model: Path | None = None,
) -> dict[int, Completion]:
    """Start an engine without a connector and return its answers, by the requests' indices.

    stack: gets what ends the engine.
    model: `tiny_llama()` where none is given.
    """
    say(f"reference: starting one plain engine, for {len(questions)} prompts")
    engine = start("reference", model or models.tiny_llama(), flags, cores="0", folder=folder)
    stack.enter_context(running([engine]))
    return asyncio.run(_ask_all(engine, questions))


async def _ask_all(engine: Engine, questions: Mapping[int, Question]) -> dict[int, Completion]:
    answers: dict[int, Completion] = {}
    gate = asyncio.Semaphore(AT_ONCE)

    async def ask(index: int, question: Question) -> None:
        async with gate:
            answers[index] = await asyncio.to_thread(question, engine)

    progress = asyncio.create_task(
        report(lambda: f"reference: {len(answers)} of {len(questions)} prompts answered")
    )
    try:
        await asyncio.gather(*(ask(*asked) for asked in questions.items()))
    finally:
        progress.cancel()
    return answers

"""`benchmarks.chaos --race`: a consumer stops while it reads, and the blocks are given to others.

Leases are 50 ms, pools have 24 blocks, and a consumer is stopped and continued all the time: what
it reads then is often no longer what it asked for. Only the producer's answers tell: to its
heartbeat, or, where it was stopped after that, to its commit.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import re
import signal
import tempfile
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil

from benchmarks.chaos import race_probe
from benchmarks.chaos.reference import reference_answers
from benchmarks.chaos.requests import error_message
from benchmarks.chaos.run import judge_answer, report
from benchmarks.common import output
from tests import models
from tests.engine import (
    PRODUCE,
    Completion,
    Engine,
    connector_arguments,
    free_port,
    parse_completion,
    running,
    say,
    start,
)

ARMS = ("pdplugin", "check-taken-out")
"""The second one grants every commit: the same run must show corruption there."""

LEASE_S = 0.05
NUM_BLOCKS, BLOCK_TOKENS = 24, 128
FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching"),
    *("--max-model-len", "2048", "--max-num-batched-tokens", "2048"),
    *("--num-gpu-blocks-override", str(NUM_BLOCKS)),
)
NUM_PROMPTS = 64
PROMPT_TOKENS, ANSWER_TOKENS = (100, 400), 8
CLIENTS, CHURNED_TOKENS = 10, (1, 1, 500, 500)
"""Handoffs under way at any time, and how long the answers are that only the producer gives: short
ones use freed blocks at once, long ones leave few for all others, and preempt."""

STOP_S, GAP_S = (0.12, 0.4), (1.0, 2.5)
SERIAL_SHARE = 0.25
HANG_S = 60.0
REPO = Path(__file__).resolve().parents[2]

MIN_COMMITTED, MIN_REUSED, MIN_BY_COMMIT = 1000, 100, 5
"""Of the handoffs whose blocks had been reused, so many are refused by the answer to the commit,
and not by a heartbeat before."""

NOTES = (
    f"Leases {1000 * LEASE_S:.0f} ms, {NUM_BLOCKS} blocks of {BLOCK_TOKENS} tokens in each engine, "
    f"prefix caching off; {CLIENTS} handoffs under way at any time, a quarter of them with the "
    f"producer asked first, and {len(CHURNED_TOKENS)} requests that only the producer answers.",
    f"The consumer is stopped (SIGSTOP) for {STOP_S[0]:g} to {STOP_S[1]:g} s every "
    f"{GAP_S[0]:g} to {GAP_S[1]:g} s, at any moment; and for {race_probe.STOP_S[0]:g} to "
    f"{race_probe.STOP_S[1]:g} s at {race_probe.STOPPED_SHARE:.0%} of the seals that it is told, "
    "just before it hears of them.",
    "`reused`: handoffs that the producer declared over, by its answer to a commit or to a "
    "heartbeat, at a moment when blocks of theirs had been given to other requests. It is counted "
    "in the producer.",
    "`check-taken-out`: the producer grants every commit (`granted`), and names no sealed handoff "
    "as lost, whatever became of the blocks; all else is the same. It shows what the check is for, "
    "and that what it prevents is found here.",
)


@dataclasses.dataclass(slots=True)
class Tally:
    """What became of the handoffs of an arm."""

    sent: int = 0
    committed: int = 0
    wrong: int = 0
    hung: int = 0
    stops: int = 0
    refused_by: Counter[str] = dataclasses.field(default_factory=Counter)
    first_wrong: str = ""


def run(args: argparse.Namespace, stack: ExitStack) -> int:
    """Ask the reference, run each arm, print and write; return the exit status.

    stack: gets what ends it all.
    """
    facts = [*output.machine(), f"seed {args.seed}, minutes {args.minutes}.", *NOTES]
    facts.append(f"Engines: {' '.join(FLAGS)}.")
    folder = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    folder.mkdir(parents=True, exist_ok=True)
    opened = stack.enter_context(ExitStack())
    prompts = make_prompts(args.seed)
    model = models.race_llama()
    questions = {
        index: lambda engine, prompt=prompt: engine.complete(prompt, ANSWER_TOKENS)
        for index, prompt in enumerate(prompts)
    }
    answers = reference_answers(questions, FLAGS, folder, opened, model)
    opened.close()
    rows = []
    for arm in args.arms:
        race = Race(arm, args.seed, prompts, answers, folder, opened)
        rows.append(asyncio.run(race.carry_out(60.0 * args.minutes)))
        opened.close()
        if args.json:
            output.write(args.json, rows, [("A race for blocks", table(rows))], facts)
    print(output.as_text([("A race for blocks", table(rows))], facts), flush=True)
    return 0 if all(is_as_expected(row) for row in rows) else 1


def is_as_expected(row: Mapping[str, Any]) -> bool:
    """Say whether a row is what its arm is to show."""
    if row["arm"] == "check-taken-out":
        return bool(row["wrong"] > 0 and row["granted"] > 0)
    by_commit = sum(
        count for answer, count in row["reused_by_answer"].items() if answer.startswith("commit")
    )
    is_hard = (
        row["committed"] >= MIN_COMMITTED
        and row["reused"] >= MIN_REUSED
        and by_commit >= MIN_BY_COMMIT
        and row["preemptions"][0] > 0
    )
    return is_hard and not row["wrong"] and not row["hung"] and not row["leaked_blocks"]


def make_prompts(seed: int) -> list[list[int]]:
    random = Random(seed)
    return [
        [random.randrange(100, 49_000) for _ in range(random.randint(*PROMPT_TOKENS))]
        for _ in range(NUM_PROMPTS)
    ]


class Race:
    """One arm: two engines, the load, and the stops."""

    def __init__(
        self,
        arm: str,
        seed: int,
        prompts: Sequence[Sequence[int]],
        answers: Mapping[int, Completion],
        folder: Path,
        stack: ExitStack,
    ) -> None:
        self._arm = arm
        self._prompts = prompts
        self._answers = answers
        self._random = Random(f"{seed} load")
        self._stops = Random(f"{seed} stops")
        self._tally = Tally()
        self._counts = folder / f"{arm}-counts.json"
        self._counts.unlink(missing_ok=True)  # of an earlier run
        self._producer, self._consumer = self._start(folder, stack)

    def _start(self, folder: Path, stack: ExitStack) -> list[Engine]:
        say(f"{self._arm}: starting both engines")
        inside = folder / f"{self._arm}-site"
        inside.mkdir(exist_ok=True)
        code = "from benchmarks.chaos import race_probe\nrace_probe.install()\n"
        (inside / "sitecustomize.py").write_text(code)
        environ = {
            "PYTHONPATH": f"{inside}:{REPO}",
            race_probe.COUNTS: str(self._counts),
            race_probe.CONSUMER: str(folder / f"{self._arm}-consumer.json"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if self._arm == "check-taken-out":
            environ[race_probe.TAKE_OUT] = "1"
        options = {"lease_s": LEASE_S, "peer_timeout_s": 5, "fetch_timeout_s": 10}
        port = free_port()
        produce = connector_arguments("prefill", port=port, **options)
        consume = connector_arguments("decode", **options)
        model = models.race_llama()
        engines = [
            start(
                f"{self._arm}-producer", model, (*FLAGS, *produce), cores="0", folder=folder,
                control_port=port, environ=environ,
            ),
            start(f"{self._arm}-consumer", model, (*FLAGS, *consume), cores="1", folder=folder),
        ]  # fmt: skip
        stack.enter_context(running(engines))
        family = psutil.Process(engines[1].process.pid)
        pids = [family.pid, *(child.pid for child in family.children(recursive=True))]
        Path(environ[race_probe.CONSUMER]).write_text(json.dumps(pids))
        return engines

    async def carry_out(self, duration_s: float) -> dict[str, Any]:
        """Run for that long and return the arm's row."""
        tally = self._tally
        async with httpx.AsyncClient(timeout=HANG_S, trust_env=False) as client:
            over = asyncio.get_running_loop().time() + duration_s
            load = [self._hand_off_until(over, client) for _ in range(CLIENTS)]
            load += [self._churn_until(over, client, tokens) for tokens in CHURNED_TOKENS]
            stops = asyncio.create_task(self._stop_and_continue())
            progress = asyncio.create_task(
                report(
                    lambda: (
                        f"{self._arm}: {tally.sent} sent, {tally.committed} committed, "
                        f"{tally.wrong} wrong, {sum(tally.refused_by.values())} refused"
                    )
                )
            )
            try:
                await asyncio.gather(*load)
            finally:
                for task in (stops, progress):
                    task.cancel()
                await asyncio.gather(stops, progress, return_exceptions=True)
                self._consumer.signal_all(signal.SIGCONT)
        return await asyncio.to_thread(self._row)

    async def _hand_off_until(self, over: float, client: httpx.AsyncClient) -> None:
        while asyncio.get_running_loop().time() < over:
            index = self._random.randrange(len(self._prompts))
            is_serial = self._random.random() < SERIAL_SHARE
            self._tally.sent += 1
            try:
                answer = await self._hand_off(client, self._prompts[index], is_serial)
            except httpx.TimeoutException:
                self._tally.hung += 1
                continue
            if isinstance(answer, str):
                self._tally.refused_by[answer] += 1
                continue
            self._tally.committed += 1
            difference, _ = judge_answer(self._answers[index], answer)
            if difference:
                self._tally.wrong += 1
                self._tally.first_wrong = self._tally.first_wrong or difference

    async def _hand_off(
        self, client: httpx.AsyncClient, prompt: Sequence[int], is_serial: bool
    ) -> Completion | str:
        """Return the consumer's answer, or who refused."""
        if is_serial:
            first = await _ask(client, self._producer, prompt, 1, PRODUCE)
            if isinstance(first, str):
                return f"producer: {first}"
            assert first.kv_transfer_params is not None
            return await self._consume(client, prompt, first.kv_transfer_params)
        name = uuid.uuid4().hex
        consume = {
            "do_remote_prefill": True,
            "remote_host": "127.0.0.1",
            "remote_port": self._producer.control_port,
            "remote_handoff_id": name,
        }
        _, answer = await asyncio.gather(
            _ask(client, self._producer, prompt, 1, {**PRODUCE, "handoff_id": name}),
            self._consume(client, prompt, consume),
        )
        return answer

    async def _consume(
        self, client: httpx.AsyncClient, prompt: Sequence[int], params: Mapping[str, Any]
    ) -> Completion | str:
        return await _ask(client, self._consumer, prompt, ANSWER_TOKENS, params)

    async def _churn_until(self, over: float, client: httpx.AsyncClient, num_tokens: int) -> None:
        """Use the producer's blocks for something else."""
        while asyncio.get_running_loop().time() < over:
            prompt = self._random.choice(self._prompts)
            await _ask(client, self._producer, prompt, num_tokens, None, ignore_eos=True)

    async def _stop_and_continue(self) -> None:
        while True:
            await asyncio.sleep(self._stops.uniform(*GAP_S))
            self._consumer.signal_all(signal.SIGSTOP)
            self._tally.stops += 1
            await asyncio.sleep(self._stops.uniform(*STOP_S))
            self._consumer.signal_all(signal.SIGCONT)

    def _row(self) -> dict[str, Any]:
        engines = (self._producer, self._consumer)
        leaked = 0
        for engine in engines:
            try:
                engine.wait_until_at_rest(60)
            except AssertionError as error:
                say(str(error))
                usage = engine.metrics()["vllm:kv_cache_usage_perc"]
                leaked += round(usage * NUM_BLOCKS)
        told: dict[str, Any] = {"reused": {}, "granted": 0, "stops": 0}
        if self._counts.exists():
            told = json.loads(self._counts.read_text())
        tally = self._tally
        failures = failure_counts(self._consumer)
        name = "vllm:num_preemptions_total"
        preemptions = [round(each.metrics()[name]) for each in engines]
        return {
            "arm": self._arm,
            "sent": tally.sent,
            "committed": tally.committed,
            "wrong": tally.wrong,
            "refused_by": dict(tally.refused_by),
            "reasons": failures,
            "reused": sum(told["reused"].values()),
            "reused_by_answer": told["reused"],
            "granted": told["granted"],
            "hung": tally.hung,
            "leaked_blocks": leaked,
            "stops": tally.stops + told["stops"],
            "preemptions": preemptions,
            "first_wrong": tally.first_wrong,
        }


def failure_counts(engine: Engine) -> dict[str, int]:
    """Return the failed handoffs of an engine, by reason."""
    pattern = re.compile(r'pd_handoff_failures_total\{reason="(\w+)"\}')
    found = ((pattern.fullmatch(name), value) for name, value in engine.metrics().items())
    return {match[1]: round(value) for match, value in found if match and value}


async def _ask(
    client: httpx.AsyncClient,
    engine: Engine,
    prompt: Sequence[int],
    max_tokens: int,
    params: Mapping[str, Any] | None,
    **sampling: Any,
) -> Completion | str:
    """Return the answer, or what stands instead of one.

    Raises httpx.TimeoutException."""
    answer = await client.post(
        f"{engine.url}/v1/completions", json=engine.body(prompt, max_tokens, params, **sampling)
    )
    if answer.status_code != 200:
        return f"HTTP {answer.status_code}: {error_message(answer.text)}"
    return parse_completion(answer.json())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = (
        "arm", "sent", "committed", "wrong", "refused_by", "reasons", "reused", "granted", "hung",
        "leaked_blocks", "stops", "preemptions",
    )  # fmt: skip
    return output.markdown(names, [[_cell(row[name]) for name in names] for row in rows])


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "0"
    if isinstance(value, list):
        return " + ".join(map(str, value))
    return str(value)

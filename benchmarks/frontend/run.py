"""The measurements of `benchmarks.frontend`: over canned engines, and over real ones."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from transformers import AutoTokenizer

from benchmarks.common.arms import stop_all
from benchmarks.common.client import Prompts, RequestFailed
from benchmarks.common.processes import family, own_cpu_seconds, part_of
from benchmarks.common.statistics import MIB, Row, growth, rotated
from benchmarks.frontend import routing
from benchmarks.frontend.load import (
    CHUNK_MARK,
    Closed,
    again,
    bodies,
    closed_loop,
    open_streams,
    run,
)
from benchmarks.frontend.rows import CANNED, Run, load_row, scale_row, soak_row, streams_row
from benchmarks.goodput.arms import Arm
from tests.engine import Engine, EngineError, free_port, say, spawn, start_frontend

WORD = " castle"
"""What the canned engines write, again and again: one token."""

ANSWER_TOKENS = 64
WARM_UP_REQUESTS, WARM_UP_CONCURRENCY = 32, 8
NUM_BODIES = 512
SETTLE_S, ALL_LISTEN_S = 2.0, 120.0
PROMPT_END_TOKENS = 8
_UP_SERIES = "pd_frontend_engines{"
STREAMS_OPENING_S = 60.0
PREFILLS_OF, ENGINES_A_PORT = 5, 20
SCALE_STEP_MS, SCALE_S, SCALE_OPENING_S, ALL_ATTACHED_S = 2000.0, 60.0, 400.0, 120.0
SOAK_CONCURRENCY, SOAK_WARM_UP, SOAK_SAMPLES = 32, 2000, 10


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """A frontend over canned engines. token: what they write. mark: is in its text once."""

    frontend: Engine
    engines: Sequence[Engine]
    workers: int
    token: int
    mark: bytes

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds of each part so far."""
        return {
            "frontend": _cpu_of(self.frontend),
            "canned engines": sum(map(_cpu_of, self.engines)),
            "client": own_cpu_seconds(psutil.Process()),
        }

    def resident_mib(self) -> float:
        """Return the resident memory of the frontend's processes."""
        return sum(map(_resident_bytes, family(self.frontend.process.pid))) / MIB


def start_site(
    model: Path,
    workers: int,
    step_ms: float,
    folder: Path,
    stack: ExitStack,
    num_engines: int = 2,
) -> Site:
    """Start canned engines and a frontend, and wait until it answers.

    step_ms: of decode engines. stack: gets what stops it all. num_engines: at least two; one of
        five prefills, one at least. All of a role are one process.

    Raises:
        EngineError: a process did not start.
    """
    servers: list[Engine] = []
    stack.callback(stop_all, servers)
    token, arguments = start_canned(model, step_ms, folder, servers, num_engines)
    prefill, decode = servers
    if workers > 1:
        arguments += ["--workers", str(workers)]
    frontend = start_frontend("serve", model, arguments, folder=folder)
    servers.append(frontend)
    for server in servers:
        server.wait_until_ready()
    _wait_until_all_listen(frontend, workers)
    return Site(frontend, (prefill, decode), workers, token, WORD.encode())


def start_canned(
    model: Path, step_ms: float, folder: Path, servers: list[Engine], num_engines: int = 2
) -> tuple[int, list[str]]:
    """Start canned engines; return the token that they write, and the arguments of a frontend over
    them. servers: gets their two processes; else see ``start_site``."""
    (token,) = AutoTokenizer.from_pretrained(model)(WORD, add_special_tokens=False).input_ids
    arguments = ["--local-below", "0", "--disable-uvicorn-access-log"]
    num_prefill = max(1, num_engines // PREFILLS_OF)
    for role, step, number in (
        ("prefill", 0.0, num_prefill), ("decode", step_ms, num_engines - num_prefill),
    ):  # fmt: skip
        ports = [str(free_port()) for _ in range(0, number, ENGINES_A_PORT)]
        command = [
            sys.executable, "-m", "benchmarks.frontend.fake", "--role", role,
            "--ports", *ports, "--engines", str(number), "--token", str(token),
            "--model", model.name, "--step-ms", str(step),
        ]  # fmt: skip
        log = folder / f"canned-{role}-{ports[0]}.log"
        process = spawn(command, {}, log)
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        servers.append(Engine(f"canned {role}", urls[0], model.name, process, log))
        arguments += [f"--{role}", *urls]
    return token, arguments


def _wait_until_all_listen(frontend: Engine, workers: int) -> None:
    """Wait until so many of a frontend's processes listen: it is healthy as soon as one does.

    Raises:
        EngineError: they did not in time.
    """
    port = urlsplit(frontend.url).port
    deadline = time.monotonic() + ALL_LISTEN_S
    while sum(_listens(process, port) for process in family(frontend.process.pid)) < workers:
        if time.monotonic() > deadline:
            raise EngineError(f"not all processes of the frontend listen:\n{frontend.log_tail()}")
        time.sleep(0.25)


def _listens(process: psutil.Process, port: int | None) -> bool:
    try:
        opened = process.net_connections("tcp")
    except psutil.NoSuchProcess:
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in opened)


@dataclasses.dataclass(frozen=True, slots=True)
class Canned:
    """Measures one site."""

    site: Site
    prompts: Prompts
    prompt_tokens: int

    def closed(self, concurrencies: Sequence[int], seconds: float, repeat: int) -> list[Row]:
        """Return a row for each concurrency."""
        requests = self._bodies(NUM_BODIES, ANSWER_TOKENS)
        self._loop(requests[:WARM_UP_REQUESTS], WARM_UP_CONCURRENCY)
        runs: dict[int, list[Run | None]] = {concurrency: [] for concurrency in concurrencies}
        for repetition, concurrency in itertools.product(range(repeat), concurrencies):
            self._loop(requests[:concurrency], concurrency)
            before = self.site.cpu_seconds()
            taken = self._loop(again(requests), concurrency, seconds)
            used = less(self.site.cpu_seconds(), before)
            runs[concurrency].append(_run(taken, taken.marks, used, self.site.resident_mib()))
            say(
                f"{repetition + 1} of {repeat}, canned, {concurrency} at once: "
                f"{len(taken.whole_ms) / taken.elapsed_s:.1f} requests/s"
            )
        return [load_row(CANNED, self.site.workers, c, taken) for c, taken in runs.items()]

    def streams(self, number: int, step_ms: float, seconds: float) -> Row:
        """Return the row of so many streams that are open at once."""
        requests = self._bodies(number, stream_tokens(step_ms, seconds))
        resident = {"before": self.site.resident_mib()}
        cpu: dict[str, float] = {}

        def at_start() -> None:
            resident["start"] = self.site.resident_mib()
            cpu.update(self.site.cpu_seconds())

        def at_end() -> None:
            cpu.update(less(self.site.cpu_seconds(), dict(cpu)))
            resident["end"] = self.site.resident_mib()

        window = run(
            open_streams(
                self.site.frontend.url, self.site.mark, requests, seconds, STREAMS_OPENING_S,
                at_start, at_end,
            )
        )  # fmt: skip
        time.sleep(SETTLE_S)
        resident["after"] = self.site.resident_mib()
        return streams_row(
            self.site.workers, step_ms, window.seconds, window.opening_s, window.marks,
            window.longest_gap_ms, resident, cpu,
        )  # fmt: skip

    def scale(self, num_engines: int, number: int) -> Row:
        """Return the row of so many streams over so many engines."""
        attached_s = self._wait_until_attached(num_engines)
        steps = math.ceil(1e3 * (SCALE_OPENING_S + SCALE_S) / SCALE_STEP_MS)
        requests = self._bodies(number, steps)
        before_mib = self.site.resident_mib()
        after: dict[str, float] = {}
        cpu: dict[str, float] = {}

        def at_end() -> None:
            cpu.update(less(self.site.cpu_seconds(), dict(cpu)))
            after["mib"] = self.site.resident_mib()

        window = run(
            open_streams(
                self.site.frontend.url, self.site.mark, requests, SCALE_S, SCALE_OPENING_S,
                lambda: cpu.update(self.site.cpu_seconds()), at_end,
            )
        )  # fmt: skip
        chosen = routing.measure(num_engines, number)
        return scale_row(
            num_engines, SCALE_STEP_MS, window, attached_s, (before_mib, after["mib"]), cpu, chosen
        )

    def _wait_until_attached(self, num_engines: int) -> float:
        """Wait until all engines are up; return how long that took, in seconds.

        Raises:
            EngineError: they were not in time.
        """
        start = time.monotonic()
        while (number := engines_up(self.site.frontend.url)) < num_engines:
            if time.monotonic() - start > ALL_ATTACHED_S:
                raise EngineError(f"{number} of {num_engines} engines are attached")
            time.sleep(0.25)
        return time.monotonic() - start

    def soak(self, number: int) -> Row:
        """Return the row of so many requests one after another, some at a time."""
        requests = self._bodies(NUM_BODIES, ANSWER_TOKENS)
        self._loop(itertools.islice(again(requests), SOAK_WARM_UP), SOAK_CONCURRENCY)
        counts = [number * sample // SOAK_SAMPLES for sample in range(SOAK_SAMPLES + 1)]
        samples = [(0, self.site.resident_mib())]
        for before, after in itertools.pairwise(counts):
            self._loop(itertools.islice(again(requests), after - before), SOAK_CONCURRENCY)
            samples.append((after, self.site.resident_mib()))
            say(f"{after} of {number} requests: {samples[-1][1]:.1f} MiB")
        grown = growth(counts, [mib for _, mib in samples])
        return soak_row(self.site.workers, SOAK_CONCURRENCY, samples, grown)

    def _bodies(self, number: int, answer_tokens: int) -> list[bytes]:
        frontend = self.site.frontend
        # A random prompt may end within a character, and the first word would be no word.
        end = [self.site.token] * PROMPT_END_TOKENS
        length = self.prompt_tokens
        prompts = ((self.prompts.next(length) + end)[-length:] for _ in range(number))
        return bodies(frontend.url, frontend.model, prompts, answer_tokens)

    def _loop(
        self, requests: Iterable[bytes], concurrency: int, seconds: float | None = None
    ) -> Closed:
        """Raises RequestFailed when a request fails, or a token is missing."""
        taken = run(
            closed_loop(self.site.frontend.url, self.site.mark, requests, concurrency, seconds)
        )
        if taken.marks != ANSWER_TOKENS * len(taken.whole_ms):
            text = f"{taken.marks} tokens in {len(taken.whole_ms)} answers of {ANSWER_TOKENS}"
            raise RequestFailed(text)
        return taken


def engines_up(url: str) -> int:
    """Return how many engines a frontend can use, as its metrics say."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(_UP_SERIES))


def stream_tokens(step_ms: float, seconds: float) -> int:
    """Return how many tokens a stream must have to be open for so long."""
    return math.ceil(1e3 * (STREAMS_OPENING_S + seconds) / step_ms)


@dataclasses.dataclass(frozen=True, slots=True)
class WholePath:
    """Measures arms with real engines; one is awake at a time."""

    arms: Sequence[Arm]
    prompts: Prompts
    prompt_tokens: int
    concurrency: int

    def rows(self, requests: int, repeat: int) -> list[Row]:
        """Return a row for each arm that has answered at all."""
        runs: dict[str, list[Run | None]] = {arm.name: [] for arm in self.arms}
        for repetition in range(repeat):
            for arm in rotated(self.arms, repetition):
                taken = self._turn(arm, requests)
                runs[arm.name].append(taken)
                shown = f"{taken.cpu_ms(of_cores=False):.2f} ms a request" if taken else "failed"
                say(f"{repetition + 1} of {repeat}, {arm.name}: CPU {shown}")
        return [
            load_row(name, 1, self.concurrency, taken) for name, taken in runs.items() if any(taken)
        ]

    def _turn(self, arm: Arm, requests: int) -> Run | None:
        try:
            arm.wake(self.prompts)
            warm_up = self._bodies(arm, WARM_UP_REQUESTS)
            sent = self._bodies(arm, requests)
            (url,) = arm.urls
            run(closed_loop(url, CHUNK_MARK, warm_up, self.concurrency))
            arm.share_cores()
            before = arm_cpu_seconds(arm)
            taken = run(closed_loop(url, CHUNK_MARK, sent, self.concurrency))
            used = less(arm_cpu_seconds(arm), before)
            return _run(taken, ANSWER_TOKENS * requests, used, None)
        except RequestFailed as error:
            say(f"{arm.name}: {error}\n{arm.tails()}")
            return None
        finally:
            arm.pause()

    def _bodies(self, arm: Arm, number: int) -> list[bytes]:
        prompts = (self.prompts.next(self.prompt_tokens) for _ in range(number))
        return bodies(arm.urls[0], arm.model, prompts, ANSWER_TOKENS)


def arm_cpu_seconds(arm: Arm) -> dict[str, float]:
    """Return the CPU seconds of each process so far, by what it is."""
    used = {"client": own_cpu_seconds(psutil.Process())}
    for role, engine in zip(("prefill", "decode"), arm.engines, strict=True):
        for process in family(engine.process.pid):
            label = f"{role} {part_of(process, engine)}"
            used[label] = used.get(label, 0.0) + own_cpu_seconds(process)
    if arm.front is not None:
        label = "frontend" if isinstance(arm.front, Engine) else "router"
        used[label] = sum(map(own_cpu_seconds, family(arm.front.process.pid)))
    return used


def less(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {label: value - before.get(label, 0.0) for label, value in after.items()}


def _run(taken: Closed, tokens: int, cpu_s: Mapping[str, float], resident_mib: float | None) -> Run:
    return Run(
        len(taken.whole_ms), tokens, taken.elapsed_s, taken.first_ms, taken.whole_ms, cpu_s,
        resident_mib,
    )  # fmt: skip


def _cpu_of(server: Engine) -> float:
    return sum(map(own_cpu_seconds, family(server.process.pid)))


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0

"""One seed: engines, clients and faults on one clock, until everything has ended."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from functools import partial

from tests.simulation.clients import Client
from tests.simulation.plan import (
    CALM_FROM_S,
    LONGEST_S,
    Fault,
    FaultPlan,
    Oddity,
    Plan,
    make_plan,
)
from tests.simulation.stranger import Stranger
from tests.simulation.weather import Elements
from vllm_pd_plugin.ids import Address
from vllm_pd_plugin.protocol import framing, wire
from vllm_pd_plugin.simulation.clock import Clock
from vllm_pd_plugin.simulation.engine import Output, SimulatedEngine, World
from vllm_pd_plugin.simulation.links import Network
from vllm_pd_plugin.simulation.memory import Contents
from vllm_pd_plugin.simulation.transport import Fabric

_NUMBER = re.compile(r"r(\d+)")
_LOOK_S = 0.25
_STARTS_S = 0.2


class Broken(AssertionError):
    """Something that must hold does not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """How a seed went. problem: what did not hold; empty where all did."""

    seed: int
    problem: str
    steps: int
    requests: int
    faults: int
    log: tuple[str, ...]


class SimulatedWorld:
    """log: what happens is written down, which takes its time."""

    def __init__(self, plan: Plan, writes_log: bool = False) -> None:
        self.plan = plan
        self.log: list[str] = []
        self._writes_log = writes_log
        chance = self._chance = random.Random(plan.seed + 1)
        self.clock = Clock()
        self.elements = Elements(plan.weather, chance, self.clock)
        self.network = Network(self.clock, self._fate if writes_log else self.elements.of_message)
        fabric = Fabric(self.elements.of_read, self.elements.of_connection)
        self._world = World(self.clock, self.network, fabric, Contents(), chance)
        self._weights = 1
        self._num_faults = 0
        self._num_steps = 0
        self.engines: list[SimulatedEngine | None] = [None] * len(plan.shapes)
        self.dead: list[SimulatedEngine] = []
        for index in range(len(plan.shapes)):
            self._start(index, self._weights)
        ids = [self._new_id() for _ in plan.requests]
        for request in plan.requests:
            if request.oddity is Oddity.USED_ID:
                ids[request.number] = ids[request.number - 1]
        self.clients = [
            Client(request, self.clock, self.engines.__getitem__, self.address, id_, self.note)
            for request, id_ in zip(plan.requests, ids, strict=True)
        ]

    def run(self) -> Result:
        """Let everything happen, and look whether all held."""
        problem = ""
        try:
            self._run()
        except AssertionError as error:
            problem = f"{type(error).__name__}: {error}"
            self.note(problem)
        return Result(
            self.plan.seed,
            problem,
            self._num_steps + sum(e.num_steps for e in self.engines if e),
            len(self.clients),
            self._num_faults + self.elements.num_faults,
            tuple(self.log),
        )

    def _run(self) -> None:
        for client in self.clients:
            self.clock.after(client.plan.at, client.start)
        for fault in self.plan.faults:
            self.clock.after(fault.at, partial(self._go_wrong, fault))
        self.clock.run(CALM_FROM_S)
        self.elements.calm()
        self.note("nothing goes wrong any more")
        while not self._is_over() and self.clock.now < CALM_FROM_S + LONGEST_S:
            self.clock.run(self.clock.now + _LOOK_S)
        self._check()

    # --- what must hold ----------------------------------------------------------------------

    def _is_over(self) -> bool:
        return (
            all(client.ended for client in self.clients)
            and all(engine is not None and engine.is_at_rest for engine in self.engines)
            and not self._what_is_open()
        )

    def _what_is_open(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for engine in self.engines:
            if engine is None:
                continue
            halves = [("scheduler", engine.connector.side), *enumerate(engine.workers)]
            for name, half in halves:
                for where, kept in half.what_is_open().items():
                    found[f"{engine.name} {name}: {where}"] = kept
        return found

    def _check(self) -> None:
        waiting = [client.name for client in self.clients if not client.ended]
        if waiting:
            raise Broken(f"requests that wait for ever: {waiting}")
        if found := self._what_is_open():
            raise Broken(f"kept for ever: {found}")
        faults = 0
        for engine in self.engines:
            assert engine is not None
            if not engine.is_at_rest:
                raise Broken(f"{engine.name} steps for ever: {list(engine.scheduler.requests)}")
            pool = engine.scheduler.kv_cache_manager.block_pool
            free, all_blocks = pool.get_num_free_blocks(), engine.shape.num_blocks - 1
            if free != all_blocks:
                raise Broken(f"{engine.name} has {free} free blocks of {all_blocks}")
            faults += engine.connector.side.all_faults
            faults += sum(worker.all_faults for worker in engine.workers)
        if faults and not self.elements.num_raised:
            raise Broken(f"{faults} faults were caught, and none was planned")

    # --- engines -----------------------------------------------------------------------------

    def address(self, index: int) -> Address:
        return ("127.0.0.1", 7000 + index)

    def _start(self, index: int, weights: int) -> None:
        shape = self.plan.shapes[index]
        name = f"{shape.role}-{index}"
        self.engines[index] = engine = SimulatedEngine(
            name, self.address(index), shape, self._world, weights, self._take
        )
        self.note(f"{name} starts: {engine.incarnation}, weights {weights}")

    def _kill(self, index: int, seconds: float, weights: int) -> None:
        engine = self.engines[index]
        if engine is None:
            return
        self.note(f"{engine.name} dies")
        self._num_steps += engine.num_steps
        engine.kill()
        self.engines[index] = None
        for client in self.clients:
            client.lost(engine)
        self.clock.after(seconds, partial(self._start, index, weights))

    def _take(self, engine: SimulatedEngine, output: Output) -> None:
        found = _NUMBER.match(output.request_id)
        assert found is not None
        self.clients[int(found[1])].take(engine, output)

    # --- what goes wrong ---------------------------------------------------------------------

    def _go_wrong(self, fault: FaultPlan) -> None:
        kind, target, seconds = fault.kind, fault.target, fault.seconds
        self.note(f"{kind}: {target}, {seconds} s")
        self._num_faults += 1
        if kind in (Fault.ABORT_PRODUCER, Fault.ABORT_CONSUMER):
            self.clients[target].abort(kind is Fault.ABORT_CONSUMER)
            return
        engine = self.engines[target]
        if kind is Fault.CHANGE_ALL:
            self._weights += 1
            for each in filter(None, self.engines):
                wait_s = self._chance.choice([0.0, 0.05, 0.3])
                self.clock.after(wait_s, partial(each.change_weights, self._weights))
        elif engine is not None:
            self._spoil(engine, target, kind, seconds)

    def _spoil(self, engine: SimulatedEngine, index: int, kind: Fault, seconds: float) -> None:
        elements, name = self.elements, engine.name
        match kind:
            case Fault.KILL:
                self._kill(index, _STARTS_S + seconds, engine.weights)
            case Fault.UPGRADE:
                self._weights += 1
                self._kill(index, _STARTS_S + seconds, self._weights)
            case Fault.STOP:
                engine.process.stop(seconds)
            case Fault.JUMP:
                engine.process.jump(seconds)
            case Fault.CUT:
                self.network.cut(engine.address)
            case Fault.OUTAGE:
                elements.lose_messages(engine.address, seconds)
            case Fault.SLOW_READS:
                elements.spoil_reads("slow", name, 3 * seconds)
            case Fault.HANGING_READS:
                elements.spoil_reads("hanging", name, seconds)
            case Fault.FAILED_READS:
                elements.spoil_reads("failing", name, seconds)
            case Fault.LATE_READS:
                elements.spoil_reads("late", name, 2 * seconds)
            case Fault.CORRUPTION if engine.shape.options["integrity"] == "digest":
                elements.spoil_reads("corrupt", name, 2 * seconds)
            case Fault.CHANGE:
                self._weights += 1
                engine.change_weights(self._weights)
            case Fault.NOT_REGISTERED:
                elements.refuse(name, 3 * seconds)
            case Fault.RAISE:
                elements.raise_once(name)
                self._num_faults -= 1
            case Fault.STRANGER:
                Stranger(self.network, engine, self._chance).speak(min(seconds, 0.3))
            case _:
                self._num_faults -= 1

    # --- inside ------------------------------------------------------------------------------

    def _new_id(self) -> str:
        return f"{self._chance.getrandbits(128):032x}"

    def note(self, text: str) -> None:
        if self._writes_log:
            self.log.append(f"{self.clock.now:9.4f}  {text}")

    def _fate(self, address: Address, frames: list[bytes]) -> Sequence[float]:
        delays = self.elements.of_message(address, frames)
        late = ", ".join(f"{delay * 1e3:.1f}" for delay in delays) or "lost"
        try:
            header, message = framing.decode(frames)
        except framing.WireError:
            self.note(f"by {address[1]} ({late}): {frames}")
        else:
            who = f"{header.sender[:4]} to {header.target[:4]}"
            text = "Welcome" if isinstance(message, wire.Welcome) else str(message)  # addresses
            self.note(f"{who} by {address[1]} ({late}): {text}")
        return delays


def run_seed(seed: int, writes_log: bool = False) -> Result:
    return SimulatedWorld(make_plan(seed), writes_log).run()

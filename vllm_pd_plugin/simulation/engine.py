"""One incarnation of an engine: vLLM's own scheduler with our connector in it, ranks whose KV cache
is a table, and no model.

A step takes what its ``Pace`` says. Layer after layer it is checked that each request finds the KV
of its own prompt, then what the step computes is written: what comes of another's KV is nobody's.
``StaleKv`` is raised when a request gives anything out that was computed with such, or goes on
after it.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.edge.surroundings import EngineLoop, Surroundings
from vllm_pd_plugin.ids import Address, BlockId, HandoffId, Incarnation, RequestId
from vllm_pd_plugin.simulation.clock import Clock, Process
from vllm_pd_plugin.simulation.connector import (
    SimulatedConnector,
    SimulatedIdentity,
    SimulatedWorker,
    Site,
)
from vllm_pd_plugin.simulation.links import Network, SimulatedLoop
from vllm_pd_plugin.simulation.memory import NOBODYS, Contents, KvTable, Writer
from vllm_pd_plugin.simulation.shape import Shape
from vllm_pd_plugin.simulation.transport import Fabric, SimulatedTransport

_WAKE_S = 0.0004
_BETWEEN_STEPS_S = 0.0003


class StaleKv(AssertionError):
    """A request was computed with KV that is not that of its tokens, and that counts."""


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """What simulated engines share."""

    clock: Clock
    network: Network
    fabric: Fabric
    contents: Contents
    chance: random.Random


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """What a step has given out for a request; params: those of a handoff."""

    request_id: RequestId
    tokens: Sequence[int]
    finish_reason: str | None
    params: dict[str, Any] | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    """What a step computes of one request: tokens [start, stop)."""

    request_id: RequestId
    start: int
    stop: int
    blocks: tuple[list[BlockId], ...]
    contents: Any
    """Of all tokens up to ``stop``."""
    writer: int


class SimulatedEngine:
    """on_output: takes each output of each step."""

    def __init__(
        self,
        name: str,
        address: Address,
        shape: Shape,
        world: World,
        weights: int,
        on_output: Callable[[SimulatedEngine, Output], None],
    ) -> None:
        self.name = name
        self.address = address
        self.shape = shape
        self.process = Process(world.clock)
        self.num_steps = 0
        self._world = world
        self._on_output = on_output
        self._identity = SimulatedIdentity(weights, self.process.after, shape.hash_s)
        config = PdConfig.parse({"port": address[1], **shape.options}, {})
        around = Surroundings(
            self.process.time, self._make_loop, self._new_incarnation, self._new_handoff_id
        )
        site = Site(name, shape, config, around, self._identity, self._end_rest)
        self.scheduler = Scheduler(
            shape.vllm_config(name, site=site),
            shape.kv_cache_config(),
            _structured_output(),
            shape.block_tokens,
            shape.block_tokens,
        )
        connector = self.scheduler.connector
        assert isinstance(connector, SimulatedConnector)
        self.connector = connector
        layout = shape.layout
        self.workers = [
            SimulatedWorker(
                site,
                rank,
                KvTable(layout, shape.num_blocks, rank),
                partial(self._make_transport, rank),
            )
            for rank in range(shape.ranks)
        ]
        self._layers = [(layer, layout.layers[layer]) for layer in layout.forward_order()]
        groups = [(g, group.window) for g, group in enumerate(layout.groups) for _ in group.layers]
        self._groups = groups
        self._aggregator = KVOutputAggregator(shape.ranks)
        self._hasher = _block_hasher(shape.block_tokens)
        self._chains: dict[RequestId, list[int]] = {}
        self._inbox: deque[Callable[[], bool]] = deque()
        self._is_stepping = self._is_resting = False
        self._rest_s = shape.pace.min_rest_s
        self._rest = 0
        connector.set_xfer_handshake_metadata_pp_aware(
            {(0, rank): worker.handshake for rank, worker in enumerate(self.workers)}
        )

    # --- what its clients ask of it ----------------------------------------------------------

    @property
    def incarnation(self) -> Incarnation:
        return self.connector.side._identity.incarnation

    @property
    def weights(self) -> int:
        return self._identity.weights

    @property
    def is_at_rest(self) -> bool:
        """Whether no request of any kind is left in its scheduler."""
        return not self._inbox and not self.scheduler.has_requests()

    def add(
        self,
        request_id: RequestId,
        prompt: Sequence[int],
        params: dict[str, Any] | None = None,
        max_tokens: int = 1,
        **sampling: Any,
    ) -> None:
        """A request arrives."""
        extra = None if params is None else {"kv_transfer_params": params}
        asked = SamplingParams(max_tokens=max_tokens, temperature=0, extra_args=extra, **sampling)
        request = Request(
            request_id, list(prompt), asked, None, arrival_time=0.0, block_hasher=self._hasher
        )
        self._ask(lambda: self.scheduler.add_request(request))

    def abort(self, request_id: RequestId) -> None:
        """Its client has left."""
        status = RequestStatus.FINISHED_ABORTED
        self._ask(lambda: self.scheduler.finish_requests(request_id, status))

    def change_weights(self, weights: int) -> None:
        """Load other weights in place, as soon as nothing is being computed."""
        self._inbox.append(partial(self._change_weights, weights))
        self._wake()

    def kill(self) -> None:
        """Die without a word."""
        self.process.kill()
        self._world.network.silence(self.address)
        for worker in self.workers:
            worker.transport.close()

    def _ask(self, act: Callable[[], object]) -> None:
        def at_once() -> bool:
            act()
            return True

        self._inbox.append(at_once)
        self._wake()

    # --- steps -------------------------------------------------------------------------------

    def _wake(self) -> None:
        """A request has arrived."""
        if not self._is_stepping:
            self._is_stepping = True
            self.process.after(_BETWEEN_STEPS_S, self._step)
        else:
            self._end_rest()

    def _end_rest(self) -> None:
        if self._is_resting:
            self._is_resting = False
            self.process.after(_BETWEEN_STEPS_S, partial(self._go_on, self._rest))

    def _go_on(self, rest: int) -> None:
        if rest == self._rest:
            self._rest += 1
            self._is_resting = False
            self._step()

    def _step(self) -> None:
        """Do what an engine core does in a step."""
        for _ in range(len(self._inbox)):
            act = self._inbox.popleft()
            if not act():
                self._inbox.append(act)
        if not self.scheduler.has_requests():
            self._is_stepping = bool(self._inbox)
            if self._inbox:
                self.process.after(self.shape.pace.max_rest_s, self._step)
            return
        scheduled = self.scheduler.schedule()
        self.num_steps += 1
        metadata = scheduled.kv_connector_metadata
        assert metadata is not None
        for worker in self.workers:
            worker.step(metadata)
        if not scheduled.total_num_scheduled_tokens:
            self._end_empty(scheduled)
            return
        self._rest_s = self.shape.pace.min_rest_s
        rows = [self._row(*item) for item in scheduled.num_scheduled_tokens.items()]
        pace, chance = self.shape.pace, self._world.chance
        seconds = pace.step_s + pace.token_s * scheduled.total_num_scheduled_tokens
        seconds *= 0.5 + chance.random()
        stale: dict[RequestId, str] = {}
        for place, layer in enumerate(self._layers):
            wait_s = seconds * (place + 1) / (len(self._layers) + 1)
            self.process.after(wait_s, partial(self._compute, rows, stale, *layer))
        self.process.after(seconds, partial(self._end_step, scheduled, rows, stale))

    def _end_empty(self, scheduled: SchedulerOutput) -> None:
        self._report(scheduled, ModelRunnerOutput([], {}), {})
        self._is_resting = True
        self.process.after(self._rest_s, partial(self._go_on, self._rest))
        self._rest_s = min(2 * self._rest_s, self.shape.pace.max_rest_s)

    def _end_step(
        self, scheduled: SchedulerOutput, rows: Sequence[_Row], stale: Mapping[RequestId, str]
    ) -> None:
        for worker in self.workers:
            worker.forward_ended()
        names = [row.request_id for row in rows]
        sampled = [self._sample(row) for row in rows]
        index = {name: i for i, name in enumerate(names)}
        self._report(scheduled, ModelRunnerOutput(names, index, sampled_token_ids=sampled), stale)
        for going_on in stale.keys() & self.scheduler.requests.keys():
            if not self.scheduler.requests[going_on].is_finished():
                raise StaleKv(stale[going_on])
        self.process.after(_BETWEEN_STEPS_S, self._step)

    def _report(
        self,
        scheduled: SchedulerOutput,
        output: ModelRunnerOutput,
        stale: Mapping[RequestId, str],
    ) -> None:
        """Let the scheduler take in what the workers say at the end of a step."""
        output.kv_connector_output, *others = [worker.results() for worker in self.workers]
        if others:
            rest = [ModelRunnerOutput([], {}, kv_connector_output=each) for each in others]
            self._aggregator.aggregate([output, *rest])
        for each in self.scheduler.update_from_output(scheduled, output).values():
            for out in each.outputs:
                if out.new_token_ids and out.request_id in stale:
                    raise StaleKv(stale[out.request_id])
                reason = None if out.finish_reason is None else str(out.finish_reason)
                said = Output(out.request_id, out.new_token_ids, reason, out.kv_transfer_params)
                if reason is not None:
                    self._chains.pop(out.request_id, None)
                self._on_output(self, said)

    # --- the forward pass --------------------------------------------------------------------

    def _row(self, request_id: RequestId, num_tokens: int) -> _Row:
        request = self.scheduler.requests[request_id]
        stop = request.num_computed_tokens
        blocks = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        writer = Writer(self.incarnation, request_id, self.num_steps)
        return _Row(
            request_id,
            stop - num_tokens,
            stop,
            tuple(list(table) for table in blocks),
            np.array(self._chain(request, stop)[:stop], dtype=np.int64),
            self._world.contents.enter(writer),
        )

    def _chain(self, request: Request, num_tokens: int) -> list[int]:
        """Return what the first tokens of a request are, one number for each."""
        contents, chain = self._world.contents, self._chains.get(request.request_id)
        if chain is None:
            chain = self._chains[request.request_id] = []
        prefix = chain[-1] if chain else contents.begin(self.weights)
        for token in request.all_token_ids[len(chain) : num_tokens]:
            prefix = contents.after(prefix, token)
            chain.append(prefix)
        return chain

    def _compute(
        self, rows: Sequence[_Row], stale: dict[RequestId, str], layer: int, name: str
    ) -> None:
        group, window = self._groups[layer]
        for row in rows:
            first = 0 if window is None else max(0, row.start - window + 1)
            for worker in self.workers:
                table, blocks = worker.table, row.blocks[group]
                known, new = row.contents[first : row.start], row.contents[row.start :]
                if len(known) and (wrong := table.find_wrong(layer, blocks, first, known)):
                    writer = self._world.contents.writer(wrong.cell)
                    text = f"{self.name}: {row.request_id} uses KV that is not its own: {wrong}, "
                    stale.setdefault(row.request_id, f"{text}written by {writer}")
                if row.request_id in stale:
                    new = np.full_like(new, NOBODYS)
                table.write(layer, blocks, row.start, new, row.writer)
        for worker in self.workers:
            worker.layer_written(name)

    def _sample(self, row: _Row) -> list[int]:
        request = self.scheduler.requests.get(row.request_id)
        if request is None or row.stop < request.num_tokens:
            return []
        return [10 + int(row.contents[-1]) * 7919 % 900]

    # --- inside ------------------------------------------------------------------------------

    def _change_weights(self, weights: int) -> bool:
        """Say whether it was done: not while anything is being computed, or is about to be."""
        scheduler = self.scheduler
        if scheduler.running or scheduler.finished_recving_kv_req_ids:
            return False
        self.connector.weights_change(is_over=False)
        self._identity.weights = weights
        scheduler.kv_cache_manager.evict_blocks(set(range(self.shape.num_blocks)))
        self._chains.clear()
        self.connector.weights_change(is_over=True)
        return True

    def _make_loop(self, name: str, on_turn: Callable[[], float | None]) -> EngineLoop:
        return SimulatedLoop(
            self.process,
            self._world.network,
            lambda: _WAKE_S * self._world.chance.random(),
            f"{self.name} {name}",
            on_turn,
        )

    def _make_transport(self, rank: int, loop: SimulatedLoop) -> SimulatedTransport:
        name = f"{self.name}/{self.incarnation}/{rank}"
        return SimulatedTransport(name, self.process, self._world.fabric, loop.wake)

    def _new_incarnation(self) -> Incarnation:
        return Incarnation(f"{self._world.chance.getrandbits(64):016x}")

    def _new_handoff_id(self) -> HandoffId:
        return HandoffId(f"{self._world.chance.getrandbits(128):032x}")


@functools.cache
def _structured_output() -> StructuredOutputManager:
    return StructuredOutputManager(Shape("both", 2).vllm_config("none"))


@functools.cache
def _block_hasher(block_tokens: int) -> Callable[[Request], Any]:
    init_none_hash(sha256)
    hasher: Callable[[Request], Any] = get_request_block_hasher(block_tokens, sha256)
    return hasher

"""Runs in the producer of `benchmarks.chaos --race`: counts refusals of blocks that were reused.

An engine loads it through a ``sitecustomize`` that ``race`` writes. With the commit check taken out
it also grants what should be refused: the run must then show corruption, or it proves nothing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_pd_plugin.ids import HandoffId
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.answering import Answering
from vllm_pd_plugin.protocol.export import Export
from vllm_pd_plugin.protocol.export_states import TRANSITIONS, ExportEvent
from vllm_pd_plugin.protocol.exports import ExportTable

COUNTS, TAKE_OUT, CONSUMER = "PD_RACE_COUNTS", "PD_RACE_TAKE_OUT", "PD_RACE_CONSUMER"
"""Environment: the file that gets the counts; whether commits are granted unseen; the file that has
the consumer's processes."""

STOPPED_SHARE, STOP_S = 0.15, (0.12, 0.35)
"""Of the seals that a consumer is told: it is stopped just before it hears of them."""


class Probe:
    """given: how often each block was given to a request. ended: as it was when an export ended."""

    def __init__(self, counts: Path) -> None:
        self._counts = counts
        self._given: Counter[int] = Counter()
        self._ended: dict[HandoffId, dict[int, int]] = {}
        self._told: set[HandoffId] = set()
        self._refused: dict[HandoffId, str] = {}
        self.granted = self.stops = 0
        self._random = random.Random(0)

    def stop(self, pids: Path) -> None:
        """Stop the consumer for a while, now and then."""
        if self._random.random() >= STOPPED_SHARE or not pids.exists():
            return
        self.stops += 1
        _signal(pids, signal.SIGSTOP)
        seconds = self._random.uniform(*STOP_S)
        threading.Timer(seconds, _signal, (pids, signal.SIGCONT)).start()

    def give(self, blocks: list[int]) -> None:
        self._given.update(blocks)

    def end(self, export: Export) -> None:
        blocks = {block for table in export.blocks for block in table}
        self._ended[export.handoff_id] = {block: self._given[block] for block in blocks}
        if export.is_sealed and export.subscribers:
            self._told.add(export.handoff_id)

    def was_reused(self, handoff_id: HandoffId) -> bool:
        then = self._ended.get(handoff_id, {})
        return any(self._given[block] > count for block, count in then.items())

    def was_told(self, handoff_id: HandoffId) -> bool:
        """Say whether the consumer knows all that it needs to read and commit."""
        return handoff_id in self._told

    def refuse(self, handoff_id: HandoffId, reason: str) -> None:
        """A consumer is told that a handoff is over."""
        if handoff_id not in self._refused and self.was_reused(handoff_id):
            self._refused[handoff_id] = reason
            self.write()

    def write(self) -> None:
        told = {
            "reused": Counter(self._refused.values()),
            "granted": self.granted,
            "stops": self.stops,
        }
        part = self._counts.with_suffix(".part")
        part.write_text(json.dumps(told))
        part.replace(self._counts)


def install() -> None:
    """Wrap the exports of this process, when it makes one."""
    probe = Probe(Path(os.environ[COUNTS]))
    make, apply, seal = ExportTable.__init__, ExportTable.apply, ExportTable.seal
    commit, heartbeat = Answering.commit, Answering.heartbeat
    subscribe = Answering.subscribe
    consumer = Path(os.environ[CONSUMER])

    def init(self: ExportTable, *args: Any, **options: Any) -> None:
        _watch_blocks(probe)
        make(self, *args, **options)

    def _apply(self: ExportTable, export: Export, event: ExportEvent) -> Any:
        transition = TRANSITIONS.get((export.state, event))
        if transition and transition.state.is_over and not export.state.is_over:
            probe.end(export)
        return apply(self, export, event)

    def _commit(self: Answering, asked: wire.Commit) -> Any:
        answer = commit(self, asked)
        if not isinstance(answer, wire.Refuse):
            return answer
        probe.refuse(asked.handoff_id, f"commit: {answer.reason}")
        if TAKE_OUT in os.environ and asked.is_last:
            probe.granted += 1
            probe.write()
            return wire.Committed(asked.handoff_id, asked.epoch, asked.is_last)
        return answer

    def _heartbeat(self: Answering, *args: Any) -> Any:
        *answers, (who, alive) = heartbeat(self, *args)
        for handoff_id, reason in alive.lost.items():
            probe.refuse(handoff_id, f"heartbeat: {reason}")
        if TAKE_OUT in os.environ:
            others = {i: why for i, why in alive.lost.items() if not probe.was_told(i)}
            alive = wire.Alive(others)
        return [*answers, (who, alive)]

    def _seal(self: ExportTable, *args: Any) -> Any:
        answers = seal(self, *args)
        if answers:
            probe.stop(consumer)
        return answers

    def _subscribe(self: Answering, *args: Any) -> Any:
        answer = subscribe(self, *args)
        if isinstance(answer, wire.Seal):
            probe.stop(consumer)
        return answer

    wrappers: dict[type, dict[str, Any]] = {
        ExportTable: {"__init__": init, "apply": _apply, "seal": _seal},
        Answering: {"commit": _commit, "heartbeat": _heartbeat, "subscribe": _subscribe},
    }
    for owner, methods in wrappers.items():
        for name, wrapped in methods.items():
            setattr(owner, name, wrapped)


def _signal(pids: Path, number: signal.Signals) -> None:
    for pid in json.loads(pids.read_text()):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _watch_blocks(probe: Probe) -> None:
    """Count what vLLM's pool gives out."""
    from vllm.v1.core.block_pool import BlockPool

    give = BlockPool.get_new_blocks

    def get_new_blocks(self: BlockPool, num_blocks: int) -> Any:
        blocks = give(self, num_blocks)
        probe.give([block.block_id for block in blocks])
        return blocks

    BlockPool.get_new_blocks = get_new_blocks

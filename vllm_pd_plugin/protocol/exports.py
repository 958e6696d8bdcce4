"""All exports of this engine; pure, with an injected clock.

Nothing here sends, waits or touches memory: the methods return what is to be sent, and the owner of
the table does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from vllm_pd_plugin.containment import LOOK_AGAIN_S, Containment
from vllm_pd_plugin.deadlines import Deadlines
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import HandoffId, OwnerId
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache
from vllm_pd_plugin.memory.layout import BlockTables, RankLayout
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.absent import Absent
from vllm_pd_plugin.protocol.export import Export
from vllm_pd_plugin.protocol.export_states import TRANSITIONS, Action, ExportEvent, ExportState
from vllm_pd_plugin.protocol.outbox import Answer, ReturnAddress
from vllm_pd_plugin.protocol.steps import Advance, Steps


class ExportTable:
    """Every export of this engine: its holders say how each grows and ends, ``Answering`` what its
    consumer has said.

    layout: that of one of this engine's ranks: of the groups, each has the same.
    on_released(owner, outcome): its holder may free the blocks of what it has sealed.
    on_abandoned(owner, outcome): nobody wants what its holder is still making.
    on_unpacked(handoff_id, rank): nobody needs what a rank has packed of it.
    """

    def __init__(
        self,
        layout: RankLayout,
        kv_cache: EngineKvCache,
        lease_s: float,
        on_released: Callable[[OwnerId, ExportState], None],
        on_abandoned: Callable[[OwnerId, ExportState], None],
        on_unpacked: Callable[[HandoffId, int], None],
        clock: Callable[[], float],
    ) -> None:
        self._contain = Containment("exports")
        self.revision = 0
        """Of what this engine's KV is; see ``wire.Welcome``."""
        self.tensor_parallel_size = kv_cache.tensor_parallel_size
        self.num_ranks = kv_cache.num_ranks
        num_stages = kv_cache.pipeline_parallel_size
        self._num_layers = [len(kv_cache.layers_of(stage)) for stage in range(num_stages)]
        self._groups = layout.groups
        self._lease_s = lease_s
        self._on_released = on_released
        self._on_abandoned = on_abandoned
        self._on_unpacked = on_unpacked
        self._clock = clock
        self._held: dict[HandoffId, Export] = {}
        self._absent = Absent()
        self._leases = Deadlines[HandoffId]()
        self._steps = Steps(self.num_ranks)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def num_awaited(self) -> int:
        """How many a consumer waits for that no holder has announced."""
        return self._absent.num_awaited

    @property
    def faults(self) -> int:
        return self._contain.faults

    # --- by its holder -----------------------------------------------------------------------

    def enqueue(
        self, handoff_id: HandoffId, owner: OwnerId, num_tokens: int, prompt: bytes
    ) -> None:
        """There will be KV of this many tokens at the most.

        Whoever sends requests chooses ids; one that was used before is not handed off again."""
        if before := self._held.get(handoff_id):
            self.apply(before, ExportEvent.REPLACED)
        export = self._make(handoff_id, owner, self._absent.state_of(handoff_id))
        export.num_tokens, export.prompt = num_tokens, prompt
        export.consumer = self._absent.take(handoff_id)
        self._held[handoff_id] = export
        self.apply(export, ExportEvent.ENQUEUED)

    def open(self, handoff_id: HandoffId) -> list[Answer]:
        """It has its first blocks. Returns the offer, if a consumer waits for it."""
        return self.happen(handoff_id, ExportEvent.OPENED)

    def advance(self, step: int, advances: Sequence[Advance]) -> None:
        """An engine step begins that computes KV of these exports."""
        for advance in advances:
            if export := self._growing(advance):
                self._set_blocks(export, advance.blocks)
        self._steps.begin(step, advances)

    def announce(self, step: int, rank: int, num_layers: int) -> list[Answer]:
        """One rank has written its first ``num_layers`` layers in a step. Returns the progress
        messages that follow."""
        answers: list[Answer] = []
        if rank >= self.num_ranks:
            return answers
        stage = rank // self.tensor_parallel_size
        is_finished = num_layers >= self._num_layers[stage]
        for advance in self._steps.advances(step, stage, num_layers, is_finished):
            if (export := self._growing(advance)) is not None:
                answers += export.wrote(rank, advance.num_tokens, num_layers, is_finished)
        if is_finished:
            self._steps.finish(step, rank)
        return answers

    def withdraw(self, handoff_id: HandoffId, epoch: int) -> list[Answer]:
        """The holder has lost the blocks, and starts afresh."""
        export = self._held.get(handoff_id)
        if export is None or export.state is not ExportState.GROWING or epoch <= export.epoch:
            return []
        export.start_afresh(epoch)
        return self.apply(export, ExportEvent.WITHDRAWN)

    def seal(
        self,
        handoff_id: HandoffId,
        owner: OwnerId,
        num_tokens: int,
        blocks: BlockTables,
        sampled: int | None = None,
    ) -> list[Answer]:
        """All KV is final, and the holder keeps the blocks until it hears of their release. Returns
        what is to be told to whom."""
        export = self._held.get(handoff_id)
        if export is None or export.owner != owner:  # over already, or the id is another's
            ending = self._absent.state_of(handoff_id).outcome
            export = self._make(handoff_id, owner, ending or ExportState.CANCELLED)
        if not export.is_sealed:
            export.num_tokens, export.sampled = num_tokens, sampled
            self._set_blocks(export, blocks)
        return self.apply(export, ExportEvent.SEALED)

    def drop(self, handoff_id: HandoffId) -> list[Answer]:
        """The holder ends it, without KV. Returns who is to be refused."""
        return self.happen(handoff_id, ExportEvent.DROPPED)

    def void(self) -> None:
        """What this engine's KV is has changed: whatever was begun before is over."""
        for export in list(self._held.values()):
            self.apply(export, ExportEvent.VOIDED)

    # --- for a consumer ----------------------------------------------------------------------

    def state_of(self, handoff_id: HandoffId) -> ExportState:
        export = self._held.get(handoff_id)
        return export.state if export else self._absent.state_of(handoff_id)

    def find(self, handoff_id: HandoffId) -> Export | wire.Refuse:
        """Return what a consumer may read, or the answer that it may not."""
        export = self._held.get(handoff_id)
        if export is not None and export.state.is_open:
            return export
        return wire.Refuse(handoff_id, self.state_of(handoff_id).refusal)

    def live(self, handoff_id: HandoffId) -> Export | wire.Refuse:
        """The same, once no lease has run out unnoticed: what is said of an export must never be
        based on one that has."""
        self.tick()
        return self.find(handoff_id)

    def renew(self, export: Export) -> None:
        """The consumer has spoken: its lease begins anew, if silence is to end it."""
        if export.is_leased:
            self._leases.set(export.handoff_id, self._clock() + self._lease_s)

    def expect(self, handoff_id: HandoffId, who: ReturnAddress) -> bool:
        """A consumer waits for what no holder has announced; it must come within one lease. False:
        it is over, or too many are waited for."""
        state = self.state_of(handoff_id)
        if state.outcome or (state is ExportState.UNKNOWN and self._absent.is_full):
            return False
        self._apply_absent(handoff_id, ExportEvent.WANTED, who)
        return True

    def readdress(self, handoff_id: HandoffId, who: ReturnAddress) -> None:
        """Who waits for it has another address now."""
        self._absent.put(handoff_id, ExportState.AWAITED, who)

    # --- at any time -------------------------------------------------------------------------

    def tick(self) -> float | None:
        """Expire what nobody asks for any more; return when to call again (absolute), or None."""
        leases, now = self._leases, self._clock()
        again = now + LOOK_AGAIN_S
        self._contain.each("leases", leases.take(now), self._expire, lambda i: leases.set(i, again))
        return leases.next()

    def happen(self, handoff_id: HandoffId, event: ExportEvent) -> list[Answer]:
        """Let an event happen to whatever has this id; return what is to be told to whom."""
        if export := self._held.get(handoff_id):
            return self.apply(export, event)
        self._apply_absent(handoff_id, event)
        return []

    def apply(self, export: Export, event: ExportEvent) -> list[Answer]:
        """Let an event happen to an export; return what is to be told to whom."""
        transition = TRANSITIONS.get((export.state, event))
        if transition is None:
            return []
        was_held, export.state = not export.state.is_over, transition.state
        if was_held and export.state.is_over:
            del self._held[export.handoff_id]
            self._absent.put(export.handoff_id, export.state, None)
        answers: list[Answer] = []
        for action in transition.actions:  # one that fails keeps no blocks
            answers += self._contain.run(action.value, partial(self._act, export, action), [])
        return answers

    # --- inside ------------------------------------------------------------------------------

    def _expire(self, handoff_id: HandoffId) -> None:
        self.happen(handoff_id, ExportEvent.EXPIRED)

    def _make(self, handoff_id: HandoffId, owner: OwnerId, state: ExportState) -> Export:
        blocks: BlockTables = tuple(() for _ in self._groups)
        return Export(handoff_id, owner, 0, b"", blocks, self.tensor_parallel_size, state)

    def _growing(self, advance: Advance) -> Export | None:
        """Return what a step adds to; None where it is of an earlier epoch, or makes no odds."""
        export = self._held.get(advance.handoff_id)
        if export is None or export.epoch != advance.epoch:
            return None
        return export if export.state is ExportState.GROWING else None

    def _set_blocks(self, export: Export, blocks: BlockTables) -> None:
        """Take the block tables as they are now.

        When a request goes on after its prompt, a sliding window lets go of blocks that a
        consumer may be reading."""
        if not export.keeps(self._groups, blocks):
            self.apply(export, ExportEvent.BLOCKS_LOST)
        export.blocks = blocks

    def _act(self, export: Export, action: Action) -> list[Answer]:
        """Do what follows from a change; return what is to be told to whom."""
        outcome = export.state.outcome
        match action:
            case Action.RENEW:
                self.renew(export)
            case Action.END_LEASE:
                self._leases.remove(export.handoff_id)
            case Action.UNSTAGE:
                for rank in export.packing_ranks:
                    self._on_unpacked(export.handoff_id, rank)
                export.packing_ranks.clear()
            case Action.RELEASE if outcome is not None:
                self._on_released(export.owner, outcome)
            case Action.ABANDON if outcome is not None:
                self._on_abandoned(export.owner, outcome)
            case Action.OFFER if export.consumer is not None:
                return [(export.consumer, export.offer(self.revision))]
            case Action.TELL:
                return export.tell_all()
            case Action.REFUSE:
                return export.refuse_all(Reason.PRODUCER_ENDED)
        return []

    def _apply_absent(
        self, handoff_id: HandoffId, event: ExportEvent, who: ReturnAddress | None = None
    ) -> None:
        """Let an event happen to what nobody holds; ``who`` waits for it then."""
        transition = TRANSITIONS.get((self._absent.state_of(handoff_id), event))
        if transition is None:
            return
        self._absent.put(handoff_id, transition.state, who)
        if Action.RENEW in transition.actions:
            self._leases.set(handoff_id, self._clock() + self._lease_s)
        if Action.END_LEASE in transition.actions:
            self._leases.remove(handoff_id)

"""Requests of this engine whose KV comes from elsewhere, as vLLM's scheduler sees them.

Owned by the engine's own thread.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_pd_plugin.codecs.codec import Codec, CodecChoice
from vllm_pd_plugin.containment import Containment
from vllm_pd_plugin.edge.consumer_request import (
    Allocation,
    Attempt,
    AttemptState,
    ConsumingRequest,
    FetchOrders,
    Stage,
)
from vllm_pd_plugin.edge.metadata import FetchReport
from vllm_pd_plugin.edge.metrics import PdStats
from vllm_pd_plugin.edge.prompts import PromptFingerprint
from vllm_pd_plugin.edge.provenance import Provenance
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.ids import HandoffId, RequestId, Source
from vllm_pd_plugin.protocol.control import CallControl
from vllm_pd_plugin.protocol.events import Lost, Offered
from vllm_pd_plugin.transfer.specs import FetchSpec

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_pd_plugin.edge.identity import AdapterFingerprints

logger = logging.getLogger(__name__)


class ConsumingRequests:
    """Which requests fetch, and how far each is."""

    def __init__(
        self,
        recomputes: bool,
        call: CallControl,
        stats: PdStats,
        adapters: AdapterFingerprints | None = None,
    ) -> None:
        self._contain = Containment("consuming")
        self._provenance: Provenance | None = None
        self._adapters = adapters
        self._recomputes = recomputes
        self._call = call
        self._stats = stats
        self._open: dict[RequestId, ConsumingRequest] = {}
        self._leaders: dict[HandoffId, RequestId] = {}
        self._fetches: list[FetchSpec] = []
        self._refused: list[RequestId] = []
        self._cancels: dict[RequestId, Reason] = {}
        self._hopeless: list[RequestId] = []
        self._report = FetchReport({}, {}, {}, {}, {})

    def __len__(self) -> int:
        return len(self._open)

    def bind(self, kv_cache_manager: KVCacheManager) -> None:
        """Take where fetched KV is cached."""
        self._provenance = Provenance(kv_cache_manager)

    @property
    def faults(self) -> int:
        """How many were caught; see ``Containment``."""
        return self._contain.faults

    def add(
        self, request: Request, sources: Sequence[Source], codec: CodecChoice, seeds: bool = False
    ) -> None:
        """Begin to fetch, or to follow the request that already fetches the same handoff.

        seeds: go on after the token that the producer has sampled.
        """
        prompt = PromptFingerprint(request, self._adapters)
        handoff_id = sources[0].handoff_id
        stage = Stage.FOLLOWING if self._is_led(handoff_id) else Stage.TRYING
        consuming = ConsumingRequest(request, tuple(sources), codec, seeds, prompt, stage)
        self._open[request.request_id] = consuming
        consuming.look_for_lossy(self._provenance)
        if stage is Stage.TRYING:
            self._leaders[handoff_id] = request.request_id
            self._want(consuming)
            self._call(lambda _: prompt.hash_ahead())

    def add_failed(self, request: Request, error: HandoffError, seeds: bool = False) -> None:
        """Take a request that cannot even begin to be handed off."""
        self._open[request.request_id] = ConsumingRequest(request, (), seeds=seeds)
        self._fail(request.request_id, error.reason, str(error))

    def match(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Answer ``get_num_new_matched_tokens``; None means: ask again, the offer has not come."""
        consuming = self._open.get(request.request_id)
        if consuming is None:
            return 0, False
        if consuming.is_at(AttemptState.WANTED):
            return None, False
        if consuming.stage is Stage.FOLLOWING:
            if self._is_led(consuming.sources[0].handoff_id):
                return None, False
            if not consuming.seeds:
                # Its leader may have brought it. vLLM has looked by the plain hashes just now.
                return (None if consuming.look_for_lossy(self._provenance) else 0), False
            # Its leader is gone, and with it the token that it was to go on after.
            self._fail(request.request_id, Reason.PRODUCER_ENDED, "the first token is not known")
        if consuming.stage is Stage.FAILED:
            return self._match_failed(consuming)
        missing = consuming.missing = consuming.num_tokens - num_computed_tokens
        # The last token of a prompt is computed again in any case, unless the next one is known.
        return (missing, True) if missing > 1 or consuming.seeds else (0, False)

    def _match_failed(self, consuming: ConsumingRequest) -> tuple[int | None, bool]:
        # vLLM fails a request only through a failed receive, so one is staged: a single token,
        # whose load the workers report as failed without starting it.
        if not self._recomputes:
            return 1, True
        # One that must not be computed here waits until it is ended.
        return (None if consuming.seeds else 0), False

    def break_off(self, request: Request) -> tuple[int | None, bool]:
        """A request could not be matched: it fails. Returns what to answer."""
        consuming = self._open.get(request.request_id)
        if consuming is None:
            return 0, False
        self._fail(request.request_id, Reason.INTERNAL, "it could not be matched")
        return self._match_failed(consuming)

    def refuse(self, request: Request, num_external_tokens: int) -> None:
        """A request's blocks could not be taken in: it fails, once nothing writes to them."""
        request_id = request.request_id
        if request_id in self._open:
            self._fail(request_id, Reason.INTERNAL, "its blocks could not be taken in")
        if num_external_tokens:  # vLLM waits for what is to come
            self._refused.append(request_id)

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The request has blocks, for so many tokens that are to come from elsewhere."""
        request_id = request.request_id
        consuming = self._open.get(request_id)
        if consuming is None:
            return
        if num_external_tokens == 0:  # everything is here already, or is computed here
            if consuming.missing > 1 and consuming.stage is not Stage.FAILED:
                # vLLM loads nothing for this request (it wants prompt_logprobs, for one), or
                # another connector does.
                self._stats.record_failure(Reason.NOT_LOADED)
                logger.warning("handoff of request %s: vLLM does not load it", request_id)
            if consuming.seeds and consuming.stage is not Stage.FAILED:
                self._hopeless.append(request_id)  # its first token would be given out twice
            self._forget(request_id, cancel=True)
        elif consuming.stage is Stage.FAILED:
            self._refused.append(request_id)
        else:
            first_token = consuming.num_tokens - num_external_tokens
            tokens = range(first_token, consuming.num_tokens)
            consuming.allocation = Allocation(tokens, blocks.get_block_ids())
            self._fetch(consuming)

    def take_orders(self) -> FetchOrders:
        """Return what has gathered for the workers since the last call."""
        orders = FetchOrders(tuple(self._fetches), tuple(self._refused), self._cancels)
        self._fetches, self._refused, self._cancels = [], [], {}
        return orders

    def offered(self, offer: Offered) -> None:
        """Take an offer, if it is for this very prompt."""
        consuming = self._open.get(offer.request_id)
        if consuming is None or not consuming.is_at(AttemptState.WANTED):
            return
        attempt, request = consuming.attempt, consuming.request
        assert attempt is not None
        most = request.num_tokens  # with a seed, which must be the next token, all of them
        fits = offer.num_tokens == most if consuming.seeds else offer.num_tokens <= most
        if (prompt := consuming.prompt) is not None:
            prompt.look_again()
        if not fits or prompt is None or prompt.of(offer.num_tokens) != offer.prompt:
            self._close(request.request_id, cancel=False)
            text = "the handoff is of another prompt"
            self._lose(consuming, Reason.PROMPT_MISMATCH, text)
            return
        attempt.source = offer.source
        attempt.follow(AttemptState.OFFERED)
        if consuming.allocation is None:
            consuming.num_tokens = offer.num_tokens
        else:  # those of an attempt before it
            self._fetch(consuming)

    def lost(self, lost: Lost) -> None:
        """What a request wants cannot be had."""
        consuming = self._open.get(lost.request_id)
        if consuming is None or consuming.stage is not Stage.TRYING:
            return
        attempt = consuming.attempt
        assert attempt is not None
        if lost.source is not None and not attempt.is_at(lost.source):
            return  # its ranks have turned to the next meanwhile
        if attempt.is_void:
            return  # that weighs more, whatever else is said of it
        if attempt.state is AttemptState.FETCHING:
            self._cancels[lost.request_id] = attempt.lost = lost.reason
        else:
            self._lose(consuming, lost.reason, lost.message)

    def void(self) -> None:
        """This engine's KV is another from now on: what has blocks, with KV in them from before,
        fails."""
        for request_id, consuming in self._open.items():
            if consuming.stage is not Stage.TRYING or consuming.allocation is None:
                continue
            attempt = consuming.attempt
            assert attempt is not None
            attempt.lost = Reason.KV_CHANGED
            if attempt.state is AttemptState.FETCHING:
                self._cancels[request_id] = Reason.KV_CHANGED
            else:
                self._close(request_id, cancel=True)
                self._lose(consuming, Reason.KV_CHANGED, "this engine's KV is another since")

    def collect(self, output: KVConnectorOutput) -> None:
        """Take the workers' results of a step."""
        report = output.kv_connector_worker_meta
        if isinstance(report, FetchReport):  # a rank may say so before the last has finished
            self._report = self._report.aggregate(report)
            for request_id, attempt in report.attempts.items():
                self._failed_on_a_rank(request_id, attempt)
        ended = [(i, i in output.failed_recving) for i in output.finished_recving or ()]
        self._contain.each("results", ended, self._collect, self._end_uncollected)

    def _end_uncollected(self, ended: tuple[RequestId, bool]) -> None:
        """A result could not be taken in: what vLLM would make of its request is not known."""
        request_id, _ = ended
        self._hopeless.append(request_id)
        if (consuming := self._open.get(request_id)) is not None:
            if self._provenance is not None:  # vLLM caches it before it is ended
                self._provenance.disown(consuming.request)
            self._forget(request_id, cancel=True)

    def _collect(self, ended: tuple[RequestId, bool]) -> None:
        """A request's fetch has ended on all ranks."""
        request_id, failed = ended
        reason = self._report.reasons.pop(request_id, Reason.INTERNAL)
        valid_tokens = self._report.valid_tokens.pop(request_id, 0)
        sampled = self._report.sampled.pop(request_id, None)
        codec = self._report.codecs.pop(request_id, Codec.RAW)
        self._report.attempts.pop(request_id, None)
        lacks_tokens = request_id in self._report.lacking
        self._report.lacking.discard(request_id)
        self._cancels.pop(request_id, None)
        consuming = self._open.get(request_id)
        if consuming is None:
            return
        if consuming.stage is Stage.FINISHED and reason is Reason.INTERNAL:
            reason = Reason.ABORTED  # it was refused for that, see ``finish``
        came = not failed and consuming.is_at(AttemptState.FETCHING)
        if consuming.attempt is not None and consuming.attempt.is_void:
            if came:  # before that
                self._stats.record_failure(Reason.KV_CHANGED)
                self._end_uncollected(ended)
                return
            valid_tokens = 0
        if not failed or valid_tokens:
            consuming.note_codec(self._provenance, codec)
            if lacks_tokens and self._provenance is not None:
                self._provenance.disown(consuming.request)
                # Nor may it find them itself, when it is preempted and begins anew.
                consuming.request.skip_reading_prefix_cache = True
        if came and consuming.seeds:
            self._seed(consuming, sampled)
        retries = failed and self._recomputes and consuming.stage is not Stage.FINISHED
        if failed and consuming.stage is not Stage.FAILED:
            self._fail(request_id, reason, "the fetch failed")
        if not retries:
            self._forget(request_id, cancel=failed)
        elif consuming.sources:
            self._close(request_id, cancel=True)
            if valid_tokens and not consuming.seeds:
                # vLLM has set it to none: what did arrive need not be computed again.
                consuming.request.num_computed_tokens = valid_tokens
                self._stats.record_kept(valid_tokens)

    def finish(self, request_id: RequestId) -> None:
        """The request has ended, whatever the reason."""
        consuming = self._open.get(request_id)
        if consuming is None:
            return
        if consuming.is_at(AttemptState.FETCHING):
            # vLLM keeps the blocks until the workers report the receive as finished.
            assert consuming.attempt is not None
            consuming.follow(Stage.FINISHED)
            if consuming.attempt.is_last:
                self._cancels[request_id] = Reason.ABORTED
            else:  # a cancelled fetch that is not the last chance would not be reported
                self._refused.append(request_id)
        elif consuming.is_at(AttemptState.WANTED) and consuming.allocation is not None:
            consuming.follow(Stage.FINISHED)
            self._refused.append(request_id)
            self._close(request_id, cancel=True)
        else:
            self._forget(request_id, cancel=True)

    def take_hopeless(self) -> list[RequestId]:
        """Return requests that vLLM would compute afresh here, and must not."""
        hopeless, self._hopeless = self._hopeless, []
        return hopeless

    def _seed(self, consuming: ConsumingRequest, sampled: int | None) -> None:
        """Let a request that has not been scheduled yet begin after the producer's token."""
        if sampled is None:
            self._hopeless.append(consuming.request.request_id)
            self._stats.record_failure(Reason.PRODUCER_ENDED)
        else:
            consuming.seed(sampled)

    def _is_led(self, handoff_id: HandoffId) -> bool:
        return self._leaders.get(handoff_id) in self._open

    def _want(self, consuming: ConsumingRequest) -> Attempt:
        """Turn to the next source."""
        request_id, attempt = consuming.request.request_id, consuming.begin_attempt()
        source = attempt.source
        self._call(lambda control: control.want(request_id, source))
        return attempt

    def _fetch(self, consuming: ConsumingRequest) -> None:
        """Let the workers fetch from the source that has offered."""
        request_id = consuming.request.request_id
        assert consuming.attempt is not None
        consuming.attempt.follow(AttemptState.FETCHING)
        self._call(lambda control: control.allocated(request_id))
        self._fetches.append(consuming.describe_fetch())

    def _lose(self, consuming: ConsumingRequest, reason: Reason, message: str) -> None:
        """The source of the attempt under way is of no use: turn to the next, or fail."""
        request_id, lost = consuming.request.request_id, consuming.attempt
        assert lost is not None
        # Another source has nothing for what was there before, nor for ranks that have it all.
        if lost.is_last or lost.lost is Reason.KV_CHANGED:
            self._fail(request_id, reason, message)
            if consuming.allocation is not None:
                self._refused.append(request_id)
            return
        lost.end(reason)
        self._stats.record_retry(reason)
        text = "handoff of request %s: no use of %s:%d (%s): %s; asking %s:%d"
        here, there = lost.source.address, self._want(consuming).source.address
        logger.warning(text, request_id, *here, reason, message, *there)

    def _failed_on_a_rank(self, request_id: RequestId, attempt: int) -> None:
        """A fetch has failed on a rank; if there is another source, all ranks turn to it."""
        consuming = self._open.get(request_id)
        tried = consuming.attempt if consuming is not None else None
        is_tried = tried is not None and tried.number == attempt
        if tried is not None and is_tried and tried.is_last:
            return  # the last chance: its end is reported when all ranks have ended
        reason = self._report.reasons.pop(request_id)
        self._report.valid_tokens.pop(request_id)
        self._report.attempts.pop(request_id)
        # Another rank may have said so before.
        if consuming is not None and is_tried and consuming.is_at(AttemptState.FETCHING):
            self._close(request_id, cancel=True)
            self._lose(consuming, reason, "the fetch failed")

    def _fail(self, request_id: RequestId, reason: Reason, message: str) -> None:
        consuming, recomputes = self._open[request_id], self._recomputes
        if consuming.seeds and recomputes:
            recomputes = False
            if consuming.stage is not Stage.FINISHED:  # else it has been ended
                self._hopeless.append(request_id)
        consuming.fail(reason)
        self._stats.record_failure(reason)
        then = "computing its prompt here" if recomputes else "failing the request"
        text = "handoff of request %s failed (%s): %s; %s"
        logger.warning(text, request_id, reason, message, then)

    def _forget(self, request_id: RequestId, cancel: bool) -> None:
        for source in self._open.pop(request_id).sources:
            if self._leaders.get(source.handoff_id) == request_id:
                del self._leaders[source.handoff_id]
        self._close(request_id, cancel)

    def _close(self, request_id: RequestId, cancel: bool) -> None:
        self._call(lambda control: control.close(request_id, cancel))

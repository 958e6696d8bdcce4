"""Requests of this engine whose KV comes from elsewhere, as vLLM's scheduler sees them.

Owned by the engine's own thread.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_pd_plugin.codecs.codec import Codec, CodecChoice
from vllm_pd_plugin.containment import Containment
from vllm_pd_plugin.edge.consumer_request import ConsumingRequest, FetchOrders, Stage
from vllm_pd_plugin.edge.metadata import FetchReport
from vllm_pd_plugin.edge.metrics import PdStats
from vllm_pd_plugin.edge.prompts import PromptFingerprint
from vllm_pd_plugin.edge.provenance import Provenance
from vllm_pd_plugin.errors import OTHER_KV, HandoffError, Reason
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
        consuming = ConsumingRequest(
            request, list(sources), codec=codec, seeds=seeds, prompt=prompt
        )
        self._open[request.request_id] = consuming
        self._look_for_lossy(consuming)
        if self._is_led(consuming):
            consuming.stage = Stage.FOLLOWING
        else:
            self._leaders[sources[0].handoff_id] = request.request_id
            self._want(consuming)
            self._call(lambda _: prompt.hash_ahead())

    def add_failed(self, request: Request, error: HandoffError, seeds: bool = False) -> None:
        """Take a request that cannot even begin to be handed off."""
        self._open[request.request_id] = ConsumingRequest(request, [], seeds=seeds)
        self._fail(request.request_id, error.reason, str(error))

    def match(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Answer ``get_num_new_matched_tokens``; None means: ask again, the offer has not come."""
        consuming = self._open.get(request.request_id)
        if consuming is None:
            return 0, False
        if consuming.stage is Stage.WANTED:
            return None, False
        if consuming.stage is Stage.FOLLOWING:
            if self._is_led(consuming):
                return None, False
            if not consuming.seeds:
                # Its leader may have brought it. vLLM has looked by the plain hashes just now.
                return (None if self._look_for_lossy(consuming) else 0), False
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
            consuming.spec = FetchSpec(
                request_id,
                consuming.sources[0],
                consuming.num_tokens - num_external_tokens,
                consuming.num_tokens,
                blocks.get_block_ids(),
            )
            self._fetch(consuming)

    def take_orders(self) -> FetchOrders:
        """Return what has gathered for the workers since the last call."""
        orders = FetchOrders(tuple(self._fetches), tuple(self._refused), self._cancels)
        self._fetches, self._refused, self._cancels = [], [], {}
        return orders

    def offered(self, offer: Offered) -> None:
        """Take an offer, if it is for this very prompt."""
        consuming = self._open.get(offer.request_id)
        if consuming is None:
            return
        request = consuming.request
        most = request.num_tokens  # with a seed, which must be the next token, all of them
        fits = offer.num_tokens == most if consuming.seeds else offer.num_tokens <= most
        if (prompt := consuming.prompt) is not None:
            prompt.look_again()
        if not fits or prompt is None or prompt.of(offer.num_tokens) != offer.prompt:
            self._close(request.request_id, cancel=False)
            text = "the handoff is of another prompt"
            self._lose(consuming, Reason.PROMPT_MISMATCH, text)
            return
        consuming.sources[0] = offer.source
        if consuming.stage is Stage.WANTED_ELSEWHERE:
            self._fetch(consuming)
        else:
            consuming.stage, consuming.num_tokens = Stage.OFFERED, offer.num_tokens

    def lost(self, lost: Lost) -> None:
        """What a request wants cannot be had."""
        consuming = self._open.get(lost.request_id)
        if consuming is None:
            return
        if consuming.stage is Stage.FETCHING:
            self._cancels[lost.request_id] = lost.reason
            consuming.is_void = lost.reason in OTHER_KV
        elif consuming.stage in (Stage.WANTED, Stage.OFFERED, Stage.WANTED_ELSEWHERE):
            self._lose(consuming, lost.reason, lost.message)

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
        self._cancels.pop(request_id, None)
        consuming = self._open.get(request_id)
        if consuming is None:
            return
        if consuming.stage is Stage.FINISHED and reason is Reason.INTERNAL:
            reason = Reason.ABORTED  # it was refused for that, see ``finish``
        if consuming.is_void:
            if not failed and consuming.stage is Stage.FETCHING:  # it had come before that
                self._stats.record_failure(Reason.KV_CHANGED)
                self._end_uncollected(ended)
                return
            valid_tokens = 0
        if not failed or valid_tokens:
            self._note_codec(consuming, codec)
        if not failed and consuming.seeds and consuming.stage is Stage.FETCHING:
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
        if consuming.stage is Stage.FETCHING:
            # vLLM keeps the blocks until the workers report the receive as finished.
            consuming.stage = Stage.FINISHED
            if len(consuming.sources) == 1:
                self._cancels[request_id] = Reason.ABORTED
            else:  # a cancelled fetch that is not the last chance would not be reported
                self._refused.append(request_id)
        elif consuming.stage is Stage.WANTED_ELSEWHERE:
            consuming.stage = Stage.FINISHED
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
        request = consuming.request
        if sampled is None:
            self._hopeless.append(request.request_id)
            self._stats.record_failure(Reason.PRODUCER_ENDED)
            return
        # vLLM must take it for a part of the prompt; what is sampled next is the first output.
        assert request.prompt_token_ids is not None
        request.prompt_token_ids.append(sampled)
        request._all_token_ids.append(sampled)
        request.num_prompt_tokens += 1
        request.update_block_hashes()

    def _look_for_lossy(self, consuming: ConsumingRequest) -> bool:
        """Let a request that allows a lossy codec find what came through one before; say whether
        there is such."""
        allows = (
            consuming.codec.codec is not Codec.RAW and consuming.codec.narrowest is not Codec.RAW
        )
        if self._provenance is None or not allows or consuming.lossy is not Codec.RAW:
            return False
        found = self._provenance.look_for(consuming.request, consuming.codec)
        consuming.lossy, consuming.plain_tokens = found
        return consuming.lossy is not Codec.RAW

    def _note_codec(self, consuming: ConsumingRequest, codec: Codec) -> None:
        """KV has arrived that vLLM is about to cache."""
        if codec is Codec.RAW:
            return
        assert self._provenance is not None
        assert consuming.spec is not None
        first_token = consuming.spec.first_token
        # A plain prefix that was there may have been evicted since, and fetched with the rest.
        if codec.rank <= consuming.lossy.rank and first_token >= consuming.plain_tokens:
            return
        self._provenance.arrived(consuming.request, first_token, codec)
        consuming.lossy, consuming.plain_tokens = codec, first_token

    def _is_led(self, consuming: ConsumingRequest) -> bool:
        return self._leaders.get(consuming.sources[0].handoff_id) in self._open

    def _want(self, consuming: ConsumingRequest) -> None:
        request_id, source = consuming.request.request_id, consuming.sources[0]
        self._call(lambda control: control.want(request_id, source))

    def _fetch(self, consuming: ConsumingRequest) -> None:
        """Let the workers fetch from the source that has offered."""
        assert consuming.spec is not None
        request_id = consuming.request.request_id
        consuming.stage = Stage.FETCHING
        self._call(lambda control: control.allocated(request_id))
        consuming.spec = dataclasses.replace(
            consuming.spec,
            source=consuming.sources[0],
            attempt=consuming.attempt,
            is_last=len(consuming.sources) == 1,
            codec=consuming.codec,
            seeds=consuming.seeds,
        )
        self._fetches.append(consuming.spec)

    def _lose(self, consuming: ConsumingRequest, reason: Reason, message: str) -> None:
        """The first source is of no use: turn to the next, or fail."""
        request_id = consuming.request.request_id
        has_blocks = consuming.stage in (Stage.FETCHING, Stage.WANTED_ELSEWHERE)
        if len(consuming.sources) > 1:
            consuming.stage = Stage.WANTED_ELSEWHERE if has_blocks else Stage.WANTED
            address = consuming.sources.pop(0).address
            consuming.attempt += 1
            consuming.is_void = False  # all of it is fetched again
            self._stats.record_retry(reason)
            text = "handoff of request %s: no use of %s:%d (%s): %s; asking %s:%d"
            logger.warning(
                text, request_id, *address, reason, message, *consuming.sources[0].address
            )
            self._want(consuming)
            return
        self._fail(request_id, reason, message)
        if has_blocks:
            self._refused.append(request_id)

    def _failed_on_a_rank(self, request_id: RequestId, attempt: int) -> None:
        """A fetch has failed on a rank; if there is another source, all ranks turn to it."""
        consuming = self._open.get(request_id)
        if consuming is not None and attempt == consuming.attempt and len(consuming.sources) < 2:
            return  # the last chance: its end is reported when all ranks have ended
        reason = self._report.reasons.pop(request_id)
        self._report.valid_tokens.pop(request_id)
        self._report.attempts.pop(request_id)
        if consuming is None or attempt != consuming.attempt:
            return  # another rank has said so before
        if consuming.stage is Stage.FETCHING:
            self._close(request_id, cancel=True)
            self._lose(consuming, reason, "the fetch failed")

    def _fail(self, request_id: RequestId, reason: Reason, message: str) -> None:
        recomputes = self._recomputes
        if self._open[request_id].seeds and recomputes:
            recomputes = False
            self._hopeless.append(request_id)
        self._open[request_id].stage = Stage.FAILED
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

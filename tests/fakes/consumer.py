"""A consumer's scheduler side, with a recorder in place of the control thread."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from vllm_pd_plugin.codecs.codec import Codec, CodecChoice
from vllm_pd_plugin.edge.prompts import PromptFingerprint
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Source, new_handoff_id, new_incarnation
from vllm_pd_plugin.protocol.control import ControlPlane
from vllm_pd_plugin.protocol.events import Offered

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    from vllm_pd_plugin.edge.consumer_requests import ConsumingRequests
    from vllm_pd_plugin.edge.metadata import FetchReport
    from vllm_pd_plugin.edge.metrics import PdStats

TOKENS = 40
BLOCKS = ([7, 8, 9],)
BIT_FOR_BIT = CodecChoice()


@dataclasses.dataclass(eq=False)
class FakeRequest:
    """What is read of ``vllm.v1.request.Request``."""

    request_id: str
    all_token_ids: list[int]
    num_computed_tokens: int = 0
    lora_request: None = None
    mm_features: None = None
    skip_reading_prefix_cache: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


class Recorder:
    """Notes what the control plane is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self.calls.append((name, *args))


class Consumer:
    """``ConsumingRequests`` with what is around them."""

    def __init__(self, recomputes: bool = False) -> None:
        self.control = Recorder()
        self.stats = PdStats()
        self.requests = ConsumingRequests(recomputes, self._call, self.stats)

    def _call(self, function: Callable[[ControlPlane], None]) -> None:
        function(self.control)  # type: ignore[arg-type]

    def add(
        self, request_id: str = "r", *sources: Source, codec: CodecChoice = BIT_FOR_BIT
    ) -> FakeRequest:
        request = FakeRequest(request_id, list(range(TOKENS)))
        self.requests.add(request, sources or [new_source()], codec)  # type: ignore[arg-type]
        return request

    def add_seeded(self, *sources: Source) -> Request:
        """One that is to go on after the token that its producer samples; vLLM's own."""
        request = Request("r", list(range(TOKENS)), SamplingParams(max_tokens=8), None)
        self.requests.add(request, sources or [new_source()], BIT_FOR_BIT, seeds=True)
        return request

    def match(
        self, request: FakeRequest | Request, num_computed_tokens: int = 0
    ) -> tuple[int | None, bool]:
        return self.requests.match(request, num_computed_tokens)  # type: ignore[arg-type]

    def offer(self, request: FakeRequest | Request, num_tokens: int = TOKENS) -> None:
        prompt = PromptFingerprint(request).of(num_tokens)  # type: ignore[arg-type]
        self.requests.offered(Offered(request.request_id, PINNED, num_tokens, prompt))

    def allocate(self, request: FakeRequest | Request, num_external_tokens: int) -> None:
        blocks = SimpleNamespace(get_block_ids=lambda: BLOCKS)
        self.requests.allocated(request, blocks, num_external_tokens)  # type: ignore[arg-type]

    def fetching(self, request_id: str = "r", *sources: Source) -> FakeRequest:
        request = self.add(request_id, *sources)
        self.offer(request)
        self.match(request)
        self.allocate(request, TOKENS)
        self.requests.take_orders()
        return request

    def collect(
        self,
        request: FakeRequest | Request,
        reason: Reason | None = None,
        valid_tokens: int = 0,
        sampled: int | None = None,
        codec: Codec = Codec.RAW,
    ) -> None:
        """All ranks report the request's fetch as ended, for good."""
        name = request.request_id
        ended = {name}
        report = None
        codecs = {} if codec is Codec.RAW else {name: codec}
        if reason is not None:
            report = FetchReport({name: reason}, {name: valid_tokens}, {name: 0}, {}, codecs)
        elif sampled is not None or codecs:
            tokens = {} if sampled is None else {name: sampled}
            report = FetchReport({}, {}, {}, tokens, codecs)
        output = SimpleNamespace(
            kv_connector_worker_meta=report,
            finished_recving=ended,
            failed_recving=ended if reason else set(),
        )
        self.requests.collect(output)  # type: ignore[arg-type]

    def fail_on_a_rank(self, request: FakeRequest | Request, reason: Reason, attempt: int) -> None:
        """A rank reports that an attempt has failed."""
        name = request.request_id
        self.report(FetchReport({name: reason}, {name: 0}, {name: attempt}, {}, {}))

    def report(self, report: FetchReport) -> None:
        """A rank has something to say before the last one has finished."""
        output = SimpleNamespace(
            kv_connector_worker_meta=report, finished_recving=None, failed_recving=None
        )
        self.requests.collect(output)  # type: ignore[arg-type]


def new_source() -> Source:
    return Source(new_handoff_id(), ("127.0.0.1", 7000), None)


PINNED = dataclasses.replace(new_source(), incarnation=new_incarnation())

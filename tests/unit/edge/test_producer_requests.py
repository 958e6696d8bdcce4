"""Requests whose KV is to be handed off, with a recorder in place of the control thread."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from vllm_pd_plugin.errors import ParamsError
from vllm_pd_plugin.ids import HandoffId, new_handoff_id
from vllm_pd_plugin.memory.layout import Group, RankLayout, RankMemory, Region
from vllm_pd_plugin.protocol.control import ControlPlane
from vllm_pd_plugin.protocol.events import Abandoned, Released
from vllm_pd_plugin.protocol.export_states import ExportState
from vllm_pd_plugin.protocol.steps import Advance

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.request import RequestStatus

    from vllm_pd_plugin.edge.metrics import PdStats
    from vllm_pd_plugin.edge.producer_requests import ProducingRequests

TOKENS, LAYERS, BLOCK_TOKENS = 40, 4, 16
TOKEN_BYTES = 8  # of one layer
TABLE = ([5, 6, 7],)
EVERY_LAYER = (tuple(range(1, LAYERS + 1)),)
GROUP = Group(
    "full", BLOCK_TOKENS, None, tuple(f"layers.{i}" for i in range(LAYERS)), (1,), "uint8"
)
LAYOUT = RankLayout((GROUP,))
MEMORY = RankMemory((Region(0, 10, BLOCK_TOKENS * TOKEN_BYTES, 128),) * LAYERS, b"")


@dataclasses.dataclass(eq=False)
class FakeRequest:
    """What is read of ``vllm.v1.request.Request``."""

    request_id: str = "r"
    prompt_token_ids: list[int] = dataclasses.field(default_factory=lambda: list(range(TOKENS)))
    kv_transfer_params: dict[str, Any] | None = None
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED
    lora_request: None = None
    mm_features: None = None
    output_token_ids: list[int] = dataclasses.field(default_factory=lambda: [7])

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def all_token_ids(self) -> list[int]:
        return self.prompt_token_ids


class Recorder:
    """Notes what the control plane is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self.calls.append((name, *args))


class Producer:
    """``ProducingRequests`` with what is around them."""

    def __init__(
        self,
        stretch_bytes: int = 1,
        layout: RankLayout = LAYOUT,
        stages: Sequence[tuple[RankLayout, RankMemory]] = (),
    ) -> None:
        self.control = Recorder()
        self.stats = PdStats()
        self.requests = ProducingRequests(stretch_bytes, self._call, self.stats)
        self.requests.describe(stages or [(layout, MEMORY)])
        manager: Any = SimpleNamespace(get_block_ids=lambda request_id: TABLE)
        self.requests.bind(manager)

    def _call(self, function: Callable[[ControlPlane], None]) -> None:
        function(self.control)  # type: ignore[arg-type]

    def add(self, request: FakeRequest, handoff_id: HandoffId | None = None) -> HandoffId:
        handoff_id = handoff_id or new_handoff_id()
        self.requests.add(request, handoff_id)  # type: ignore[arg-type]
        self.control.calls.clear()
        return handoff_id

    def choose(self, request: FakeRequest) -> HandoffId | None:
        return self.requests.choose_id(request)  # type: ignore[arg-type]

    def finish(self, request: FakeRequest, blocks: tuple[list[int], ...] = TABLE) -> Any:
        return self.requests.finish(request, blocks)  # type: ignore[arg-type]


@pytest.fixture
def producer() -> Producer:
    return Producer()


def test_a_handoff_is_known_when_its_request_arrives_and_opened_once_it_is_scheduled(
    producer: Producer,
) -> None:
    handoff = new_handoff_id()
    producer.requests.add(FakeRequest(), handoff)  # type: ignore[arg-type]
    assert [call[:4] for call in producer.control.calls] == [("enqueue", handoff, "r", TOKENS)]
    producer.control.calls.clear()
    producer.requests.scheduled("r")
    producer.requests.scheduled("r")
    producer.requests.scheduled("somebody else's")
    assert producer.control.calls == [("open", handoff)]


def test_each_step_says_what_it_adds(producer: Producer) -> None:
    request = FakeRequest()
    handoff = producer.add(request)
    first = producer.requests.advance({"r": 24})
    assert first is not None
    request.num_computed_tokens = 24
    second = producer.requests.advance({"r": 16, "another": 5})
    assert second is not None
    assert producer.control.calls == [
        ("advance", first.step, [Advance(handoff, 0, 24, TABLE, EVERY_LAYER)]),
        ("advance", second.step, [Advance(handoff, 0, TOKENS, TABLE, EVERY_LAYER)]),
    ]
    assert second.step > first.step


def test_a_step_without_handoffs_announces_nothing(producer: Producer) -> None:
    request = FakeRequest()
    producer.add(request)
    assert producer.requests.advance({"another": 100}) is None
    request.num_computed_tokens = TOKENS  # it decodes
    assert producer.requests.advance({"r": 1}) is None
    assert producer.control.calls == []


def test_a_window_that_moves_on_while_the_request_decodes_is_watched() -> None:
    group = msgspec.structs.replace(GROUP, kind="sliding_window", window=20)
    producer = Producer(layout=RankLayout((group,)))
    request = FakeRequest(num_computed_tokens=TOKENS)
    handoff = producer.add(request)
    assert producer.requests.advance({"r": 1}) is not None
    assert producer.control.calls == [
        ("advance", 1, [Advance(handoff, 0, TOKENS, TABLE, ((LAYERS,),))])
    ]


@pytest.mark.parametrize(
    ("stretch_bytes", "after"),
    [
        (1, (1, 2, 3, 4)),
        (24 * TOKEN_BYTES, (1, 2, 3, 4)),
        (24 * TOKEN_BYTES + 1, (2, 4)),
        (10**9, (4,)),
    ],
)
def test_layers_are_announced_as_often_as_their_kv_is_worth_it(
    stretch_bytes: int, after: tuple[int, ...]
) -> None:
    producer = Producer(stretch_bytes)
    producer.add(FakeRequest())
    announcement = producer.requests.advance({"r": 24})
    assert announcement is not None
    assert announcement.after_layers == (after,)


def test_each_prompt_of_a_step_is_told_of_as_often_as_its_own_kv_is_worth_it() -> None:
    producer = Producer(stretch_bytes=16 * TOKEN_BYTES)
    long, short = FakeRequest("long"), FakeRequest("short")
    handoffs = [producer.add(long), producer.add(short)]
    announcement = producer.requests.advance({"long": 32, "short": 4})
    assert announcement is not None
    assert announcement.after_layers == ((1, 2, 3, 4),)
    advances = producer.control.calls[-1][2]
    assert [advance.handoff_id for advance in advances] == handoffs
    assert [advance.after_layers for advance in advances] == [((1, 2, 3, 4),), ((4,),)]


def test_a_step_looks_at_what_runs_and_not_at_what_waits(producer: Producer) -> None:
    class Waiting(FakeRequest):
        def __getattribute__(self, name: str) -> Any:
            assert name != "num_preemptions", "a request was looked at that is not running"
            return super().__getattribute__(name)

    producer.add(Waiting("waiting"))
    running = FakeRequest()
    producer.add(running)
    producer.requests.scheduled("r")
    assert producer.requests.advance({"r": 24}) is not None
    assert producer.requests.faults == 0


def test_a_preemption_is_told_before_the_step_and_once(producer: Producer) -> None:
    request = FakeRequest()
    handoff = producer.add(request)
    producer.requests.scheduled("r")
    producer.requests.advance({"r": 24})
    request.num_preemptions = 1
    producer.control.calls.clear()
    producer.requests.advance({})
    producer.requests.advance({"r": 24})
    assert [call[0] for call in producer.control.calls] == ["withdraw", "advance"]
    assert producer.control.calls[0] == ("withdraw", handoff, 1)
    assert producer.control.calls[1][2] == [Advance(handoff, 1, 24, TABLE, EVERY_LAYER)]
    assert producer.stats.data["withdrawals"] == 1


@pytest.mark.parametrize(
    "status", [RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED]
)
def test_a_request_that_ends_well_is_sealed_and_its_blocks_are_held(
    producer: Producer, status: RequestStatus
) -> None:
    request = FakeRequest(status=status, num_computed_tokens=TOKENS + 1)
    handoff = producer.add(request)
    sealed = producer.finish(request)
    assert (sealed.handoff_id, sealed.num_tokens) == (handoff, TOKENS)
    assert producer.control.calls == [("seal", handoff, "r", TOKENS, TABLE, 7)]
    assert producer.requests.holds_blocks
    producer.requests.released(Released("r", ExportState.COMMITTED))
    assert producer.requests.take_released() == ("r",)
    assert producer.requests.take_released() == ()
    assert not producer.requests.holds_blocks
    assert producer.stats.data["ended"] == {"committed": 1}


@pytest.mark.parametrize(
    ("status", "blocks"),
    [
        (RequestStatus.FINISHED_ABORTED, TABLE),
        (RequestStatus.FINISHED_ERROR, TABLE),
        (RequestStatus.FINISHED_LENGTH_CAPPED, ([],)),
    ],
)
def test_a_request_that_ends_without_kv_holds_nothing(
    producer: Producer, status: RequestStatus, blocks: tuple[list[int], ...]
) -> None:
    request = FakeRequest(status=status)
    handoff = producer.add(request)
    assert producer.finish(request, blocks) is None
    assert producer.control.calls == [("drop", handoff)]
    assert len(producer.requests) == 0
    assert producer.stats.data["ended"] == {"cancelled": 1}


def test_an_abandoned_request_is_named_once_and_counts_by_what_ended_it(
    producer: Producer,
) -> None:
    request = FakeRequest(status=RequestStatus.FINISHED_ERROR)
    producer.add(request)
    producer.requests.abandoned(Abandoned("r", ExportState.EXPIRED))
    assert producer.requests.take_abandoned() == ["r"]
    assert producer.requests.take_abandoned() == []
    producer.finish(request)
    assert producer.stats.data["ended"] == {"expired": 1}


def test_a_request_of_somebody_else_is_none_of_its_business(producer: Producer) -> None:
    assert producer.finish(FakeRequest()) is None
    assert producer.control.calls == []


def test_the_id_that_the_dispatcher_chose_is_used(producer: Producer) -> None:
    handoff = new_handoff_id()
    assert producer.choose(FakeRequest(kv_transfer_params={"handoff_id": handoff})) == handoff


def test_without_a_choice_each_request_gets_an_id_of_its_own(producer: Producer) -> None:
    first, second = producer.choose(FakeRequest()), producer.choose(FakeRequest())
    assert first is not None
    assert first != second


def test_of_several_choices_of_one_request_only_the_first_hands_off(producer: Producer) -> None:
    params = {"handoff_id": new_handoff_id()}
    producer.add(FakeRequest("0_r"), params["handoff_id"])
    assert producer.choose(FakeRequest("1_r", kv_transfer_params=params)) is None


def test_an_id_in_use_for_another_prompt_is_refused(producer: Producer) -> None:
    params = {"handoff_id": new_handoff_id()}
    producer.add(FakeRequest("a"), params["handoff_id"])
    other = FakeRequest("b", prompt_token_ids=[1, 2, 3], kv_transfer_params=params)
    with pytest.raises(ParamsError, match="in use for another prompt"):
        producer.choose(other)


# --- pipeline stages ---------------------------------------------------------------------------


def stage(num_layers: int, token_bytes: int = TOKEN_BYTES) -> tuple[RankLayout, RankMemory]:
    """What one rank of a stage says."""
    layers = tuple(f"layers.{i}" for i in range(num_layers))
    region = Region(0, 10, BLOCK_TOKENS * token_bytes, 1024)
    group = Group("full", BLOCK_TOKENS, None, layers, (1,), "uint8")
    return RankLayout((group,)), RankMemory((region,) * num_layers, b"")


def test_every_stage_says_when_its_own_layers_are_written() -> None:
    producer = Producer(stages=[stage(3), stage(2)])
    handoff = producer.add(FakeRequest())
    announcement = producer.requests.advance({"r": 24})
    assert announcement is not None
    assert announcement.after_layers == ((1, 2, 3), (1, 2))
    ((_, _, advances),) = producer.control.calls
    assert advances == [Advance(handoff, 0, 24, TABLE, ((1, 2, 3), (1, 2)))]


def test_a_stage_whose_layers_are_larger_says_so_more_often() -> None:
    """Of 24 tokens, two layers are a stretch there, and one is here."""
    producer = Producer(24 * 2 * TOKEN_BYTES, stages=[stage(4), stage(4, 2 * TOKEN_BYTES)])
    producer.add(FakeRequest())
    announcement = producer.requests.advance({"r": 24})
    assert announcement is not None
    assert announcement.after_layers == ((2, 4), (1, 2, 3, 4))


def test_stages_announce_what_any_of_several_requests_wants() -> None:
    producer = Producer(24 * 2 * TOKEN_BYTES, stages=[stage(4), stage(2)])
    short = FakeRequest("s", list(range(8)))
    producer.add(short)
    producer.add(FakeRequest())
    announcement = producer.requests.advance({"s": 8, "r": 24})
    assert announcement is not None
    assert announcement.after_layers == ((2, 4), (2,))
    ((_, _, advances),) = producer.control.calls
    assert [advance.after_layers for advance in advances] == [((4,), (2,)), ((2, 4), (2,))]


def test_windows_of_a_later_stage_are_known_of_in_the_first() -> None:
    """A request that decodes goes on telling which blocks it has let go of."""
    window = Group("sliding_window", BLOCK_TOKENS, 20, (), (1,), "")
    layout, memory = stage(2)
    producer = Producer(stages=[(RankLayout((*layout.groups, window)), memory), stage(1)])
    request = FakeRequest(num_computed_tokens=TOKENS)
    producer.add(request)
    assert producer.requests.advance({"r": 1}) is not None

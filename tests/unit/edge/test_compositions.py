"""Our connector where it is one of several."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_pd_plugin import CONNECTOR
from vllm_pd_plugin.errors import UnsupportedError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import RequestStatus

    from vllm_pd_plugin import register
    from vllm_pd_plugin.edge import hooks
    from vllm_pd_plugin.edge.compositions import (
        BESIDE_US,
        own_config,
        own_connector,
        refuse_bad_config,
        refuse_composition,
    )
    from vllm_pd_plugin.edge.connector import PdConnector
    from vllm_pd_plugin.edge.metrics import PdStats


def multi(*parts: str | dict[str, Any], **more: Any) -> KVTransferConfig:
    """vLLM's MultiConnector of these."""
    connectors = [part if isinstance(part, dict) else {"kv_connector": part} for part in parts]
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"connectors": connectors},
        **more,
    )


def config(transfer: KVTransferConfig | None, stages: int = 1) -> Any:
    return SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
    )


OPTIONS = {"port": 7000}


@pytest.mark.parametrize(
    ("transfer", "expected"),
    [
        (None, None),
        (KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both"), None),
        (KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_both"), {}),
        (multi("NixlConnector", "ExampleConnector"), None),
        (multi(CONNECTOR), {}),
        (
            multi(
                {"kv_connector": CONNECTOR, "kv_connector_extra_config": OPTIONS},
                "ExampleConnector",
            ),
            OPTIONS,
        ),
    ],
    ids=["none", "another", "ours", "others", "ours in it", "ours with options"],
)
def test_our_options_are_found_wherever_our_connector_is(
    transfer: KVTransferConfig | None, expected: dict[str, Any] | None
) -> None:
    assert own_config(config(transfer)) == expected


def test_our_connector_is_found_among_others_however_deep() -> None:
    ours = PdConnector.__new__(PdConnector)
    other = SimpleNamespace()
    inner = SimpleNamespace(sub_connectors=[other, ours])
    assert own_connector(ours) is ours
    assert own_connector(SimpleNamespace(sub_connectors=[other, inner])) is ours
    assert own_connector(SimpleNamespace(sub_connectors=[other])) is None
    assert own_connector(None) is None


@pytest.mark.parametrize("others", [(), BESIDE_US[:1], BESIDE_US[1:2], BESIDE_US])
def test_what_was_tested_beside_us_is_allowed(others: tuple[str, ...]) -> None:
    refuse_composition(multi(CONNECTOR, *others))


@pytest.mark.parametrize(
    "parts", [("ExampleConnector", CONNECTOR), (CONNECTOR, "NixlConnector"), (CONNECTOR, CONNECTOR)]
)
def test_other_compositions_are_refused_with_those_allowed(parts: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedError) as refusal:
        refuse_composition(multi(*parts))
    assert str(list(parts)) in str(refusal.value)
    assert all(name in str(refusal.value) for name in BESIDE_US)


def test_a_failure_policy_that_is_not_vllm_s_own_is_refused() -> None:
    ours = {"kv_connector": CONNECTOR, "kv_load_failure_policy": "recompute"}
    refuse_composition(multi(ours, kv_load_failure_policy="recompute"))
    with pytest.raises(UnsupportedError, match="kv_load_failure_policy"):
        refuse_composition(multi(ours))


def test_lossy_codecs_are_refused_beside_what_would_keep_their_kv_as_exact() -> None:
    beside = config(multi(CONNECTOR, "ExampleConnector"))
    for options in ({"codec": "int8"}, {"lossy_max": "int4"}):
        with pytest.raises(UnsupportedError, match="allow lossy codecs beside another"):
            refuse_bad_config(beside, options)


def test_pipeline_stages_are_refused_beside_what_does_not_tell_them_apart() -> None:
    with pytest.raises(UnsupportedError, match="do not tell its stages apart"):
        refuse_bad_config(config(multi(CONNECTOR, "ExampleConnector"), stages=2), {})


def test_vllm_finds_our_statistics_by_our_class() -> None:
    register()
    cls = KVConnectorFactory.get_connector_class_by_name(PdConnector.__name__)
    assert isinstance(cls.build_kv_connector_stats({"fetches": []}), PdStats)


def test_a_request_that_ends_in_one_group_ends_as_in_all() -> None:
    ours = PdConnector.__new__(PdConnector)
    ended: list[Any] = []
    ours._scheduler = SimpleNamespace(finish=lambda *a: ended.append(a) or (True, {}))
    assert ours.request_finished("request", [1, 2]) == (True, {})  # type: ignore[arg-type]
    assert ended == [("request", ([1, 2],))]


class Freeing:
    """vLLM's scheduler with a request that has ended while its KV was received; another connector
    beside ours still saves it."""

    def __init__(self) -> None:
        hooks.free_blocks_once()
        ours = PdConnector.__new__(PdConnector)
        ours.receiving = set()
        self.freed: list[str] = []
        self.request = SimpleNamespace(
            request_id="r", is_finished=lambda: True, status=RequestStatus.FINISHED_ABORTED
        )
        self.scheduler: Any = Scheduler.__new__(Scheduler)
        nothing = lambda *_: None  # noqa: E731
        vars(self.scheduler).update(
            connector=SimpleNamespace(sub_connectors=[ours], update_connector_output=nothing),
            requests={"r": self.request},
            aux_output_connector=None,
            ec_connector=None,
            encoder_cache_manager=SimpleNamespace(free=nothing),
            finished_req_ids=set(),
            finished_req_ids_dict=None,
            finished_recving_kv_req_ids=set(),
            _inflight_prefills=SimpleNamespace(discard=nothing),
            _set_kv_fetch_stage=nothing,
            _connector_finished=lambda _: (True, None),
            _free_blocks=self._free,
        )

    def _free(self, request: Any) -> None:
        self.freed.append(request.request_id)
        del self.scheduler.requests[request.request_id]

    def ends(self, is_received: bool) -> None:
        self.scheduler._free_request(self.request, delay_free_blocks=is_received)

    def step(self, sent: str = "", received: str = "") -> None:
        output = KVConnectorOutput(finished_sending=set(sent), finished_recving=set(received))
        self.scheduler._update_from_kv_xfer_finished(output)


@pytest.mark.parametrize(
    "steps",
    [
        [{"received": "r"}, {"sent": "r"}],
        [{"sent": "r"}, {"received": "r"}],
        [{"sent": "r", "received": "r"}],
    ],
    ids=["received first", "saved first", "both at once"],
)
def test_blocks_are_freed_once_when_nothing_writes_to_them(steps: list[dict[str, str]]) -> None:
    """vLLM itself frees them at the first word, and ends at the second."""
    freeing = Freeing()
    freeing.ends(is_received=True)
    for step in steps:
        assert freeing.freed == [] or "received" not in step
        freeing.step(**step)
    assert freeing.freed == ["r"]


def test_what_another_connector_saves_is_freed_when_it_is_saved() -> None:
    freeing = Freeing()
    freeing.ends(is_received=False)
    freeing.step(sent="r")
    assert freeing.freed == ["r"]


class Part(PdConnector):
    """Stands for one of several connectors; notes what it is asked."""

    def __init__(self, name: str, tokens: int, asked: list[str]) -> None:
        self.name, self.tokens, self.asked = name, tokens, asked

    def get_num_new_matched_tokens(self, request: Any, num_computed: int) -> tuple[int, bool]:
        self.asked.append(f"{self.name} matches")
        return self.tokens, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external: int) -> None:
        self.asked.append(f"{self.name} gets {num_external}")


@pytest.mark.parametrize(
    ("handed_off", "expected"),
    [(64, ["ours gets 64", "other gets 0"]), (0, ["ours gets 0", "other gets 128"])],
)
def test_what_is_handed_off_goes_before_what_another_has(
    handed_off: int, expected: list[str]
) -> None:
    """The order in which vLLM asks the parts; OffloadingConnector, which refuses CPUs, answers the
    same two questions as the others."""
    for name in BESIDE_US[1:]:
        cls = KVConnectorFactory.get_connector_class_by_name(name)
        for question in ("get_num_new_matched_tokens", "update_state_after_alloc"):
            assert question in vars(cls)
    asked: list[str] = []
    multi = MultiConnector.__new__(MultiConnector)
    multi._connectors = [Part("ours", handed_off, asked), Part("other", 128, asked)]
    multi._requests_to_connector = {}
    request: Any = SimpleNamespace(request_id="r")
    blocks: Any = SimpleNamespace(new_empty=lambda: None, blocks=())
    tokens, _ = multi.get_num_new_matched_tokens(request, 0)
    assert tokens == (handed_off or 128)
    del asked[:]
    multi.update_state_after_alloc(request, blocks, tokens)
    assert asked == expected

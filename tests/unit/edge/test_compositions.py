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

    from vllm_pd_plugin import register
    from vllm_pd_plugin.edge.compositions import (
        BESIDE_US,
        own_config,
        own_connector,
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


def config(transfer: KVTransferConfig | None) -> Any:
    return SimpleNamespace(kv_transfer_config=transfer)


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

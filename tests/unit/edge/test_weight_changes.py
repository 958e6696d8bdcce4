"""What is asked of vLLM's engine core, as our connector hears of it."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine.core import EngineCore

    from vllm_pd_plugin.edge.connector import PdConnector
    from vllm_pd_plugin.edge.hooks import watch_weights


class Core:
    """vLLM's engine core, whose workers do as they are told, or fail."""

    def __init__(self) -> None:
        watch_weights()
        self.noted: list[str] = []
        self.fails = self.sleeps = False
        ours = PdConnector.__new__(PdConnector)
        ours.update_failed = False
        ours._scheduler = SimpleNamespace(  # type: ignore[assignment]
            weights_change=lambda is_over: self.noted.append("over" if is_over else "begins"),
            reset=lambda: self.noted.append("reset"),
            adapter_loaded=lambda int_id: self.noted.append(f"adapter {int_id}"),
        )
        self.core: Any = EngineCore.__new__(EngineCore)
        self.core.model_executor = SimpleNamespace(
            collective_rpc=self._run, add_lora=lambda lora: True, wake_up=lambda tags: None,
            is_sleeping=False,
        )  # fmt: skip
        self.core.scheduler = SimpleNamespace(get_kv_connector=lambda: ours)

    def _run(self, *_: Any) -> list[None]:
        if self.fails:
            raise RuntimeError("a worker could not")
        return []

    def call(self, method: Any) -> list[str]:
        """Return what our connector was told."""
        self.noted.clear()
        if self.fails:
            with pytest.raises(RuntimeError):
                self.core.collective_rpc(method)
        else:
            self.core.collective_rpc(method)
        return list(self.noted)


@pytest.fixture
def core() -> Core:
    return Core()


def test_an_update_begins_and_is_over(core: Core) -> None:
    assert core.call("start_weight_update") == ["begins"]
    assert core.call("update_weights") == ["begins"]
    assert core.call("finish_weight_update") == ["begins", "over"]
    assert core.call("reload_weights") == ["begins", "over"]


def test_an_update_that_failed_is_not_over_before_another_has_succeeded(core: Core) -> None:
    core.call("start_weight_update")
    core.fails = True
    assert core.call("update_weights") == ["begins"]
    core.fails = False
    assert core.call("finish_weight_update") == ["begins"]
    core.call("start_weight_update")
    core.call("update_weights")
    assert core.call("finish_weight_update") == ["begins", "over"]


def test_what_nobody_knows_may_have_changed_them(
    core: Core, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "vllm_pd_plugin"):
        assert core.call("train_a_little") == ["begins", "over"]
        assert core.call(lambda worker: None) == ["begins", "over"]
    assert "train_a_little may have changed the weights" in caplog.text


def test_vllm_s_other_calls_change_nothing(core: Core) -> None:
    assert core.call("get_model_inspection") == []
    del core.core.scheduler  # while an engine is made
    assert core.call("update_max_model_len") == []
    assert core.call("update_weights") == []


@pytest.mark.parametrize("sleeps", [True, False])
def test_only_memory_that_was_given_back_is_another(core: Core, sleeps: bool) -> None:
    core.core.model_executor.is_sleeping = sleeps
    core.core.resume_scheduler = lambda: None
    core.core.wake_up(["scheduling"])
    assert core.noted == (["reset"] if sleeps else [])


def test_an_adapter_that_is_loaded_is_looked_at_anew(core: Core) -> None:
    assert core.core.add_lora(SimpleNamespace(lora_int_id=3)) is True
    assert core.noted == ["adapter 3"]

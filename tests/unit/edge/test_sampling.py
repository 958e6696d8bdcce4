"""vLLM's sampling on a CPU, as far as it is wrapped."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import torch
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_pd_plugin.edge import sampling


class Runner:
    """What the wrapper reads of vLLM's model runner."""

    def __init__(self, device: str, discarded: list[bool], generators: dict[int, Any]) -> None:
        self.device = SimpleNamespace(type=device)
        self.input_batch = SimpleNamespace(num_reqs=len(discarded), generators=generators)
        mask = np.array([*discarded, True, True])  # rows of an earlier, larger batch
        self.discard_request_mask = SimpleNamespace(np=mask)
        self.seen: dict[int, Any] = {}

    def sample(self, fail: bool = False) -> str:
        self.seen = dict(self.input_batch.generators)
        if fail:
            raise RuntimeError("vLLM's own")
        return "sampled"


wrapped = sampling._with_generators_set_aside(Runner.sample)


def test_a_generator_is_set_aside_while_its_prompt_is_not_done() -> None:
    runner = Runner("cpu", [True, False, True], {0: "a", 1: "b", 3: "d"})
    assert wrapped(runner) == "sampled"
    assert runner.seen == {1: "b", 3: "d"}
    assert runner.input_batch.generators == {0: "a", 1: "b", 3: "d"}


def test_it_comes_back_whatever_happens() -> None:
    runner = Runner("cpu", [True], {0: "a"})
    with pytest.raises(RuntimeError):
        wrapped(runner, fail=True)
    assert runner.input_batch.generators == {0: "a"}


def test_a_gpu_s_generators_are_left_to_vllm() -> None:
    runner = Runner("cuda", [True], {0: "a"})
    wrapped(runner)
    assert runner.seen == {0: "a"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_each_token_gets_its_request_s_value(dtype: torch.dtype) -> None:
    expand = sampling._expanding_on_cpu(None)
    values = torch.tensor([0, 5, 7], dtype=dtype)
    expanded = expand(values, torch.tensor([2, 2, 5], dtype=torch.int32), 5, 0, 1)
    assert expanded.tolist() == [1, 1, 7, 7, 7]
    assert expanded.dtype is dtype


def test_temperatures_are_not_rounded() -> None:
    expand = sampling._expanding_on_cpu(None)
    temperatures = torch.tensor([0.25, 0.75])
    assert expand(temperatures, torch.tensor([1, 3]), 3).tolist() == [0.25, 0.75, 0.75]


def test_a_step_without_logits_is_left_as_it_is() -> None:
    def of_none(*_: Any) -> torch.Tensor:
        raise RuntimeError("the largest of no top-k")

    unless_empty = sampling._unless_empty(of_none)
    nothing = torch.empty(0, 5)
    assert unless_empty(nothing, torch.empty(0), None) is nothing
    with pytest.raises(RuntimeError, match="largest"):
        unless_empty(torch.zeros(1, 5), torch.ones(1), None)


def test_vllm_is_wrapped_once() -> None:
    for _ in range(2):
        sampling.mend()
    for function in (
        GPUModelRunner.sample_tokens,
        rejection_sampler.expand_batch_to_tokens,
        rejection_sampler.apply_top_k_top_p,
    ):
        assert function.__code__.co_filename == sampling.__file__
        assert function.__wrapped__.__code__.co_filename != sampling.__file__  # type: ignore[attr-defined]

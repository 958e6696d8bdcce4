"""A forward pass without a model: vLLM's own code around it, and what is launched in it.

vLLM's are the wrapper of an attention op, which calls a connector's hooks, the classes of CUDA
graphs, the forward context, and what either model runner does with a connector in a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from tests.fakes.device import FakeStream

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import torch
    from vllm.compilation.breakable_cudagraph import (
        BreakableCUDAGraphWrapper,
        eager_break_during_capture,
    )
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.config import CUDAGraphMode
    from vllm.distributed.kv_transfer import kv_transfer_state
    from vllm.forward_context import BatchDescriptor, set_forward_context
    from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
    from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin


class Graphs(enum.Enum):
    """How a step's forward pass is launched."""

    EAGER = "eager"
    PIECEWISE = "piecewise"
    BREAKABLE = "breakable"
    FULL = "full"


DESCRIPTOR = BatchDescriptor(num_tokens=64)
OUTPUT = torch.zeros(1)


@dataclasses.dataclass(slots=True, eq=False)
class Batch:
    """What a step computes: for each token its block, its place there, and what it is."""

    blocks: list[int] = dataclasses.field(default_factory=list)
    places: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)


class Forward:
    """layers: names, in the order of the forward pass. write: writes a batch's KV of one layer.

    A layer launches "write N", and its attention, after which the hook is called, "attend N".
    """

    def __init__(
        self,
        vllm_config: Any,
        caches: dict[str, torch.Tensor],
        write: Callable[[Batch, str], None],
    ) -> None:
        self.stream = FakeStream()
        self._config = vllm_config
        self._layers: Sequence[str] = list(caches)
        self._write = write
        self._batch = Batch()
        context = {layer: SimpleNamespace(kv_cache=cache) for layer, cache in caches.items()}
        vllm_config.compilation_config.static_forward_context = context
        attend = maybe_transfer_kv_layer(self._attend)
        with self.stream.graphs(), patch.dict(os.environ, VLLM_USE_BREAKABLE_CUDAGRAPH="1"):
            self._attention = eager_break_during_capture(attend)
            # As vLLM nests them: a step is launched as a whole, or its pieces are.
            self._pieces = [
                CUDAGraphWrapper(self._piece(layer), vllm_config, CUDAGraphMode.PIECEWISE)
                for layer in self._layers
            ]
            self._whole = CUDAGraphWrapper(self._run, vllm_config, CUDAGraphMode.FULL)
            self._breakable = BreakableCUDAGraphWrapper(self._run_plainly, vllm_config)
            for graphs in Graphs:
                self.launch(graphs)  # captures it: no connector is there yet
        self.stream.run()
        self.stream.launched.clear()
        self.stream._num_done = 0

    def _attend(self, layer_name: str) -> None:
        self.stream.launch(f"attend {self._layers.index(layer_name)}")

    def _piece(self, layer: str) -> Callable[[], torch.Tensor]:
        def write() -> torch.Tensor:
            number = self._layers.index(layer)
            self.stream.launch(f"write {number}", lambda: self._write(self._batch, layer))
            return OUTPUT

        return write

    def _run(self) -> torch.Tensor:
        for layer, piece in zip(self._layers, self._pieces, strict=True):
            piece()
            self._attention(layer)
        return OUTPUT

    def _run_plainly(self) -> torch.Tensor:
        for layer in self._layers:
            self._piece(layer)()
            self._attention(layer)
        return OUTPUT

    def give(self, batch: Batch) -> None:
        """Copy a step's inputs to where graphs read them."""

        def take() -> None:
            self._batch = batch

        self.stream.launch("input", take)

    @contextlib.contextmanager
    def context(self, graphs: Graphs) -> Iterator[None]:
        mode = {
            Graphs.EAGER: CUDAGraphMode.NONE,
            Graphs.PIECEWISE: CUDAGraphMode.PIECEWISE,
            Graphs.BREAKABLE: CUDAGraphMode.PIECEWISE,
            Graphs.FULL: CUDAGraphMode.FULL,
        }[graphs]
        metadata = dict.fromkeys(self._layers, SimpleNamespace())
        with set_forward_context(
            metadata,
            self._config,
            num_tokens=DESCRIPTOR.num_tokens,
            cudagraph_runtime_mode=mode,
            batch_descriptor=DESCRIPTOR,
            slot_mapping={},
        ):
            yield

    def launch(self, graphs: Graphs) -> None:
        """Launch the forward pass, within the forward context that it needs."""
        with self.context(graphs):
            self.call(graphs)

    def call(self, graphs: Graphs) -> None:
        (self._breakable if graphs is Graphs.BREAKABLE else self._whole)()

    def replay(self) -> None:
        """Launch it as one graph, outside of any forward context, as model runner V2 does."""
        self._whole.concrete_cudagraph_entries[DESCRIPTOR].cudagraph.replay()


@contextlib.contextmanager
def connected(connector: Any) -> Iterator[None]:
    """Let this be the connector of the worker that is called."""
    with patch.object(kv_transfer_state, "_KV_CONNECTOR_AGENT", connector):
        yield


class RunnerV1:
    """What ``vllm.v1.worker.gpu_model_runner`` does with a connector in a step; speculates: also
    with speculative decoding, which saves after it has sampled."""

    def __init__(self, connector: Any, vllm_config: Any, caches: Any, forward: Forward) -> None:
        self._connector, self._config, self._forward = connector, vllm_config, forward
        self.speculates = False
        with connected(connector):
            connector.register_kv_caches(caches)

    def step(self, scheduled: Any, batch: Batch, graphs: Graphs) -> KVConnectorOutput:
        with connected(self._connector):
            if not scheduled.total_num_scheduled_tokens:
                output = KVConnectorModelRunnerMixin.kv_connector_no_forward(
                    scheduled, self._config
                ).kv_connector_output
                return output or KVConnectorOutput()
            self._forward.give(batch)
            with (
                self._forward.context(graphs),
                KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(
                    scheduled, defer_finalize=self.speculates
                ) as output,
            ):
                self._forward.call(graphs)
            self._forward.stream.launch("sample")
            if self.speculates:
                KVConnectorModelRunnerMixin.finalize_kv_connector()
            assert output is not None
            return output


class RunnerV2:
    """What ``vllm.v1.worker.gpu.model_runner`` does with a connector in a step."""

    def __init__(self, connector: Any, vllm_config: Any, caches: Any, forward: Forward) -> None:
        self._connector, self._forward = connector, forward
        with connected(connector):
            self.active = ActiveKVConnector(vllm_config, caches)

    def step(self, scheduled: Any, batch: Batch, graphs: Graphs) -> KVConnectorOutput:
        with connected(self._connector):
            if not scheduled.total_num_scheduled_tokens:
                output = self.active.no_forward(scheduled).kv_connector_output
                return output or KVConnectorOutput()
            self._forward.give(batch)
            if graphs is Graphs.FULL:
                self.active.pre_forward(scheduled)
                self._forward.replay()
            else:
                with self._forward.context(graphs):
                    self.active.pre_forward(scheduled)
                    self._forward.call(graphs)
            self.active.finish_forward()
            self._forward.stream.launch("sample")
            output = self.active.post_forward(scheduled.finished_req_ids)
            assert output is not None
            return output

"""A GPU's stream and CUDA graphs, as far as vLLM's own classes around a forward pass use them."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

Op = tuple[str, Callable[[], None]]
"""What is launched: a name, and what it does once the stream has come to it."""


class FakeStream:
    """What is launched runs later, in order. launched: the names, in order.

    Events are launched as "event": one that is captured into a graph would be lost to us.
    op_s: how long each takes.
    """

    def __init__(self) -> None:
        self.op_s = 0.0
        self.launched: list[str] = []
        self._waiting: deque[Callable[[], None]] = deque()
        self._num_done = 0
        self._graph: FakeGraph | None = None

    @property
    def num_launched(self) -> int:
        return len(self.launched)

    def launch(self, name: str, op: Callable[[], None] = lambda: None) -> None:
        if self._graph is not None:
            self._graph.ops.append((name, op))
        else:
            self.launched.append(name)
            self._waiting.append(op)

    def record(self) -> Callable[[], bool]:
        """Record an event; the result says whether the stream has come to it."""
        assert self._graph is None, "an event was recorded while a graph was captured"
        self.launch("event")
        place = self.num_launched
        return lambda: self._num_done >= place

    def run(self, until: int | None = None) -> None:
        """Do what was launched before ``until`` launches were made; all of it without."""
        end = self.num_launched if until is None else until
        while self._num_done < end:
            time.sleep(self.op_s)
            self._waiting.popleft()()
            self._num_done += 1

    @contextlib.contextmanager
    def graphs(self) -> Iterator[None]:
        """Let PyTorch's names for CUDA graphs mean those of this stream."""
        from vllm.compilation import breakable_cudagraph, cuda_graph
        from vllm.platforms import current_platform

        def new_graph() -> FakeGraph:
            return FakeGraph(self)

        @contextlib.contextmanager
        def capture(graph: FakeGraph, pool: Any = None, stream: Any = None) -> Iterator[None]:
            graph.capture_begin()
            yield
            graph.capture_end()

        with (
            patch.object(torch.cuda, "CUDAGraph", new_graph),
            patch.object(torch.cuda, "graph", capture),
            patch.object(type(current_platform), "_global_graph_pool", (0, 0)),
            patch.object(cuda_graph, "weak_ref_tensors", lambda tensors: tensors),
            patch.object(breakable_cudagraph, "weak_ref_tensors", lambda tensors: tensors),
        ):
            gc.disable()  # as vLLM has it meanwhile; it would ask a GPU for memory otherwise
            try:
                yield
            finally:
                gc.enable()


class FakeGraph:
    """``torch.cuda.CUDAGraph`` of a ``FakeStream``."""

    def __init__(self, stream: FakeStream) -> None:
        self.ops: list[Op] = []
        self._stream = stream

    def capture_begin(self, pool: Any = None) -> None:
        assert self._stream._graph is None
        self._stream._graph = self

    def capture_end(self) -> None:
        self._stream._graph = None

    def replay(self) -> None:
        for name, op in self.ops:
            self._stream.launch(name, op)

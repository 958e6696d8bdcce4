"""On which stream the ops run, and how it is known that they are done; CUDA is a stand-in here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from vllm_pd_plugin.packing import streams
from vllm_pd_plugin.packing.streams import AtOnce, OwnStream, stream_of


class FakeCuda:
    """What is read of ``torch.cuda``: what was done, in its order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.current = "the forward's"
        cuda = self

        class Stream:
            def __init__(self, device: torch.device, priority: int) -> None:
                cuda.done.append(f"stream of {device}, priority {priority}")

            @staticmethod
            def priority_range() -> tuple[int, int]:
                return (0, -5)

            def synchronize(self) -> None:
                cuda.done.append("wait for the stream")

        class Event:
            reached = False

            def record(self, stream: object) -> None:
                assert isinstance(stream, Stream)
                cuda.done.append("event")

            def query(self) -> bool:
                return self.reached

            def synchronize(self) -> None:
                cuda.done.append("wait for the event")

        self.Stream, self.Event = Stream, Event

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, "its own"
        try:
            yield
        finally:
            self.current = before

    def launch(self, name: str) -> None:
        self.done.append(f"{name} on {self.current}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    monkeypatch.setattr(streams.torch, "cuda", cuda)
    return cuda


def test_a_gpu_s_ops_have_a_stream_of_the_lowest_priority(cuda: FakeCuda) -> None:
    stream = stream_of(torch.device("cuda", 3))
    assert isinstance(stream, OwnStream)
    assert cuda.done == ["stream of cuda:3, priority 0"]


def test_an_event_follows_what_was_started_and_nothing_is_waited_for(cuda: FakeCuda) -> None:
    stream = stream_of(torch.device("cuda", 0))
    cuda.done.clear()
    with stream.entered() as coding:
        cuda.launch("pack")
        cuda.launch("encode")
    assert cuda.done == ["pack on its own", "encode on its own", "event"]
    assert cuda.current == "the forward's"
    assert not coding.is_done()
    cuda.Event.reached = True
    assert coding.is_done()
    coding.wait()
    assert cuda.done[-1] == "wait for the event"


def test_what_was_started_before_a_fault_is_over_when_the_fault_is_told(cuda: FakeCuda) -> None:
    """Its memory is given back then, and may be used for something else."""
    stream = stream_of(torch.device("cuda", 0))

    def encode() -> None:
        with stream.entered():
            cuda.launch("encode")
            raise RuntimeError("it does not fit")

    with pytest.raises(RuntimeError, match="does not fit"):
        encode()
    assert cuda.done[-2:] == ["encode on its own", "wait for the stream"]


def test_a_cpu_s_ops_are_done_when_the_call_returns() -> None:
    stream = stream_of(torch.device("cpu"))
    assert isinstance(stream, AtOnce)
    with stream.entered() as coding:
        pass
    assert coding.is_done()
    coding.wait()

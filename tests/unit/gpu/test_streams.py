"""The check of stream order, on streams that are made up: it passes where events are waited for,
and says so where its control cannot fail."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.gpu import streams
from tests.gpu.kernels import Kernels
from tests.gpu.notes import Notes

pytestmark = pytest.mark.usefixtures("one_thread")


class FakeGpu:
    """One stream's work waits until somebody waits for it.

    is_late: a forward pass writes only then; else at once.
    """

    def __init__(self, is_late: bool) -> None:
        self.is_late = is_late
        self._pending: list[Callable[[], None]] = []

    def do_late(self, work: Callable[[], None]) -> None:
        self._pending.append(work)
        if not self.is_late:
            self.catch_up()

    def catch_up(self) -> None:
        while self._pending:
            self._pending.pop(0)()


class FakeStream:
    """Of a fake GPU: whoever waits has all that was to be done late done."""

    cuda_stream = 0

    def __init__(self, gpu: FakeGpu, priority: int = 0) -> None:
        self._gpu = gpu

    def synchronize(self) -> None:
        self._gpu.catch_up()

    def wait_event(self, event: FakeEvent) -> None:
        event.query()


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def record(self, stream: FakeStream) -> None:
        """Nothing: all events of this GPU are reached together."""

    def query(self) -> bool:
        self._gpu.catch_up()
        return True


class FakeKernels:
    """Those of the CPU, and a forward pass."""

    def __init__(self, kernels: Kernels, gpu: FakeGpu) -> None:
        self._kernels = kernels
        self._gpu = gpu

    def function(self, name: str) -> Callable[..., None]:
        assert name == "pd_write_late"
        return self._write_late

    def _write_late(self, to: Any, from_: Any, words: Any, wait: Any, stream: Any) -> None:
        assert wait.value == streams.LAYER_NS
        self._gpu.do_late(lambda: ctypes.memmove(to, from_, 4 * words.value) and None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    gpu = FakeGpu(request.param)
    monkeypatch.setattr(torch.cuda, "Stream", lambda priority=0: FakeStream(gpu, priority))
    monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(gpu))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.catch_up)
    return gpu


@pytest.mark.parametrize("gpu", [True], indirect=True)
def test_ops_that_wait_are_right_and_the_control_is_not(
    gpu: FakeGpu, kernels: Kernels, notes: Notes
) -> None:
    streams.check(FakeKernels(kernels, gpu), notes, torch.device("cpu"))  # type: ignore[arg-type]
    assert notes.finish(), notes.found["failures"]
    assert notes.found["control"] == {op: [False] * streams.LAYERS for op in streams.OPS}


@pytest.mark.parametrize("gpu", [False], indirect=True)
def test_a_control_that_cannot_fail_fails_the_stage(
    gpu: FakeGpu, kernels: Kernels, notes: Notes
) -> None:
    streams.check(FakeKernels(kernels, gpu), notes, torch.device("cpu"))  # type: ignore[arg-type]
    expected = [f"the control of {op} could not be made to fail" for op in streams.OPS]
    assert notes.found["failures"] == expected


@pytest.mark.parametrize("gpu", [True], indirect=True)
def test_ops_that_do_not_wait_are_found(
    gpu: FakeGpu, kernels: Kernels, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_poll", streams._do_not_wait)
    streams.check(FakeKernels(kernels, gpu), notes, torch.device("cpu"))  # type: ignore[arg-type]
    assert not notes.finish()
    assert len(notes.found["failures"]) == 3 * len(streams.OPS)
    assert all("polled by the host" in text for text in notes.found["failures"])

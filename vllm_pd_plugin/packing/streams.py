"""Where the ops run beside the forward pass: on a GPU, on a stream of their own.

What they read is final before they start: a consumer hears of KV when the forward's stream has
come to it. What they write is used by nobody before they are done. So they need not wait for the
forward's stream, nor it for them, and the thread that starts them waits for neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch

from vllm_pd_plugin.packing.packer import Coding


class Stream(Protocol):
    """Something that ops are given to."""

    def entered(self) -> contextlib.AbstractContextManager[Coding]:
        """What is started inside is done when the ``Coding`` says so, once outside."""


class _Done:
    """What a CPU has done when the call returns."""

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        """There is nothing to wait for."""


class AtOnce:
    """A CPU's ops, which run in the call."""

    @contextlib.contextmanager
    def entered(self) -> Iterator[Coding]:
        yield _Done()


class _Event:
    """What a GPU has done when its stream has come to an event."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()

    def record(self, stream: torch.cuda.Stream) -> None:
        self._event.record(stream)

    def is_done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()


class OwnStream:
    """A GPU's ops, on a stream of the lowest priority: the forward pass comes first."""

    def __init__(self, device: torch.device) -> None:
        least, _ = torch.cuda.Stream.priority_range()
        self._stream = torch.cuda.Stream(device, priority=least)

    @contextlib.contextmanager
    def entered(self) -> Iterator[Coding]:
        event = _Event()
        try:
            with torch.cuda.stream(self._stream):
                yield event
        except BaseException:  # some of it may have been started all the same
            self._stream.synchronize()
            raise
        event.record(self._stream)


def stream_of(device: torch.device) -> Stream:
    """Return where the ops of a device's caches run."""
    return OwnStream(device) if device.type == "cuda" else AtOnce()

"""On which device the transfer thread of a rank works."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from functools import partial

import pytest

from vllm_pd_plugin.net.channel import Loop

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import torch

    from vllm_pd_plugin.edge.worker import use_device

PATIENCE_S = 10.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop("pd-transfer", lambda: None)
    yield loop
    loop.close()


def first_calls(
    loop: Loop, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, object]]:
    """Return which thread did what before the loop has made a call of ours."""
    done: list[tuple[str, object]] = []
    over = threading.Event()

    def note(what: object) -> None:
        done.append((threading.current_thread().name, what))

    monkeypatch.setattr(torch.cuda, "set_device", note)
    loop.call(partial(use_device, device))
    loop.call(lambda: note("ours"))
    loop.call(over.set)
    loop.start()
    assert over.wait(PATIENCE_S)
    return done


def test_the_thread_s_device_is_the_rank_s_before_it_does_anything(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 3)
    expected = [("pd-transfer", device), ("pd-transfer", "ours")]
    assert first_calls(loop, device, monkeypatch) == expected


def test_a_cpu_s_rank_asks_nothing_of_cuda(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_calls(loop, torch.device("cpu"), monkeypatch) == [("pd-transfer", "ours")]

"""One process opens the other's memory, in the place of NIXL."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu import transports
from tests.gpu.transports import CudaIpc, MappedTransport, SharedFiles
from vllm_pd_plugin.errors import PeerError
from vllm_pd_plugin.net.transport import ReadPlan, ReadState


def plan_of(*rows: tuple[int, int, int]) -> ReadPlan:
    """Rows of local, remote, bytes."""
    return ReadPlan(*(np.array(column, np.uint64) for column in zip(*rows, strict=True)))


class Peer:
    """Another process's memory, and what it says of it."""

    def __init__(self, folder: Path) -> None:
        files = SharedFiles(folder)
        self.memory = files.allocate(64)
        self.memory.copy_(torch.arange(64, dtype=torch.uint8))
        self.address = self.memory.data_ptr()
        self.metadata = MappedTransport(files).register([(self.address, 64)])


@pytest.fixture
def there(tmp_path: Path) -> Peer:
    return Peer(tmp_path)


@pytest.fixture
def transport(tmp_path: Path) -> MappedTransport:
    return MappedTransport(SharedFiles(tmp_path))


def test_a_read_copies_what_was_asked_for_and_nothing_else(
    transport: MappedTransport, there: Peer
) -> None:
    here = torch.zeros(64, dtype=torch.uint8)
    peer, base = transport.add_peer(there.metadata), here.data_ptr()
    rows = (base + 8, there.address + 2, 3), (base, there.address + 60, 4)
    handle = transport.post_read(peer, plan_of(*rows))
    states = [transport.poll_read(handle) for _ in range(2)]
    assert states == [ReadState.PENDING, ReadState.DONE]
    expected = torch.zeros(64, dtype=torch.uint8)
    expected[8:11], expected[:4] = torch.tensor([2, 3, 4]), torch.tensor([60, 61, 62, 63])
    assert torch.equal(here, expected)
    transport.release_read(handle)
    transport.close()


def test_what_is_written_later_is_seen(transport: MappedTransport, there: Peer) -> None:
    here, peer = torch.zeros(4, dtype=torch.uint8), transport.add_peer(there.metadata)
    there.memory[:4] = 9
    handle = transport.post_read(peer, plan_of((here.data_ptr(), there.address, 4)))
    assert transport.poll_read(handle) is ReadState.DONE
    assert here.tolist() == [9] * 4


@pytest.mark.parametrize(("offset", "num_bytes"), [(-1, 4), (61, 4), (0, 65)])
def test_a_read_outside_of_the_peer_s_memory_is_refused(
    transport: MappedTransport, there: Peer, offset: int, num_bytes: int
) -> None:
    peer = transport.add_peer(there.metadata)
    with pytest.raises(PeerError, match="the peer has no"):
        transport.post_read(peer, plan_of((1, there.address + offset, num_bytes)))


# --- a GPU's memory, with a driver that is made up -------------------------------------------

BASE, THEIRS = 0x1000, 0x7000
"""Of an allocation here, and of a peer's as it was opened here."""


class FakeDriver:
    """calls: which functions of the library were called, with numbers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def function(self, name: str) -> Callable[..., None]:
        return getattr(self, name)

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: Any) -> int:
        base._obj.value, size._obj.value = BASE, 0x1000
        return 0 if BASE <= address.value < BASE + 0x1000 else 1

    def pd_export(self, base: Any, handle: Any) -> None:
        assert base.value == BASE
        handle.raw = bytes(range(64))

    def pd_open(self, handle: bytes, base: Any) -> None:
        assert handle == bytes(range(64))
        self.calls.append(("open",))
        base._obj.value = THEIRS

    def pd_close(self, base: Any) -> None:
        self.calls.append(("close", base.value))

    def pd_copy(self, to: Any, from_: Any, sizes: Any, count: Any, stream: Any) -> None:
        columns = (
            (ctypes.c_uint64 * count.value).from_address(p.value) for p in (to, from_, sizes)
        )
        self.calls.append(("copy", *map(tuple, zip(*columns, strict=True))))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setattr(transports.ctypes, "CDLL", lambda name: driver)
    stream = SimpleNamespace(cuda_stream=5, synchronize=lambda: driver.calls.append(("drain",)))
    event = SimpleNamespace(record=lambda stream: None, query=lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    return driver


def test_an_allocation_is_opened_once_and_addresses_lead_into_it(driver: FakeDriver) -> None:
    producer = MappedTransport(CudaIpc(driver))  # type: ignore[arg-type]
    metadata = producer.register([(BASE + 0x10, 0x20), (BASE + 0x100, 0x40)])
    consumer = MappedTransport(CudaIpc(driver))  # type: ignore[arg-type]
    peer = consumer.add_peer(metadata)
    handle = consumer.post_read(peer, plan_of((1, BASE + 0x18, 8), (2, BASE + 0x120, 0x20)))
    assert consumer.poll_read(handle) is ReadState.DONE
    consumer.remove_peer(peer)
    assert driver.calls == [
        ("open",),
        ("copy", (1, THEIRS + 0x18, 8), (2, THEIRS + 0x120, 0x20)),
        ("drain",),
        ("close", THEIRS),
    ]


def test_memory_that_the_driver_does_not_know_is_not_exported(driver: FakeDriver) -> None:
    transport = MappedTransport(CudaIpc(driver))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="cuMemGetAddressRange: error 1"):
        transport.register([(BASE - 1, 4)])

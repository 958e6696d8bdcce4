"""Real NIXL between two processes: what the rest of the package relies on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np
import pytest
from numpy.typing import NDArray

from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.net.transport import ReadPlan, ReadState, Transport

MEMORY_BYTES = 64 * 2**20
LIMIT_S = 30.0


def serve(pipe: Connection, environ: dict[str, str]) -> None:
    """Be read from: all ones, until told to stop."""
    os.environ.update(environ)
    from vllm_pd_plugin.net.nixl_transport import NixlTransport

    memory = np.ones(MEMORY_BYTES, np.uint8)
    transport = NixlTransport("DRAM", 0)
    pipe.send((transport.register([(memory.ctypes.data, MEMORY_BYTES)]), memory.ctypes.data))
    while not pipe.poll(0.002):
        transport.progress()


def read_and_lose_the_peer(pipe: Connection, environ: dict[str, str], fate: str) -> None:
    """Lose the peer in the middle of a read; report what is written after `remove_peer`."""
    os.environ.update(environ)
    from vllm_pd_plugin.net.nixl_transport import NixlTransport

    metadata, address, pid = pipe.recv()
    memory = np.zeros(MEMORY_BYTES, np.uint8)
    transport = NixlTransport("DRAM", 0)
    transport.register([(memory.ctypes.data, MEMORY_BYTES)])
    peer = transport.add_peer(metadata)
    small = plan_of(memory, address, 4096)
    long = plan_of(memory, address, MEMORY_BYTES, times=4)  # not over when the peer is lost
    handle = transport.post_read(peer, small)
    assert wait_for(transport, handle) is ReadState.DONE
    assert memory[:4096].all()
    transport.release_read(handle)

    handle = transport.post_read(peer, long)
    state = transport.poll_read(handle)
    os.kill(pid, signal.SIGSTOP if fate == "stopped" else signal.SIGKILL)
    if fate == "killed":
        state = wait_for(transport, handle)
    transport.remove_peer(peer)
    transport.release_read(handle)
    memory[:] = 0
    os.kill(pid, signal.SIGCONT)
    until = time.monotonic() + 2
    while time.monotonic() < until:
        transport.progress()
        time.sleep(0.01)
    transport.close()
    pipe.send((state, int(memory.sum())))


def plan_of(memory: NDArray[np.uint8], address: int, size: int, times: int = 1) -> ReadPlan:
    columns = (memory.ctypes.data, address, size)
    return ReadPlan(*(np.array([column] * times, np.uint64) for column in columns))


def wait_for(transport: Transport, handle: int) -> ReadState:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        state = transport.poll_read(handle)  # type: ignore[arg-type]
        if state is not ReadState.PENDING:
            return state
        time.sleep(0.0005)
    raise TimeoutError


@contextmanager
def process(target: object, *arguments: object) -> Iterator[tuple[int, Connection]]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=target, args=(theirs, *arguments))  # type: ignore[arg-type]
    child.start()
    theirs.close()
    try:
        assert child.pid is not None
        yield child.pid, ours
    finally:
        child.kill()
        child.join()
        ours.close()


@pytest.mark.parametrize("fate", ["killed", "stopped"])
@pytest.mark.parametrize("wire", ["tcp,self", "all"])
def test_nothing_is_written_once_a_peer_is_removed_in_the_middle_of_a_read(
    wire: str, fate: str
) -> None:
    environ = {"UCX_TLS": wire, "UCX_LOG_LEVEL": "fatal"}
    with (
        process(serve, environ) as (serving_pid, serving),
        process(read_and_lose_the_peer, environ, fate) as (_, reading),
    ):
        assert serving.poll(LIMIT_S)
        metadata, address = serving.recv()
        reading.send((metadata, address, serving_pid))
        assert reading.poll(2 * LIMIT_S)
        state, written = reading.recv()
    assert written == 0
    if wire == "tcp,self":  # over shared memory one side reads it all by itself, at once
        assert state is (ReadState.FAILED if fate == "killed" else ReadState.PENDING)


def test_what_fails_of_our_own_is_not_said_of_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_pd_plugin.net.nixl_transport import NixlTransport

    def fail() -> None:
        raise RuntimeError("no locked memory")

    transport = NixlTransport("DRAM", 0)
    memory = np.ones(4096, np.uint8)
    metadata = transport.register([(memory.ctypes.data, memory.nbytes)])
    with pytest.raises(PeerError) as theirs:
        transport.add_peer(b"nonsense")
    assert theirs.value.reason is Reason.PEER_INCOMPATIBLE
    with monkeypatch.context() as patched:
        patched.setattr(transport, "_new_agent", fail)
        transport.add_peer(metadata)  # with the one that was made before
        with pytest.raises(PeerError, match="no locked memory") as ours:
            transport.add_peer(metadata)
        assert ours.value.reason is Reason.NOT_REGISTERED
    transport.add_peer(metadata)  # what could not be made ahead is made now
    transport.close()


def test_a_thread_that_cannot_enter_the_device_costs_no_peer() -> None:
    from vllm_pd_plugin.net.nixl_transport import NixlTransport

    def fail() -> None:
        raise RuntimeError("no context")

    transport = NixlTransport("DRAM", 0, enter_device=fail)
    memory = np.ones(4096, np.uint8)
    metadata = transport.register([(memory.ctypes.data, memory.nbytes)])
    for _ in range(3):
        transport.add_peer(metadata)
    transport.close()


def test_agents_are_made_ahead_on_a_thread_that_has_entered_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_pd_plugin.net.nixl_transport import NixlTransport

    entered: list[int] = []
    made: list[int] = []
    transport = NixlTransport("DRAM", 0, enter_device=lambda: entered.append(threading.get_ident()))
    make = transport._new_agent

    def note() -> object:
        made.append(threading.get_ident())
        return make()

    monkeypatch.setattr(transport, "_new_agent", note)
    memory = np.ones(4096, np.uint8)
    metadata = transport.register([(memory.ctypes.data, memory.nbytes)])
    transport.add_peer(metadata)
    transport.add_peer(metadata)
    transport.close()
    here = threading.get_ident()
    assert made[:2] == [here, here], "the one that peers read through, and the first to read with"
    assert set(made[2:]) == set(entered)
    assert here not in entered
    assert len(made) >= 4


def test_who_reads_from_nobody_makes_no_agent_for_it() -> None:
    from vllm_pd_plugin.net.nixl_transport import NixlTransport

    before = set(threading.enumerate())
    transport = NixlTransport("DRAM", 0, reads=False)
    memory = np.ones(4096, np.uint8)
    transport.register([(memory.ctypes.data, memory.nbytes)])
    assert set(threading.enumerate()) <= before, "of those before one may still end"
    transport.close()

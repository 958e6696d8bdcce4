"""The data plane over NIXL. The only module that imports nixl.

NIXL's progress thread stays off (it spins a core, idle or not); the owner of the transport
drives progress through ``poll_read`` and ``progress``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import secrets
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
from nixl._api import nixl_agent, nixl_agent_config
from numpy.typing import NDArray

from vllm_pd_plugin.errors import ConfigError, PeerError, Reason
from vllm_pd_plugin.net.transport import PeerName, ReadHandle, ReadPlan, ReadState

logger = logging.getLogger(__name__)

# ruff: noqa: BLE001  (NIXL's bindings raise types that they do not export)
_MAX_HOST_READ_BYTES = 8 * 2**20
"""UCX copies what lies on its own host in the call that starts a read: some three milliseconds."""

_STATES = {"DONE": ReadState.DONE, "PROC": ReadState.PENDING}


@dataclasses.dataclass(slots=True, eq=False)
class _Remote:
    """A peer that we read from, and the agent that is used for nothing else."""

    agent: Any
    name: str
    device: int


@dataclasses.dataclass(slots=True, eq=False)
class _Read:
    remote: _Remote
    read: Any


class NixlTransport:
    """One NIXL agent (UCX backend) that peers read through, and one for each peer that we read.

    A read over TCP goes on when its peer does, even after NIXL was told to release it and to
    forget the peer (seen: 260 MB written after both). Only destroying the agent that reads ends
    it for certain; with an agent for each peer that concerns nobody else.

    To make one takes some 30 ms, and seconds where much GPU memory has to be registered. So one is
    always made ahead, on another thread: a new peer holds up nobody, unless another has just come.

    memory_kind: NIXL's name for the KV's memory, ``DRAM`` or ``VRAM``.
    device: CUDA device index; 0 for host memory.
    reads: whether it is to read from peers at all.
    enter_device: called on a thread before it makes agents.
    """

    def __init__(
        self,
        memory_kind: str,
        device: int,
        reads: bool = True,
        enter_device: Callable[[], None] = lambda: None,
    ) -> None:
        self.max_read_bytes = _MAX_HOST_READ_BYTES if memory_kind == "DRAM" else sys.maxsize
        self._memory_kind = memory_kind
        self._device = device
        self._spans: Sequence[tuple[int, int]] = ()
        self._lender: Any = None
        self._maker = ThreadPoolExecutor(1, "pd-nixl", enter_device) if reads else None
        self._spare: Future[Any] | None = None
        self._remotes: dict[PeerName, _Remote] = {}
        self._reads: dict[ReadHandle, _Read] = {}
        self._numbers = itertools.count(1)

    def register(self, spans: Sequence[tuple[int, int]]) -> bytes:
        self._spans = spans
        try:
            self._lender = self._new_agent()
        except Exception as error:
            raise ConfigError(
                f"NIXL cannot be used here: {error}; see what UCX says above, and UCX_TLS and "
                "UCX_NET_DEVICES where they are set"
            ) from error
        if self._maker is not None:
            # Not on the other thread yet: vLLM may capture CUDA graphs next, and while it does no
            # thread may do anything else with the device.
            self._spare = Future()
            self._spare.set_result(self._new_agent())
        return msgspec.msgpack.encode((self._device, self._lender.get_agent_metadata()))

    def add_peer(self, metadata: bytes, beside: PeerName | None = None) -> PeerName:
        try:
            agent = self._take_agent() if beside is None else self._remotes[beside].agent
        except Exception as error:
            text = f"NIXL cannot register this engine's own KV cache for another peer: {error}"
            raise PeerError(Reason.NOT_REGISTERED, text) from error
        try:
            device, agent_metadata = msgspec.msgpack.decode(metadata, type=tuple[int, bytes])
            name = agent.add_remote_agent(agent_metadata)
        except Exception as error:
            raise PeerError(
                Reason.PEER_INCOMPATIBLE, f"NIXL cannot use the peer's metadata: {error}"
            ) from error
        peer = PeerName(f"peer-{next(self._numbers)}")
        self._remotes[peer] = _Remote(agent, name, device)
        return peer

    def remove_peer(self, peer: PeerName) -> None:
        remote = self._remotes.pop(peer)
        for read in self._reads.values():
            if read.remote is remote:
                read.read = None
        remote.agent = None  # the last reference: its connections are closed here

    def post_read(self, peer: PeerName, plan: ReadPlan) -> ReadHandle:
        remote = self._remotes[peer]
        agent = remote.agent
        try:
            read = agent.initialize_xfer(
                "READ",
                self._descriptors(agent, plan.local, plan.num_bytes, self._device),
                self._descriptors(agent, plan.remote, plan.num_bytes, remote.device),
                remote.name,
            )
            agent.transfer(read)
        except Exception as error:
            raise PeerError(Reason.READ_FAILED, f"NIXL cannot start a read: {error}") from error
        handle = ReadHandle(next(self._numbers))
        self._reads[handle] = _Read(remote, read)
        return handle

    def poll_read(self, handle: ReadHandle) -> ReadState:
        read = self._reads[handle]
        try:
            state = read.remote.agent.check_xfer_state(read.read)
        except Exception as error:
            logger.warning("a NIXL read failed: %s", error)
            return ReadState.FAILED
        return _STATES.get(state, ReadState.FAILED)

    def release_read(self, handle: ReadHandle) -> None:
        read = self._reads.pop(handle)
        if read.read is None:  # gone with its peer
            return
        try:
            read.remote.agent.release_xfer_handle(read.read)
        except Exception:
            logger.warning("NIXL could not release a read", exc_info=True)

    def progress(self) -> None:
        self._lender.get_new_notifs()

    def close(self) -> None:
        for peer in list(self._remotes):
            self.remove_peer(peer)
        self._lender = None
        if self._maker is not None:
            self._maker.shutdown(wait=False, cancel_futures=True)
        self._spare = None

    def _make_spare(self) -> None:
        if self._maker is not None:
            with contextlib.suppress(BrokenExecutor):  # the thread could not enter the device
                self._spare = self._maker.submit(self._new_agent)

    def _take_agent(self) -> Any:
        """Return the agent that was made ahead, and have another one made."""
        spare, self._spare = self._spare, None
        self._make_spare()
        if spare is not None:
            try:
                return spare.result()
            except Exception as error:  # at that time; it may go well now
                logger.warning("NIXL could not make an agent ahead: %s", error)
        return self._new_agent()

    def _new_agent(self) -> Any:
        """Return an agent that knows our memory."""
        config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        agent = nixl_agent(f"pd-{secrets.token_hex(8)}", config)
        rows = [(address, size, self._device, "") for address, size in self._spans]
        if rows:
            agent.register_memory(agent.get_reg_descs(rows, self._memory_kind))
        return agent

    def _descriptors(
        self,
        agent: Any,
        addresses: NDArray[np.uint64],
        num_bytes: NDArray[np.uint64],
        device: int,
    ) -> Any:
        rows = np.empty((len(addresses), 3), dtype=np.uint64)
        rows[:, 0], rows[:, 1], rows[:, 2] = addresses, num_bytes, device
        return agent.get_xfer_descs(rows, self._memory_kind)

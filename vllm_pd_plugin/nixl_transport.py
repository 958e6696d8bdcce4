"""The data plane over NIXL. The only module that imports nixl.

NIXL's progress thread stays off (it spins a core, idle or not); the owner of the transport
drives progress through ``poll_read`` and ``progress``.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from nixl._api import nixl_agent, nixl_agent_config
from numpy.typing import NDArray

from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.plan import ReadPlan
from vllm_pd_plugin.transport import PeerName, ReadHandle, ReadState

logger = logging.getLogger(__name__)

# ruff: noqa: BLE001  (NIXL's bindings raise types that they do not export)
_STATES = {"DONE": ReadState.DONE, "PROC": ReadState.PENDING}


class NixlTransport:
    """One NIXL agent with the UCX backend.

    memory_kind: NIXL's name for the KV's memory, ``DRAM`` or ``VRAM``.
    device: CUDA device index; 0 for host memory.
    """

    def __init__(self, memory_kind: str, device: int) -> None:
        self._memory_kind = memory_kind
        self._device = device
        config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent = nixl_agent(f"pd-{secrets.token_hex(8)}", config)
        self._registered: Any = None
        self._reads: dict[ReadHandle, Any] = {}
        self._peer_devices: dict[PeerName, int] = {}
        self._numbers = itertools.count(1)

    def register(self, spans: Sequence[tuple[int, int]]) -> bytes:
        rows = [(address, size, self._device, "") for address, size in spans]
        descriptors = self._agent.get_reg_descs(rows, self._memory_kind)
        self._registered = self._agent.register_memory(descriptors)
        return msgspec.msgpack.encode((self._device, self._agent.get_agent_metadata()))

    def add_peer(self, metadata: bytes) -> PeerName:
        try:
            device, agent_metadata = msgspec.msgpack.decode(metadata, type=tuple[int, bytes])
            name = self._agent.add_remote_agent(agent_metadata)
        except Exception as error:
            raise PeerError(
                Reason.PEER_INCOMPATIBLE, f"NIXL cannot use the peer's metadata: {error}"
            ) from error
        peer = PeerName(name.decode() if isinstance(name, bytes) else name)
        self._peer_devices[peer] = device
        return peer

    def remove_peer(self, peer: PeerName) -> None:
        self._peer_devices.pop(peer, None)
        try:
            self._agent.remove_remote_agent(peer)
        except Exception:
            logger.warning("NIXL could not disconnect from %s", peer, exc_info=True)

    def post_read(self, peer: PeerName, plan: ReadPlan) -> ReadHandle:
        try:
            read = self._agent.initialize_xfer(
                "READ",
                self._descriptors(plan.local, plan.num_bytes, self._device),
                self._descriptors(plan.remote, plan.num_bytes, self._peer_devices[peer]),
                peer,
            )
            state = self._agent.transfer(read)
        except Exception as error:
            raise PeerError(Reason.READ_FAILED, f"NIXL cannot start a read: {error}") from error
        handle = ReadHandle(next(self._numbers))
        self._reads[handle] = read
        if state == "ERR":
            self.release_read(handle)
            raise PeerError(Reason.READ_FAILED, "NIXL refused to start a read")
        return handle

    def poll_read(self, handle: ReadHandle) -> ReadState:
        try:
            state = self._agent.check_xfer_state(self._reads[handle])
        except Exception:
            logger.warning("a NIXL read failed", exc_info=True)
            return ReadState.FAILED
        return _STATES.get(state, ReadState.FAILED)

    def release_read(self, handle: ReadHandle) -> None:
        read = self._reads.pop(handle)
        try:
            self._agent.release_xfer_handle(read)
        except Exception:
            logger.warning("NIXL could not release a read", exc_info=True)

    def progress(self) -> None:
        self._agent.get_new_notifs()

    def close(self) -> None:
        for handle in list(self._reads):
            self.release_read(handle)
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
            self._registered = None

    def _descriptors(
        self, addresses: NDArray[np.uint64], num_bytes: NDArray[np.uint64], device: int
    ) -> Any:
        rows = np.empty((len(addresses), 3), dtype=np.uint64)
        rows[:, 0], rows[:, 1], rows[:, 2] = addresses, num_bytes, device
        return self._agent.get_xfer_descs(rows, self._memory_kind)

"""The data plane between two processes of one machine, in the place of NIXL: each opens the other's
memory, and copies from it.

What memory is opened, and how it is copied, is a ``Memory``: a GPU's over CUDA IPC, or files that
both processes map, for the stand-in.
"""

from __future__ import annotations

import base64
import ctypes
import dataclasses
import itertools
import json
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tests.gpu.kernels import Kernels, say_wrong
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.net.transport import PeerName, ReadHandle, ReadPlan, ReadState

IsDone = Callable[[], bool]


class Memory(Protocol):
    """Memory of one process that another can open."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return uint8, one dimension."""

    def export(self, address: int) -> dict[str, Any]:
        """Return what another process needs to open what is at an address; for JSON."""

    def open(self, exported: dict[str, Any]) -> int:
        """Return at which address of this process that memory is."""

    def close(self, exported: dict[str, Any]) -> None:
        """Undo one ``open``."""

    def copy(self, plan: ReadPlan) -> IsDone:
        """Begin to copy; ``plan.remote`` are addresses of this process."""

    def drain(self) -> None:
        """Return when nothing that was begun writes any more."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Peer:
    """What another process has registered: address there, bytes, address here."""

    spans: tuple[tuple[int, int, int], ...]
    exported: tuple[dict[str, Any], ...]

    def here(self, address: int, num_bytes: int) -> int:
        for there, length, here in self.spans:
            if there <= address and address + num_bytes <= there + length:
                return here + address - there
        raise PeerError(Reason.READ_FAILED, f"the peer has no {num_bytes} bytes at {address:#x}")


class MappedTransport:
    """See ``net.transport.Transport``."""

    max_read_bytes = sys.maxsize

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._peers: dict[PeerName, _Peer] = {}
        self._reads: dict[ReadHandle, IsDone] = {}
        self._numbers = itertools.count(1)

    def register(self, spans: Sequence[tuple[int, int]]) -> bytes:
        rows = [(address, size, self._memory.export(address)) for address, size in spans]
        return json.dumps(rows).encode()

    def add_peer(self, metadata: bytes, beside: PeerName | None = None) -> PeerName:
        rows = json.loads(metadata)
        spans = tuple((there, size, self._memory.open(how)) for there, size, how in rows)
        name = PeerName(f"peer-{next(self._numbers)}")
        self._peers[name] = _Peer(spans, tuple(how for _, _, how in rows))
        return name

    def remove_peer(self, peer: PeerName) -> None:
        self._memory.drain()
        for exported in self._peers.pop(peer).exported:
            self._memory.close(exported)

    def post_read(self, peer: PeerName, plan: ReadPlan) -> ReadHandle:
        remote = plan.remote.copy()
        for index, (address, size) in enumerate(zip(plan.remote, plan.num_bytes, strict=True)):
            remote[index] = self._peers[peer].here(int(address), int(size))
        handle = ReadHandle(next(self._numbers))
        self._reads[handle] = self._memory.copy(dataclasses.replace(plan, remote=remote))
        return handle

    def poll_read(self, handle: ReadHandle) -> ReadState:
        return ReadState.DONE if self._reads[handle]() else ReadState.PENDING

    def release_read(self, handle: ReadHandle) -> None:
        del self._reads[handle]

    def progress(self) -> None:
        """Nothing: whoever reads does all the work."""

    def close(self) -> None:
        for peer in list(self._peers):
            self.remove_peer(peer)


class SharedFiles:
    """Memory that lies in files of a folder, which both processes map."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._files: dict[int, tuple[str, int]] = {}
        self._opened: dict[str, torch.Tensor] = {}

    def allocate(self, num_bytes: int) -> torch.Tensor:
        path = str(self._folder / secrets.token_hex(8))
        tensor = torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
        self._files[tensor.data_ptr()] = (path, num_bytes)
        return tensor

    def export(self, address: int) -> dict[str, Any]:
        path, num_bytes = self._files[address]
        return {"path": path, "num_bytes": num_bytes}

    def open(self, exported: dict[str, Any]) -> int:
        path = exported["path"]
        if path not in self._opened:
            self._opened[path] = torch.from_file(
                path, shared=True, size=exported["num_bytes"], dtype=torch.uint8
            )
        return self._opened[path].data_ptr()

    def close(self, exported: dict[str, Any]) -> None:
        self._opened.pop(exported["path"], None)

    def copy(self, plan: ReadPlan) -> IsDone:
        columns = (plan.local, plan.remote, plan.num_bytes)
        rows = list(zip(*(column.tolist() for column in columns), strict=True))

        def move_one() -> bool:
            """Each poll moves a stretch: a read takes its time here, too."""
            if rows:
                ctypes.memmove(*rows.pop())
            return not rows

        return move_one

    def drain(self) -> None:
        """Nothing is written between two polls."""


class CudaIpc:
    """A GPU's memory. An allocation is opened as a whole; PyTorch puts several tensors into one."""

    def __init__(self, kernels: Kernels) -> None:
        self._export = kernels.function("pd_export")
        self._open = kernels.function("pd_open")
        self._close = kernels.function("pd_close")
        self._copy = kernels.function("pd_copy")
        self._opened: dict[str, tuple[int, int]] = {}
        """By handle: the address, and how often it is open."""
        self._stream = torch.cuda.Stream()  # PyTorch has loaded the driver then
        self._range = ctypes.CDLL("libcuda.so.1").cuMemGetAddressRange_v2

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cuda")

    def export(self, address: int) -> dict[str, Any]:
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        status = self._range(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        if status:
            raise RuntimeError(f"cuMemGetAddressRange: error {status}")
        handle = ctypes.create_string_buffer(64)
        say_wrong(self._export(ctypes.c_void_p(base.value), handle))
        text = base64.b64encode(handle.raw).decode()
        return {"handle": text, "offset": address - base.value}

    def open(self, exported: dict[str, Any]) -> int:
        text = exported["handle"]
        base, times = self._opened.get(text, (0, 0))
        if not times:
            found = ctypes.c_void_p()
            say_wrong(self._open(base64.b64decode(text), ctypes.byref(found)))
            base = int(found.value or 0)
        self._opened[text] = (base, times + 1)
        return base + int(exported["offset"])

    def close(self, exported: dict[str, Any]) -> None:
        text = exported["handle"]
        base, times = self._opened.pop(text)
        if times > 1:
            self._opened[text] = (base, times - 1)
        else:
            say_wrong(self._close(ctypes.c_void_p(base)))

    def copy(self, plan: ReadPlan) -> IsDone:
        columns = (
            ctypes.c_void_p(c.ctypes.data) for c in (plan.local, plan.remote, plan.num_bytes)
        )
        count = ctypes.c_int64(plan.num_descriptors)
        say_wrong(self._copy(*columns, count, ctypes.c_void_p(self._stream.cuda_stream)))
        event = torch.cuda.Event()
        event.record(self._stream)
        return lambda: bool(event.query())

    def drain(self) -> None:
        self._stream.synchronize()

"""Stage: a handoff of a fake KV cache between two processes, through the real planes.

What is real: control channel, leases, announcements, packing, digests, fetches, commits, and the
kernels. In the place of NIXL each process opens the other's memory (``transports``); where NIXL is
there, the same is done over it.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from tests.gpu.build import library_in
from tests.gpu.kernels import Kernels, stand_for_extension
from tests.gpu.notes import Notes, NotTriedError
from tests.gpu.stage import in_words

NEEDED = ("numpy", "msgspec", "zmq")
_JOIN_S = 10.0
_registered: list[object] = []
"""Kept for as long as the process lives: the ops are called."""


def run(notes: Notes) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise NotTriedError(
            f"no {', '.join(missing)}: `python -m tests.gpu.site --python {python}`, run where "
            "there is a network, brings it along"
        )
    kernels = _kernels(library_in(notes.work), notes.device)
    _try(notes, kernels, "opened memory")
    if importlib.util.find_spec("nixl") is None:
        notes.skip("handoffs over NIXL", "nixl is not there")
    else:
        _try(notes, kernels, "NIXL")


def _try(notes: Notes, kernels: Kernels, via: str) -> None:
    """Hand off in every way; where one transport fails, the other is tried all the same."""
    from tests.gpu import exchange

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    producer = context.Process(
        target=_produce, args=(theirs, notes.work, notes.device, via), daemon=True
    )
    producer.start()
    theirs.close()
    try:
        exchange.consume(ours, exchange.Side(kernels, notes.work, notes.device, via), notes)
    except EOFError:
        notes.check(False, f"over {via}: the producer has died; its last words are in the log")
    except Exception as error:  # noqa: BLE001  (it is this transport's outcome)
        traceback.print_exc()
        notes.check(False, f"over {via}: {in_words(error)}")
    finally:
        ours.close()
        producer.join(_JOIN_S)
        producer.kill()
        producer.join()


def _produce(connection: Connection, work: Path, device: str, via: str) -> None:
    kernels = _kernels(library_in(work), device)
    from tests.gpu import exchange

    exchange.produce(connection, exchange.Side(kernels, work, device, via))


def _kernels(library: Path, device: str) -> Kernels:
    """Return the kernels, which the planes of this process use from now on."""
    import torch

    torch.set_num_threads(1)  # the planes have threads of their own
    kernels = Kernels(library)
    _registered.append(stand_for_extension(kernels, device))
    return kernels

"""Which engines a frontend is to use: what the operator says, kept where all its workers see it.

Each worker process has a pool of its own. They agree through a small file that whoever is asked to
change something replaces as a whole, and that everybody looks at a few times a second. One worker
alone needs no file.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.routing.choice import EngineKey, Role


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine that is to be used. drain_until: when what is left on it goes on elsewhere, in
    seconds since the epoch; None as long as it is to take requests. generation: KV goes only
    between engines of the same."""

    role: Role
    drain_until: float | None = None
    generation: str = ""


Engines = dict[EngineKey, Wanted]


@dataclasses.dataclass(slots=True)
class Membership:
    """The engines that are wanted. path: the file that other workers see, if there are any."""

    engines: Engines
    path: Path | None = None
    _seen: tuple[int, int] = (0, 0)

    @classmethod
    def open(cls, engines: Engines, path: Path | None) -> Membership:
        """Begin with what the file says, or with these if there is none yet."""
        membership = cls(engines, path)
        if path is not None:
            with membership._locked():
                if path.exists():
                    membership.look()
                else:
                    membership._write()
        return membership

    def add(self, url: EngineKey, role: Role) -> None:
        """Use an engine; one that drains takes requests again."""
        self._change(lambda engines: engines.update({url: Wanted(role)}))

    def drain(self, url: EngineKey, timeout_s: float) -> None:
        """Give an engine nothing new. Raises KeyError if it is not there."""
        until = time.time() + timeout_s
        self._change(lambda engines: engines.update({url: Wanted(engines[url].role, until)}))

    def remove(self, url: EngineKey) -> None:
        """Do not use an engine any more. Raises KeyError if it is not there."""

        def leave_out(engines: Engines) -> None:
            del engines[url]

        self._change(leave_out)

    def look(self) -> bool:
        """Read what others have changed; say whether there was something.

        Raises:
            ConfigError: the file is not what it should be.
        """
        if self.path is None:
            return False
        status = self.path.stat()
        seen = (status.st_mtime_ns, status.st_ino)
        if seen == self._seen:
            return False
        try:
            self.engines = msgspec.json.decode(self.path.read_bytes(), type=Engines)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{self.path} is not a list of engines: {error}") from error
        self._seen = seen
        return True

    def _change(self, change: Callable[[Engines], None]) -> None:
        if self.path is None:
            change(self.engines)
            return
        with self._locked():
            self.look()
            change(self.engines)
            self._write()

    def _write(self) -> None:
        assert self.path is not None
        draft = self.path.with_suffix(f".{os.getpid()}")
        draft.write_bytes(msgspec.json.encode(self.engines))
        draft.replace(self.path)
        status = self.path.stat()
        self._seen = (status.st_mtime_ns, status.st_ino)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        assert self.path is not None
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

"""Shows, while ``vllm-pd up`` starts, how far each engine is."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from vllm_pd_plugin.frontend.processes.stages import Progress, Stage
from vllm_pd_plugin.frontend.processes.supervisor import LocalProcess

_LOOK_S = 0.25


class Follower:
    """Reads a log as it grows, from where it ends now: an earlier engine may have written it."""

    def __init__(self, path: Path) -> None:
        self.progress = Progress()
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._line = b""

    def look(self) -> bool:
        """Read what is new; say whether the engine is further than before."""
        before = self.progress
        try:
            with self._path.open("rb") as log:
                log.seek(self._offset)
                new = log.read()
        except OSError:
            return False  # not there yet, or not any more: it is only shown
        self._offset += len(new)
        *lines, self._line = (self._line + new).split(b"\n")
        for line in lines:
            self.progress = self.progress.after(line.decode(errors="replace"))
        return self.progress != before


@dataclasses.dataclass(slots=True)
class _Shown:
    """An engine's line. at: when it came to where it is."""

    name: str
    follower: Follower
    at: float

    def line(self, began_at: float) -> str:
        return f"[{self.at - began_at:5.0f} s] {self.name}: {self.follower.progress}"


class Board:
    """The engines' lines; a terminal has one for each that is written anew, others get a line for
    each change.

    clock: in seconds.
    """

    def __init__(
        self, processes: Iterable[LocalProcess], stream: TextIO, clock: Callable[[], float]
    ) -> None:
        self._clock = clock
        self._began_at = now = clock()
        logs = [(each.name, each.log) for each in processes]
        self._shown = [_Shown(name, Follower(log), now) for name, log in logs if log is not None]
        self._stream = stream
        self._console = Console(file=stream, highlight=False)
        self._live = Live(
            console=self._console, auto_refresh=False, redirect_stdout=sys.stdout.isatty()
        )

    def begin(self) -> None:
        if self._console.is_terminal:
            self._live.start()
        self._show(self._shown)

    def look(self) -> None:
        """Show what has changed; on a terminal, how long it has been, too."""
        changed = [each for each in self._shown if each.follower.look() or self._is_ticking(each)]
        for each in changed:
            each.at = self._clock()
        if changed:
            self._show(changed)

    def end(self) -> None:
        self.look()
        self._live.stop()

    def _is_ticking(self, shown: _Shown) -> bool:
        return self._console.is_terminal and shown.follower.progress.stage is not Stage.READY

    def _show(self, changed: Sequence[_Shown]) -> None:
        if self._console.is_terminal:
            lines = [each.line(self._began_at) for each in self._shown]
            self._live.update(Text("\n".join(lines)), refresh=True)
            return
        for each in changed:
            print(each.line(self._began_at), file=self._stream, flush=True)


@asynccontextmanager
async def showing(processes: Sequence[LocalProcess]) -> AsyncIterator[None]:
    """Show how far these are, as long as this lasts."""
    if not processes:
        yield
        return
    board = Board(processes, sys.stderr, asyncio.get_running_loop().time)
    handlers = [each for each in logging.getLogger("vllm").handlers if _writes_to_stdout(each)]
    board.begin()
    _write_to_stdout(handlers)  # what is logged meanwhile comes above the board
    task = asyncio.create_task(_keep_looking(board), name="progress")
    try:
        yield
    finally:
        task.cancel()
        board.end()
        _write_to_stdout(handlers)


async def _keep_looking(board: Board) -> None:
    while True:
        await asyncio.sleep(_LOOK_S)
        board.look()


def _writes_to_stdout(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout


def _write_to_stdout(handlers: Iterable[logging.Handler]) -> None:
    """Let them write to what standard output is now: a terminal's board takes its place."""
    for handler in handlers:
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(sys.stdout)

"""How far starting engines are, as ``vllm-pd up`` shows it."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
import warnings
from pathlib import Path

import pytest

from tests.fakes.clock import FakeClock
from tests.fakes.links import SkippingLoop

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.processes.progress import Board, Follower, showing
    from vllm_pd_plugin.frontend.processes.supervisor import LocalProcess

CORE = "INFO [core.py:133] Initializing a V1 LLM engine (v0.32.0)\n"
WEIGHTS = "INFO [model_runner.py:68] Starting to load model M...\n"
READY = "INFO:     Application startup complete.\n"


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def processes(tmp_path: Path, *names: str) -> list[LocalProcess]:
    return [LocalProcess(name, (), {}, tmp_path / f"{name}.log") for name in names]


def write(process: LocalProcess, text: str) -> None:
    assert process.log is not None
    with process.log.open("a") as log:
        log.write(text)


def test_each_change_is_a_line_with_the_seconds_since_the_start(tmp_path: Path) -> None:
    first, second = engines = processes(tmp_path, "prefill-0", "decode-0")
    stream, clock = io.StringIO(), FakeClock()
    board = Board(engines, stream, clock)
    board.begin()
    clock.advance(7)
    write(first, CORE)
    board.look()
    clock.advance(2)
    board.look()
    write(first, WEIGHTS)
    write(second, CORE + WEIGHTS)
    board.end()
    assert stream.getvalue().splitlines() == [
        "[    0 s] prefill-0: starts, imports",
        "[    0 s] decode-0: starts, imports",
        "[    7 s] prefill-0: starts its core, imports",
        "[    9 s] prefill-0: loads weights",
        "[    9 s] decode-0: loads weights",
    ]


def test_a_line_that_is_half_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    (engine,) = processes(tmp_path, "decode-0")
    assert engine.log is not None
    follower = Follower(engine.log)
    write(engine, CORE[:40])
    assert not follower.look()
    write(engine, CORE[40:])
    assert follower.look()


def test_what_an_earlier_engine_has_left_in_the_log_does_not_count(tmp_path: Path) -> None:
    (engine,) = processes(tmp_path, "decode-0")
    write(engine, CORE + WEIGHTS + READY)
    assert engine.log is not None
    follower = Follower(engine.log)
    assert not follower.look()
    write(engine, CORE)
    assert follower.look()
    assert str(follower.progress) == "starts its core, imports"


def test_a_terminal_has_one_line_for_each_engine_which_ticks_until_it_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    first, _ = engines = processes(tmp_path, "prefill-0", "decode-0")
    stream, clock = Terminal(), FakeClock()
    board = Board(engines, stream, clock)
    board.begin()
    write(first, READY)
    board.look()
    clock.advance(5)
    stream.truncate(0)
    board.look()
    shown = stream.getvalue()
    board.end()
    assert "\x1b[1A" in shown  # over the line before
    assert "[    0 s] prefill-0: ready" in shown
    assert "[    5 s] decode-0: starts, imports" in shown


def test_engines_are_looked_at_until_all_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (engine,) = engines = processes(tmp_path, "decode-0")

    async def start() -> None:
        async with showing(engines):
            write(engine, CORE)
            await asyncio.sleep(10)
            write(engine, READY)
        write(engine, WEIGHTS)
        await asyncio.sleep(10)

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(start())
    assert capsys.readouterr().err.splitlines() == [
        "[    0 s] decode-0: starts, imports",
        "[    0 s] decode-0: starts its core, imports",
        "[   10 s] decode-0: ready",
    ]


def test_what_is_logged_meanwhile_stands_above_the_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the board would be written over it."""
    monkeypatch.setenv("TERM", "xterm")
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    logger, handler = logging.getLogger("vllm"), logging.StreamHandler(out)
    logger.addHandler(handler)

    async def start() -> None:
        async with showing(processes(tmp_path, "decode-0")):
            handler.emit(logging.makeLogRecord({"msg": "engine is there"}))
        handler.emit(logging.makeLogRecord({"msg": "serving"}))

    try:
        with asyncio.Runner(loop_factory=SkippingLoop) as runner:
            runner.run(start())
    finally:
        logger.removeHandler(handler)
    above, _, below = err.getvalue().partition("engine is there")
    assert "starts, imports" in above
    assert "starts, imports" in below
    assert out.getvalue() == "serving\n"


def test_nothing_is_shown_where_nothing_starts(capsys: pytest.CaptureFixture[str]) -> None:
    async def start() -> None:
        async with showing([]):
            await asyncio.sleep(1)

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(start())
    assert capsys.readouterr().err == ""

"""Keeping processes up, and stopping them."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from vllm_pd_plugin.frontend.processes.supervisor import EngineStartError, LocalProcess, Supervisor


def process(name: str, code: str, log: Path | None = None) -> LocalProcess:
    return LocalProcess(name, (sys.executable, "-c", code), {}, log)


def test_one_that_ends_before_all_were_up_ends_everything(tmp_path: Path) -> None:
    async def run() -> None:
        log = tmp_path / "log"
        supervisor = Supervisor([process("p", "print('out of memory'); raise SystemExit(3)", log)])
        supervisor.start()
        with pytest.raises(EngineStartError, match=r"p ended with status 3:\nout of memory"):
            await asyncio.wait_for(supervisor.failure, 20)
        await supervisor.stop()

    asyncio.run(run())


def test_one_that_ends_later_is_started_again(tmp_path: Path) -> None:
    marks = tmp_path / "marks"

    async def run() -> None:
        code = f"open({str(marks)!r}, 'a').write('x')"
        supervisor = Supervisor([process("p", code)])
        supervisor.all_are_up()
        supervisor.start()
        async with asyncio.timeout(30):
            while not marks.exists() or len(marks.read_text()) < 2:
                await asyncio.sleep(0.05)
        await supervisor.stop()

    asyncio.run(run())


def test_all_are_stopped_and_those_that_will_not_are_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"open({str(ready)!r}, 'w'); time.sleep(60)"
    )

    async def run() -> None:
        supervisor = Supervisor([process("deaf", deaf), process("p", "input()")], stop_s=0.5)
        supervisor.all_are_up()
        supervisor.start()
        async with asyncio.timeout(20):
            while not ready.exists():
                await asyncio.sleep(0.05)
        await asyncio.wait_for(supervisor.stop(), 20)

    asyncio.run(run())

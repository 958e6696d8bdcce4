"""A frontend's end of the real channel: real sockets on loopback, on asyncio's own loop."""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from vllm_pd_plugin.net.async_channel import (
    DESCRIPTORS_PER_DEALER,
    AsyncDealer,
    Context,
    close_context,
    new_context,
)
from vllm_pd_plugin.net.channel import CurveKeys, Listener, Loop

KEYS = CurveKeys.derive("the key of this cluster")
OTHER_KEYS = CurveKeys.derive("the key of another cluster")
PATIENCE_S = 20.0
"""How long something may take that is to happen; nothing waits so long when all is well."""


class Engine:
    """Answers ``b"hello"`` with ``[b"re", b"hello"]``, and ``[b"many", n]`` with n messages."""

    def __init__(self, keys: CurveKeys | None) -> None:
        self.has_said_many = threading.Event()
        self.loop = Loop("test", lambda: None)
        self.listener = Listener(self.loop, ("127.0.0.1", 0), keys, self._receive)
        self.address = ("127.0.0.1", self.listener.port)
        self.loop.start()

    def _receive(self, who: bytes, frames: list[bytes]) -> None:
        if frames[0] == b"many":
            for number in range(int(frames[1])):
                self.listener.send(who, [b"%d" % number])
            self.has_said_many.set()
        else:
            self.listener.send(who, [b"re", *frames])


class Ear:
    """What a frontend hears, on its event loop."""

    def __init__(self) -> None:
        self.messages: list[list[bytes]] = []
        self.num_disconnects = 0
        self._news = asyncio.Event()

    def hear(self, frames: list[bytes]) -> None:
        self.messages.append(frames)
        self._news.set()

    def disconnected(self) -> None:
        self.num_disconnects += 1
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()


MakeEngine = Callable[[CurveKeys | None], Engine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(keys: CurveKeys | None = None) -> Engine:
        engines.append(Engine(keys))
        return engines[-1]

    yield make
    for engine in engines:
        engine.loop.close()


@pytest.fixture
def context() -> Iterator[Context]:
    context = new_context()
    yield context
    close_context(context)


def dial(context: Context, engine: Engine, ear: Ear, keys: CurveKeys | None = None) -> AsyncDealer:
    return AsyncDealer(context, engine.address, keys, ear.hear, ear.disconnected)


def run(story: Coroutine[Any, Any, None]) -> None:
    """Let a story happen; no callback of the loop may fail."""

    async def tell() -> None:
        errors: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        await story
        await asyncio.to_thread(lambda: None)  # what the story has begun is done then
        assert errors == []

    asyncio.run(tell())


@pytest.mark.parametrize("keys", [None, KEYS], ids=["plain", "encrypted"])
def test_messages_go_there_and_back_in_order(
    make_engine: MakeEngine, context: Context, keys: CurveKeys | None
) -> None:
    async def story() -> None:
        ear = Ear()
        dealer = dial(context, make_engine(keys), ear, keys)
        for number in range(3):
            assert dealer.send([b"%d" % number, b"", b"x" * 100_000])
        await ear.until(lambda: len(ear.messages) == 3)
        assert ear.messages == [[b"re", b"%d" % n, b"", b"x" * 100_000] for n in range(3)]
        assert ear.num_disconnects == 0
        dealer.close()

    run(story())


def test_none_of_many_messages_is_left_lying(make_engine: MakeEngine, context: Context) -> None:
    """A descriptor tells of changes only: what came while others were read must be found too."""

    async def story() -> None:
        ear = Ear()
        dealer = dial(context, make_engine(None), ear)
        dealer.send([b"many", b"5000"])
        await ear.until(lambda: len(ear.messages) == 5000)
        assert ear.messages == [[b"%d" % number] for number in range(5000)]
        dealer.close()

    run(story())


class HeavyLoop(asyncio.SelectorEventLoop):
    """One in which time also passes as a test says."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


class Worker(Ear):
    """Needs 4 ms for each message that it hears, of the ten of a turn."""

    def hear(self, frames: list[bytes]) -> None:
        super().hear(frames)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, HeavyLoop)
        loop.ahead_s += 0.004


def run_heavy(story: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=HeavyLoop) as runner:
        runner.run(story)


def test_however_much_an_engine_says_everybody_has_a_turn(
    make_engine: MakeEngine, context: Context
) -> None:
    async def story() -> None:
        worker = Worker()
        engine = make_engine(None)
        dealer = dial(context, engine, worker)
        dealer.send([b"many", b"300"])
        assert engine.has_said_many.wait(PATIENCE_S)  # and nobody has listened meanwhile
        turns, behind = [0], [dealer.behind_s]
        async with asyncio.timeout(PATIENCE_S):
            while len(worker.messages) < 300:
                dealer.send([b"hello"])  # which makes it look, too
                await asyncio.sleep(0)
                turns.append(len(worker.messages))
                behind.append(dealer.behind_s)
            while dealer.behind_s:
                await asyncio.sleep(0)
        most = max(after - before for before, after in itertools.pairwise(turns))
        assert 0 < most <= 6, "two looks of 10 ms at the most"
        assert max(behind) > 0.5, "how long it has been behind"
        many = [frames for frames in worker.messages if frames[0] != b"re"]
        assert many == [[b"%d" % number] for number in range(300)]
        dealer.close()

    run_heavy(story())


def test_what_had_arrived_is_heard_before_the_loss_is_told(
    make_engine: MakeEngine, context: Context
) -> None:
    async def story() -> None:
        heard: list[int] = []
        worker = Worker()
        engine = make_engine(None)

        def disconnected() -> None:
            heard.append(len(worker.messages))
            worker.disconnected()

        dealer = AsyncDealer(context, engine.address, None, worker.hear, disconnected)
        dealer.send([b"many", b"50"])
        assert engine.has_said_many.wait(PATIENCE_S)
        engine.loop.close()  # while nobody listens
        await worker.until(lambda: worker.num_disconnects > 0)
        assert heard == [50]
        dealer.close()

    run_heavy(story())


def test_what_is_said_while_listening_is_answered(
    make_engine: MakeEngine, context: Context
) -> None:
    """Sending may eat the event that announces a message."""

    async def story() -> None:
        ear = Ear()
        engine = make_engine(None)

        def go_on(frames: list[bytes]) -> None:
            ear.hear(frames)
            if len(ear.messages) < 200:
                dealer.send([b"%d" % len(ear.messages)])

        dealer = AsyncDealer(context, engine.address, None, go_on, ear.disconnected)
        dealer.send([b"0"])
        await ear.until(lambda: len(ear.messages) == 200)
        dealer.close()

    run(story())


def test_a_lost_connection_is_told_once(make_engine: MakeEngine, context: Context) -> None:
    async def story() -> None:
        ear = Ear()
        engine = make_engine(None)
        dealer = dial(context, engine, ear)
        dealer.send([b"hello"])
        await ear.until(lambda: bool(ear.messages))
        await asyncio.to_thread(engine.loop.close)
        await ear.until(lambda: ear.num_disconnects > 0)
        assert ear.num_disconnects == 1
        dealer.close()

    run(story())


def test_an_owner_may_close_it_when_it_hears_of_the_loss(
    make_engine: MakeEngine, context: Context
) -> None:
    async def story() -> None:
        ear = Ear()
        engine = make_engine(None)

        def disconnected() -> None:
            dealer.close()
            ear.disconnected()

        dealer = AsyncDealer(context, engine.address, None, ear.hear, disconnected)
        dealer.send([b"hello"])
        await ear.until(lambda: bool(ear.messages))
        await asyncio.to_thread(engine.loop.close)
        await ear.until(lambda: ear.num_disconnects == 1)
        assert not dealer.send([b"more"])

    run(story())


@pytest.mark.parametrize(
    ("theirs", "ours"), [(KEYS, OTHER_KEYS), (KEYS, None)], ids=["another key", "no key"]
)
def test_an_engine_with_another_key_says_nothing(
    make_engine: MakeEngine, context: Context, theirs: CurveKeys | None, ours: CurveKeys | None
) -> None:
    async def story() -> None:
        ear = Ear()
        dealer = dial(context, make_engine(theirs), ear, ours)
        dealer.send([b"hello"])
        await ear.until(lambda: ear.num_disconnects > 0)
        assert ear.messages == []
        dealer.close()

    run(story())


def test_a_closed_connection_sends_and_hears_nothing(
    make_engine: MakeEngine, context: Context
) -> None:
    async def story() -> None:
        first, second = Ear(), Ear()
        engine = make_engine(None)
        closed, other = dial(context, engine, first), dial(context, engine, second)
        closed.send([b"hello"])
        closed.close()
        closed.close()
        assert not closed.send([b"more"])
        other.send([b"hello"])
        await second.until(lambda: bool(second.messages))
        assert (first.messages, first.num_disconnects) == ([], 0)
        other.close()

    run(story())


def test_it_may_be_closed_by_the_message_that_it_brings(
    make_engine: MakeEngine, context: Context
) -> None:
    async def story() -> None:
        ear = Ear()

        def hear_once(frames: list[bytes]) -> None:
            ear.hear(frames)
            dealer.close()

        dealer = AsyncDealer(context, make_engine(None).address, None, hear_once, ear.disconnected)
        dealer.send([b"many", b"10"])
        await ear.until(lambda: bool(ear.messages))
        assert ear.messages == [[b"0"]]

    run(story())


def test_what_has_arrived_can_be_asked_for(make_engine: MakeEngine, context: Context) -> None:
    async def story() -> None:
        ear = Ear()
        dealer = dial(context, make_engine(None), ear)
        dealer.send([b"hello"])
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while not ear.messages and asyncio.get_running_loop().time() < deadline:
            dealer.receive()  # the loop itself does nothing in the meantime
        assert ear.messages == [[b"re", b"hello"]]
        dealer.close()

    run(story())


@pytest.fixture
def many_open_files() -> Iterator[None]:
    """Let this process have as many files open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_open_files")
def test_a_thousand_engines_are_not_too_many(make_engine: MakeEngine, context: Context) -> None:
    """Each connection takes three sockets, and ZeroMQ has 1023 by default."""
    before = len(os.listdir("/proc/self/fd"))

    async def story() -> None:
        engine, ear = make_engine(None), Ear()
        dealers = [dial(context, engine, ear) for _ in range(1000)]
        for dealer in dealers:
            assert dealer.send([b"hello"])
        await ear.until(lambda: len(ear.messages) == 1000)
        used = len(os.listdir("/proc/self/fd")) - before
        for dealer in dealers:
            dealer.close()
        assert used <= 1000 * (DESCRIPTORS_PER_DEALER + 1) + 100  # the engine's end is here, too

    run(story())

"""A frontend's connection to one engine: found over HTTP, kept over the control channel.

A link tries for ever. Whoever owns it is told when the engine can be used, what it gives out, and
when it is lost; a restarted engine comes back as another incarnation.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from typing import Protocol

import aiohttp
import msgspec
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from vllm_pd_plugin.config import CLUSTER_KEY_VARIABLE
from vllm_pd_plugin.engine_port import messages
from vllm_pd_plugin.engine_port.claims import Claims
from vllm_pd_plugin.engine_port.peer_decoder import PeerDecoder
from vllm_pd_plugin.ids import Incarnation, RequestId
from vllm_pd_plugin.net.async_channel import AsyncDealer, Context
from vllm_pd_plugin.net.channel import CurveKeys
from vllm_pd_plugin.net.hosts import in_url, is_loopback
from vllm_pd_plugin.protocol.framing import WireError

logger = logging.getLogger(__name__)

NOT_ASKED = "not asked yet"
"""The problem of a link that has not tried anything."""
PEER_TIMEOUT_S = 5.0
"""An engine whose control thread is silent for so long is lost. A stopped process is, a busy engine
is not: its control thread goes on while it computes."""
_CONNECT_TIMEOUT_S = _ATTACH_TIMEOUT_S = 5.0
_MIN_ANSWER_S, _MAX_ANSWER_S = 5.0, 40.0
"""How long an engine's server may take to answer: it asks the core, which answers between steps.
One that has not answered is given twice as much the next time."""
_MIN_WAIT_S, _MAX_WAIT_S = 0.2, 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Connection:
    """What all links of a frontend share."""

    name: str
    incarnation: Incarnation
    keys: CurveKeys | None
    context: Context
    session: aiohttp.ClientSession
    claims: Claims = dataclasses.field(default_factory=Claims)


class LinkOwner(Protocol):
    """Who is told what happens on a link."""

    def attached(self, link: Link, load: messages.EngineLoad) -> None: ...

    def loaded(self, link: Link, state: messages.State) -> None: ...

    def gave_out(self, link: Link, outputs: EngineCoreOutputs) -> None: ...

    def cached(self, link: Link, changes: messages.Blocks) -> None: ...

    def lost(self, link: Link, why: str) -> None: ...


def server_of(url: str) -> str:
    """Return the URL of the server that an engine belongs to; see ``Link``."""
    return url.partition("#")[0]


class Link:
    """One engine. problem: why it cannot be used now; empty when it can.

    url: its server's. A server with several engine cores (data parallel ranks) is as many engines:
        this is the first of them, or with ``#N`` after the URL, the one of rank N.
    twin: the URL of another link that has the same engine, which is used under that name only.
    others: the URLs of the server's other engines; known to its first.
    """

    def __init__(self, url: str, connection: Connection, owner: LinkOwner) -> None:
        self.url = url
        self.others: tuple[str, ...] = ()
        self.problem = NOT_ASKED
        self.twin: str | None = None
        self.description: messages.EngineDescription
        self.incarnation = Incarnation("")
        self._connection = connection
        self._owner = owner
        self._clock: Callable[[], float] = asyncio.get_running_loop().time
        self._dealer: AsyncDealer | None = None
        self._encoder = MsgpackEncoder()
        self._decoder = PeerDecoder(EngineCoreOutputs)
        self._is_attached = False
        self._changed = asyncio.Event()
        self._heard_at = 0.0
        self._answer_s = _MIN_ANSWER_S
        self._last_outputs = self._num_adds = 0
        self._task = asyncio.create_task(self._run(), name=f"link to {url}")

    @property
    def is_attached(self) -> bool:
        return self._is_attached

    @property
    def behind_s(self) -> float:
        """For how long what the engine has sent waits here to be taken."""
        return 0.0 if self._dealer is None else self._dealer.behind_s

    def encode(self, request: EngineCoreRequest) -> list[bytes]:
        """Write a request down. Raises an error if there is something in it that cannot be."""
        return [bytes(buffer) for buffer in self._encoder.encode(request)]

    def add(self, request_id: RequestId, payload: list[bytes]) -> int:
        """Send a request to the engine, as ``encode`` has written it; outputs answer it. Return its
        number among those sent since this frontend has attached; states say which are in them."""
        self._num_adds += 1
        number = self._num_adds
        self._send(messages.Add(request_id, number), payload)
        return number

    def abort(self, request_ids: tuple[RequestId, ...]) -> None:
        self._send(messages.Abort(request_ids))

    async def close(self) -> None:
        """End the connection; the engine ends what is still under way."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._drop("closed")

    async def _run(self) -> None:
        wait_s = _MIN_WAIT_S
        while True:
            try:
                await self._find()
                await self._attach()
                wait_s = _MIN_WAIT_S
                await self._keep()
            except aiohttp.ClientConnectorError as error:
                self._drop(_why_not_connected(error))
            except (messages.FrontendError, aiohttp.ClientError, TimeoutError) as error:
                self._drop(str(error) or type(error).__name__)
            except Exception as error:
                # The task's one broad catch: a defect with one engine must not cost the others.
                logger.exception("unexpected error with engine %s", self.url)
                self._drop(repr(error))
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _MAX_WAIT_S)

    async def _find(self) -> None:
        """Ask the engine's HTTP server where its control channel is."""
        path = server_of(self.url) + messages.DESCRIPTION_PATH
        try:
            content = await self._ask(path)
        except TimeoutError as error:
            waited_s, self._answer_s = self._answer_s, min(2 * self._answer_s, _MAX_ANSWER_S)
            raise messages.FrontendError(
                f"{path} has not answered within {waited_s:g} s: the engine may be in a long step"
            ) from error
        self._answer_s = _MIN_ANSWER_S
        try:
            engines = msgspec.json.decode(content, type=list[messages.EngineDescription])
        except msgspec.MsgspecError as error:
            raise messages.FrontendError(
                f"{path} answers with something else than descriptions of engines ({error}); run "
                "the same release of vllm-pd-plugin on engines and frontends"
            ) from error
        self._choose(engines)
        self.twin = self._connection.claims.take(self.description, self.url)
        if self.twin is not None:
            raise messages.FrontendError(f"it is the same engine as {self.twin}")
        if self._connection.keys is None and not is_loopback(self.description.control_host):
            host = self.description.control_host
            text = f"the control channel of {self.url} is at {host}: set the cluster key"
            raise messages.FrontendError(text)

    async def _ask(self, path: str) -> bytes:
        # An engine that is there answers late; a host that is not does not connect.
        timeout = aiohttp.ClientTimeout(self._answer_s, sock_connect=_CONNECT_TIMEOUT_S)
        session = self._connection.session
        # Where it was told to look, and nowhere else.
        async with session.get(path, timeout=timeout, allow_redirects=False) as answer:
            if answer.status == 404:
                text = f"{self.url} does not run pdplugin; start it with --kv-connector pdplugin"
                raise messages.FrontendError(text)
            if answer.status != 200:
                raise messages.FrontendError(f"{path} answers with status {answer.status}")
            return await answer.read()

    def _choose(self, engines: list[messages.EngineDescription]) -> None:
        """Take this one's description out of those of its server."""
        server, is_another, _ = self.url.partition("#")
        names = [f"{server}#{engine.data_parallel_rank}" for engine in engines]
        if not is_another:
            names[:1], self.others = [server], tuple(names[1:])
        if self.url not in names or not engines:
            raise messages.FrontendError(f"{server} has no such engine now: {self.url}")
        self.description = engines[names.index(self.url)]

    async def _attach(self) -> None:
        self._changed.clear()
        address = (self.description.control_host, self.description.control_port)
        connection = self._connection
        self._dealer = AsyncDealer(
            connection.context, address, connection.keys, self._take, self._disconnected
        )
        self.incarnation = Incarnation("")
        self._last_outputs = self._num_adds = 0
        self._send(messages.Attach(connection.name))
        try:
            async with asyncio.timeout(_ATTACH_TIMEOUT_S):
                await self._changed.wait()
        except TimeoutError as error:
            raise messages.FrontendError(
                f"its control channel at {self._control} does not answer within "
                f"{_ATTACH_TIMEOUT_S:g} s; let this machine reach that port"
            ) from error
        if not self._is_attached:
            raise messages.FrontendError(self.problem)

    async def _keep(self) -> None:
        """Ping until the engine is lost."""
        while self._is_attached:
            self._changed.clear()
            self._send(messages.Ping())
            try:
                async with asyncio.timeout(messages.PING_INTERVAL_S):
                    await self._changed.wait()
            except TimeoutError:
                if self._is_silent and self._dealer is not None:
                    self._dealer.receive()  # if it was this process that stood still
                if self._is_silent:
                    self._drop(f"silent for {PEER_TIMEOUT_S:g} s")

    @property
    def _is_silent(self) -> bool:
        return self._clock() - self._heard_at > PEER_TIMEOUT_S

    def _send(self, message: messages.FromFrontend, payload: list[bytes] | None = None) -> None:
        frames = messages.encode(message, self._connection.incarnation, self.incarnation, payload)
        if self._dealer is None or self._dealer.send(frames):
            return
        if self._is_attached:
            self._drop("it does not read what is sent to it")
        else:
            self._disconnected()  # the first message found no room: the handshake has failed

    def _disconnected(self) -> None:
        if self._is_attached:
            self._drop("the connection was lost")
        else:
            self._drop(
                f"its control channel at {self._control} ends the connection; is "
                f"{CLUSTER_KEY_VARIABLE} the same there and here?"
            )

    @property
    def _control(self) -> str:
        return f"{in_url(self.description.control_host)}:{self.description.control_port}"

    def _take(self, frames: list[bytes]) -> None:
        try:
            self._handle(frames)
        except Exception as error:
            # What was in it is lost: as if the engine were.
            logger.exception("unexpected error with a message of engine %s", self.url)
            self._drop(repr(error))

    def _handle(self, frames: list[bytes]) -> None:
        try:
            header, message, payload = messages.decode(frames)
        except WireError as error:
            self._drop(str(error))
            return
        self._heard_at = self._clock()
        if self.incarnation not in ("", header.sender):
            self._drop("it was restarted")
            return
        match message:
            case messages.Attached(description, load):
                self.description, self.incarnation = description, header.sender
                self._is_attached, self.problem = True, ""
                self._owner.attached(self, load)
                self._changed.set()
            case messages.State(last_outputs=last_outputs):
                if last_outputs != self._last_outputs:
                    self._drop("outputs were lost on the way")
                else:
                    self._owner.loaded(self, message)
            case messages.Blocks():
                self._owner.cached(self, message)
            case messages.Outputs(number):
                if number != self._last_outputs + 1:
                    self._drop("outputs were lost on the way")
                    return
                self._last_outputs = number
                self._owner.gave_out(self, self._decoder.decode(payload))
            case _:
                self._drop("it does not know this frontend any more")

    def _drop(self, why: str) -> None:
        """Give the connection up, and tell the owner if it had one."""
        if self._dealer is not None:
            self._dealer.close()
            self._dealer = None
        self._connection.claims.release(self.url)
        was_attached, self._is_attached = self._is_attached, False
        self.problem = why
        self._changed.set()
        if was_attached:
            logger.warning("engine %s is lost: %s", self.url, why)
            self._owner.lost(self, why)


def _why_not_connected(error: aiohttp.ClientConnectorError) -> str:
    """Say why there is no HTTP server to ask."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"no host is called {error.host!r}"
    if isinstance(error, aiohttp.ClientSSLError):
        return f"no TLS with it: {error}"
    return "nothing listens there"

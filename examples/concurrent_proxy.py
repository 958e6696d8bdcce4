"""A proxy that sends a request to a prefill and a decode engine at the same moment.

A router that works one after the other waits for the prefill engine's answer, and only then tells
the decode engine where the KV is. This one names the handoff itself, so the decode engine can
take KV over while prefill still runs. It serves `/v1/completions` and `/v1/chat/completions`,
streamed or not. One pair of engines, no retries, no load balancing: it shows the protocol.

    vllm serve MODEL --port 8001 --kv-connector pdplugin --kv-role prefill \\
      --kv-transfer-config.kv_connector_extra_config.port 5700
    vllm serve MODEL --port 8002 --kv-connector pdplugin --kv-role decode
    python examples/concurrent_proxy.py --prefill http://127.0.0.1:8001 \\
      --prefill-control 127.0.0.1:5700 --decode http://127.0.0.1:8002 --port 8000

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"model": "MODEL", "prompt": "The capital of France is", "max_tokens": 16}'
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import secrets
import sys
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import aiohttp
from aiohttp import web

MAX_BODY_BYTES = 64 << 20
KEEP_ALIVE_S = 2.0  # shorter than the engines' 5 s, so that they never close a connection first
PREFILL_GRACE_S = 5.0

log = logging.getLogger("concurrent_proxy")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefill", required=True, metavar="URL", help="the prefill engine")
    parser.add_argument(
        "--prefill-control",
        required=True,
        type=parse_address,
        metavar="HOST:PORT",
        help="its control channel, as the decode engine reaches it",
    )
    parser.add_argument("--decode", required=True, metavar="URL", help="the decode engine")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to bind (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    control_host, control_port = args.prefill_control
    pair = Pair(args.prefill.rstrip("/"), control_host, control_port, args.decode.rstrip("/"))
    # Without handler_cancellation a handler goes on after its client has left.
    web.run_app(
        application(pair), host=args.host, port=args.port, access_log=None,
        handler_cancellation=True,
    )  # fmt: skip
    return 0


def parse_address(text: str) -> tuple[str, int]:
    """Read HOST:PORT; IPv6 addresses in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A prefill engine with its control channel, and a decode engine."""

    prefill_url: str
    control_host: str
    control_port: int
    decode_url: str


class LegFailed(Exception):
    """An engine refused its half of a request, or could not be reached. Holds the answer."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"status {status}: {body[:300].decode(errors='replace')}")
        self.status = status
        self.body = body


def application(pair: Pair) -> web.Application:
    proxy = Proxy(pair)
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.cleanup_ctx.append(proxy.lifetime)
    app.router.add_post("/v1/completions", proxy.complete)
    app.router.add_post("/v1/chat/completions", proxy.complete)
    app.router.add_get("/v1/models", proxy.models)
    app.router.add_get("/health", proxy.health)
    return app


class Proxy:
    """The handlers, and the connections to both engines, which `lifetime` opens and closes."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._session: aiohttp.ClientSession

    async def lifetime(self, _: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._session:
            yield

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Send both legs at once, and pass the decode engine's answer on."""
        try:
            body = json.loads(await request.read())
        except ValueError:
            return failure(LegFailed(400, error_body("the body is not JSON")))
        if not isinstance(body, dict):
            return failure(LegFailed(400, error_body("the body is not a JSON object")))
        handoff_id = secrets.token_hex(16)
        first = json.dumps(prefill_body(body, handoff_id)).encode()
        second = json.dumps(decode_body(body, handoff_id, self._pair)).encode()
        headers = {"Content-Type": "application/json"}
        if "Authorization" in request.headers:
            headers["Authorization"] = request.headers["Authorization"]
        async with contextlib.AsyncExitStack() as stack:
            # Leaving this block, for whatever reason, ends a leg that still runs: closing its
            # connection makes an engine abort the request and give its blocks back.
            prefill = await stack.enter_async_context(
                leg(self._prefill(request.path, first, headers))
            )
            decode = await stack.enter_async_context(
                leg(self._decode(request.path, second, headers, stack))
            )
            try:
                await asyncio.wait({prefill, decode}, return_when=asyncio.FIRST_COMPLETED)
                if prefill.done():
                    raise_if_refused(prefill)
                answer, start = await decode
            except LegFailed as error:
                log.warning("handoff %s failed: %s", handoff_id, error)
                return failure(error)
            sent = await pass_on(request, answer, start)
            # A short answer may be complete before the prefill engine has written its own.
            await asyncio.wait({prefill}, timeout=PREFILL_GRACE_S)
            return sent

    async def _prefill(self, path: str, body: bytes, headers: dict[str, str]) -> None:
        """Run the prefill leg; its one token is not needed."""
        try:
            async with self._session.post(
                self._pair.prefill_url + path, data=body, headers=headers
            ) as answer:
                content = await answer.read()
        except aiohttp.ClientError as error:
            raise LegFailed(502, error_body(f"prefill engine: {error!r}")) from error
        if answer.status != 200:
            raise LegFailed(answer.status, content)

    async def _decode(
        self, path: str, body: bytes, headers: dict[str, str], stack: contextlib.AsyncExitStack
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """Run the decode leg up to the first bytes of its answer, and return both.

        A streamed answer's status comes long before its first token, and nothing may go to the
        client while the prefill leg can still fail.
        """
        try:
            answer = await stack.enter_async_context(
                self._session.post(self._pair.decode_url + path, data=body, headers=headers)
            )
            start = await answer.content.readany()
            if answer.status != 200:
                raise LegFailed(answer.status, start + await answer.content.read())
        except aiohttp.ClientError as error:
            raise LegFailed(502, error_body(f"decode engine: {error!r}")) from error
        return answer, start

    async def models(self, _: web.Request) -> web.Response:
        async with self._session.get(f"{self._pair.decode_url}/v1/models") as answer:
            return web.Response(
                status=answer.status,
                body=await answer.read(),
                content_type="application/json",
            )

    async def health(self, _: web.Request) -> web.Response:
        """200 while both engines answer 200, else 503."""
        for url in (self._pair.prefill_url, self._pair.decode_url):
            try:
                async with self._session.get(f"{url}/health") as answer:
                    healthy = answer.status == 200
            except aiohttp.ClientError:
                healthy = False
            if not healthy:
                return web.Response(status=503, text=f"{url} is not healthy\n")
        return web.Response()


def prefill_body(body: dict[str, Any], handoff_id: str) -> dict[str, Any]:
    """Return the producer's half: one token, one choice, not streamed.

    The token is not used, so it needs no seed: vLLM's CPU backend dies of a seeded prompt that it
    computes in several steps ("CPU Generator does not use offset").
    """
    unwanted = ("stream_options", "min_tokens", "n", "best_of", "seed")
    kept = {key: value for key, value in body.items() if key not in unwanted}
    if "max_completion_tokens" in kept:
        kept["max_completion_tokens"] = 1
    return kept | {
        "max_tokens": 1,
        "stream": False,
        "kv_transfer_params": {"do_remote_decode": True, "handoff_id": handoff_id},
    }


def decode_body(body: dict[str, Any], handoff_id: str, pair: Pair) -> dict[str, Any]:
    """Return the consumer's half: the request as it came, and where its KV will be.

    A client may choose how the KV is to be moved, with `kv_transfer_params: {"codec": "int8"}`.
    """
    wanted = body.get("kv_transfer_params")
    codec = wanted.get("codec") if isinstance(wanted, dict) else None
    return body | {
        "kv_transfer_params": {
            **({"codec": codec} if codec is not None else {}),
            "do_remote_prefill": True,
            "remote_host": pair.control_host,
            "remote_port": pair.control_port,
            "remote_handoff_id": handoff_id,
        }
    }


def raise_if_refused(prefill: asyncio.Task[None]) -> None:
    """Raise LegFailed if the prefill engine refused the request as such.

    Any other failure is the decode engine's to deal with: it may have ended the prefill itself,
    because it had the KV already, or compute the prompt after the prefill engine has died.
    """
    error = prefill.exception()
    if isinstance(error, LegFailed):
        log.warning("prefill leg failed: %s", error)
        if error.status < 500:
            raise error


@contextlib.asynccontextmanager
async def leg(work: Coroutine[Any, Any, Any]) -> AsyncIterator[asyncio.Task[Any]]:
    """Run one leg as a task; cancel it at the end if it has not ended, and wait until it has."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, LegFailed):
            await task


async def pass_on(
    request: web.Request, answer: aiohttp.ClientResponse, start: bytes
) -> web.StreamResponse:
    """Send the decode engine's answer to the client as it comes."""
    out = web.StreamResponse(status=answer.status)
    out.content_type = answer.content_type
    out.content_length = answer.content_length
    await out.prepare(request)
    await out.write(start)
    async for chunk in answer.content.iter_any():
        await out.write(chunk)
    await out.write_eof()
    return out


def failure(error: LegFailed) -> web.Response:
    return web.Response(status=error.status, body=error.body, content_type="application/json")


def error_body(message: str) -> bytes:
    """Return an error in the form of the OpenAI API."""
    return json.dumps({"error": {"message": message, "type": "proxy_error"}}).encode()


if __name__ == "__main__":
    sys.exit(main())

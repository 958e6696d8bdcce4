"""One HTTP client for every question of the tests and benchmarks."""

from __future__ import annotations

import os
import ssl

import httpx

from vllm_pd_plugin.frontend.admin_keys import find


def _add_admin_key(request: httpx.Request) -> None:
    """Send the key that a frontend here has made, as ``vllm-pd engines`` does."""
    is_admin = request.url.path.startswith("/pd/v1/") and "authorization" not in request.headers
    if is_admin and (key := find(request.url.port or 80, os.environ)):
        request.headers["Authorization"] = f"Bearer {key}"


HTTP = httpx.Client(
    verify=ssl.create_default_context(),
    trust_env=False,
    event_hooks={"request": [_add_admin_key]},
    limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
)
"""For every question of the tests: ``httpx.get`` reads certificates each time, and takes 40 ms.
Servers come and go, so connections are not kept."""

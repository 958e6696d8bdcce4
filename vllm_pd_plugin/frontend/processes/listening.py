"""What a frontend does before it serves: take its address, and leave its key where it is found."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from vllm.entrypoints.launchers.launcher import setup_server

from vllm_pd_plugin.config import ADMIN_KEY_VARIABLE
from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.admin_keys import AdminKey, published
from vllm_pd_plugin.net.hosts import in_url

logger = logging.getLogger(__name__)

UNSENT_BYTES = 65_536
"""What the kernel keeps of a connection beside what the client's machine has room for."""


def listen(args: argparse.Namespace, *, reuse_port: bool) -> socket.socket:
    """Bind what the frontend is to serve at.

    Raises:
        ConfigError: that cannot be, or vLLM's options for its server contradict each other.
    """
    try:
        _, sock = setup_server(args, reuse_port=reuse_port)
    except (OSError, OverflowError) as error:
        traceback.clear_frames(error.__traceback__)  # closes the socket that vLLM has left open
        where = args.uds or f"{in_url(args.host or '0.0.0.0')}:{args.port}"
        why = getattr(error, "strerror", None) or error
        text = f"cannot listen at {where}: {why}; say where with --host and --port"
        raise ConfigError(text) from error
    except KeyError as error:  # vLLM's, of a parser that is none
        raise ConfigError(str(error.args[0])) from error
    if sock.family != socket.AF_UNIX and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        # Connections have it from here. Else some megabytes lie in the kernel for one that does not
        # read, and no more is taken before a third of that is gone.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    return sock


@contextmanager
def findable(key: AdminKey, sock: socket.socket) -> Iterator[None]:
    """Leave a key that was made where ``vllm-pd`` finds it by the port, as long as this lasts."""
    with ExitStack() as stack:
        if key.is_made and sock.family != socket.AF_UNIX:
            try:
                path = stack.enter_context(published(key, sock.getsockname()[1], os.environ))
                logger.info("the key of the admin API is in %s", path)
            except ConfigError as error:
                text = "the admin API cannot be used: %s; or give it a key with %s"
                logger.warning(text, error, ADMIN_KEY_VARIABLE)
        yield

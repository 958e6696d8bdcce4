"""How many files this process may have open: a frontend has one for each client, and some for each
engine."""

from __future__ import annotations

import logging
import resource

from vllm_pd_plugin.net.async_channel import DESCRIPTORS_PER_DEALER

logger = logging.getLogger(__name__)

_OTHERS = 1024
"""For clients, logs and libraries, at the least."""


def raise_open_files(num_engines: int) -> None:
    """Let this process, and what it starts, have as many files open as it may (``ulimit -n``), and
    say what is needed where that is not enough for so many engines."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if problem := shortage(hard, num_engines):
        logger.warning(problem)


def shortage(limit: int, num_engines: int) -> str:
    """Say what is needed where so many open files are not enough; empty where they are."""
    needed = DESCRIPTORS_PER_DEALER * num_engines + _OTHERS
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return ""
    return (
        f"{num_engines} engines need {needed} open files, and one more for each client; only "
        f"{limit} are allowed: raise the hard limit (ulimit -Hn)"
    )

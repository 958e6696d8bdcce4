"""The options of a frontend, beside those of ``vllm serve``."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_pd_plugin.config import API_KEY_VARIABLE, PdConfig, read_secret
from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.admin_keys import AdminKey
from vllm_pd_plugin.frontend.engine_hosts import EngineHosts
from vllm_pd_plugin.frontend.option_words import at_least, seconds
from vllm_pd_plugin.frontend.pool.membership import Engines, Wanted
from vllm_pd_plugin.frontend.routing.choice import EngineKey, NoPrefill, Policy, Role, Strategy
from vllm_pd_plugin.frontend.telemetry.outcomes import Objectives, parse_slo
from vllm_pd_plugin.frontend.underway import Limits
from vllm_pd_plugin.net.channel import CurveKeys
from vllm_pd_plugin.net.hosts import in_url, is_host

GROUP_PREFIX = "vllm-pd"
"""Of the titles of groups of options that vLLM does not have."""
_TIMEOUTS = Limits()


@dataclasses.dataclass(frozen=True, slots=True)
class FrontendOptions:
    """What an operator says of a frontend."""

    engines: Engines
    policy: Policy
    limits: Limits
    slos: Mapping[str, Objectives]
    wait_s: float
    workers: int
    admin_key: AdminKey
    engine_hosts: EngineHosts
    keys: CurveKeys | None


def add_frontend_options(parser: Any) -> None:
    """Add what both ``vllm-pd serve`` and ``vllm-pd up`` take."""
    group = parser.add_argument_group(
        title=f"{GROUP_PREFIX} frontend",
        description="How requests find their way over the engines.",
    )
    _add_choice(group)
    _add_times(group)
    group.add_argument(
        "--slo",
        action="append",
        default=[],
        metavar="NAME=TTFT_MS/TPOT_MS",
        help="Objectives of the requests with header X-SLO-Class: NAME; without NAME= of those "
        "that choose no class. Counted as goodput. Example: --slo 500/50 --slo batch=10000/200.",
    )
    group.add_argument(
        "--wait-for-engines",
        type=seconds,
        default=600.0,
        metavar="SECONDS",
        help="How long to wait for engines at the start. Default: %(default)s.",
    )
    group.add_argument(
        "--workers",
        type=at_least(1),
        default=1,
        metavar="N",
        help="Processes that share the port. Default: %(default)s.",
    )
    group.add_argument(
        "--engine-hosts",
        nargs="+",
        action="extend",
        default=[],
        metavar="HOST",
        help="Where engines may be added later, beside loopback and the hosts that are named now: "
        "names (*.example), addresses, networks (10.0.0.0/24).",
    )
    group.add_argument(
        "--say-route",
        action="store_true",
        help="Say in headers of each answer and in the log which engines served it.",
    )


def _add_choice(group: Any) -> None:
    """Add how engines are chosen."""
    strategies = [strategy.value for strategy in Strategy]
    for role, best in (
        (Role.PREFILL, "the first token is predicted to come first"),
        (Role.DECODE, "most headroom, and the prompt's prefix"),
    ):
        group.add_argument(
            f"--{role.value}-strategy",
            choices=strategies,
            default=Strategy.BEST.value,
            metavar="STRATEGY",
            help=f"How a {role.value} engine is chosen: {', '.join(strategies)}. Best: {best}. "
            "Default: %(default)s.",
        )
    policies = [policy.value for policy in NoPrefill]
    group.add_argument(
        "--no-prefill",
        choices=policies,
        default=NoPrefill.LOCAL.value,
        metavar="POLICY",
        help="What becomes of a request while no prefill engine is up: "
        f"{', '.join(policies)} (a decode engine computes the prompt). Default: %(default)s.",
    )
    group.add_argument(
        "--local-below",
        type=at_least(0),
        metavar="TOKENS",
        help="Compute prompts with fewer uncached tokens on the decode engine; 0 hands off all. "
        "Default: decided for each request.",
    )


def _add_times(group: Any) -> None:
    """Add how long things may take."""
    for name, default_s, text in (
        ("request", _TIMEOUTS.request_s, "a whole request may take"),
        (
            "first-token",
            _TIMEOUTS.first_token_s,
            "an engine may take from when it begins to its first token",
        ),
        ("stall", _TIMEOUTS.stall_s, "may pass between two tokens"),
        ("queue", _TIMEOUTS.queue_s, "a request waits for an engine that can take it"),
    ):
        group.add_argument(
            f"--{name}-timeout",
            type=seconds,
            default=default_s,
            metavar="SECONDS",
            help=f"How long {text}. Default: %(default)s.",
        )


def add_engine_options(parser: Any) -> None:
    """Add what says where the engines are."""
    group = parser.add_argument_group(
        title=f"{GROUP_PREFIX} engines",
        description="vLLM servers with --kv-connector pdplugin, by their HTTP address.",
    )
    for role, text in (
        (Role.PREFILL, "Engines that compute prompts."),
        (Role.DECODE, "Engines that write answers."),
        (Role.BOTH, "Engines of role both, for either."),
    ):
        group.add_argument(
            f"--{role.value}",
            nargs="+",
            action="extend",
            type=engine_url,
            default=[],
            metavar="URL",
            help=text,
        )


LOCAL_OPTIONS = {
    "--prefill", "--decode", "--both", "--log-dir", "--deployment", "--engine-port-base",
}  # fmt: skip


def add_local_options(parser: Any) -> None:
    """Add what says how many engines are to be started here."""
    group = parser.add_argument_group(
        title=f"{GROUP_PREFIX} engines",
        description="Engines to start on this machine; its cores or GPUs are divided among them.",
    )
    for role, number in ((Role.PREFILL, 1), (Role.DECODE, 1), (Role.BOTH, 0)):
        group.add_argument(
            f"--{role.value}",
            type=int,
            default=number,
            metavar="N",
            help=f"How many engines of role {role.value}. Default: %(default)s.",
        )
    group.add_argument(
        "--deployment",
        type=Path,
        metavar="FILE",
        help="A deployment that says all of this, see docs/ray.md; options are added to it.",
    )
    group.add_argument(
        "--engine-port-base",
        type=int,
        metavar="PORT",
        help="Port of the first engine; the next have those after it. Default: free ones.",
    )
    group.add_argument(
        "--log-dir",
        type=Path,
        metavar="FOLDER",
        help="Where the engines' logs go. Default: a new temporary folder.",
    )


def parse_options(
    args: argparse.Namespace,
    engines: Iterable[tuple[EngineKey, Role]],
    environ: Mapping[str, str],
) -> FrontendOptions:
    """Read what ``add_frontend_options`` has added, and secrets from ``environ``.

    Raises:
        ConfigError: something in it cannot be.
    """
    engines = list(engines)
    cluster_key = PdConfig.parse({}, environ).cluster_key
    return FrontendOptions(
        engines={url: Wanted(role) for url, role in engines},
        policy=Policy(
            Strategy(args.prefill_strategy),
            Strategy(args.decode_strategy),
            NoPrefill(args.no_prefill),
            args.local_below,
        ),
        limits=Limits(
            args.request_timeout, args.first_token_timeout, args.stall_timeout, args.queue_timeout
        ),
        slos=dict(parse_slo(text) for text in args.slo),
        wait_s=args.wait_for_engines,
        workers=args.workers,
        admin_key=AdminKey.read(environ),
        engine_hosts=EngineHosts.parse(args.engine_hosts, [url for url, _ in engines]),
        keys=CurveKeys.derive(cluster_key) if cluster_key else None,
    )


def take_api_key(args: argparse.Namespace) -> None:
    """Take the API key of the environment, where none was typed. Raises ConfigError."""
    if not args.api_key and (key := read_secret(os.environ, API_KEY_VARIABLE)):
        args.api_key = [key]


def parse_engines(args: argparse.Namespace) -> list[tuple[EngineKey, Role]]:
    """Read what ``add_engine_options`` has added. Raises ConfigError for a contradiction."""
    roles: dict[EngineKey, Role] = {}
    for role in Role:
        for url in getattr(args, role.value):
            before = roles.setdefault(url, role)
            if before is not role:
                raise ConfigError(
                    f"{url} is named as {before} and as {role}; name it once, or with --both"
                )
    return list(roles.items())


def engine_url(text: str) -> EngineKey:
    """Read an engine's address: http://HOST:PORT."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        rest = f"{parts.path.strip('/')}{parts.query}{parts.fragment}"
        is_address = is_host(parts.hostname or "") and parts.port != 0 and not rest
        is_address = is_address and "@" not in parts.netloc  # a secret that would be shown
    except ValueError:
        is_address = False
    if is_address is False and text.rpartition("#")[2].isdigit():
        raise argparse.ArgumentTypeError(
            f"{text!r} is one rank of an engine; name its server, {text.rpartition('#')[0]}"
        )
    if not is_address or parts.scheme not in ("http", "https"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an engine's address (http://HOST:PORT)")
    port = "" if parts.port is None else f":{parts.port}"
    return f"{parts.scheme}://{in_url(parts.hostname or '')}{port}"

"""The options of a frontend, beside those of ``vllm serve``."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_pd_plugin.config import ADMIN_KEY_VARIABLE, PdConfig
from vllm_pd_plugin.frontend.pool.membership import Engines, Wanted
from vllm_pd_plugin.frontend.routing.choice import EngineKey, NoPrefill, Policy, Role, Strategy
from vllm_pd_plugin.frontend.telemetry.metrics import Objectives, parse_slo
from vllm_pd_plugin.frontend.underway import Limits
from vllm_pd_plugin.net.channel import CurveKeys

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
    admin_key: str | None
    keys: CurveKeys | None


def make_parser(
    prog: str, description: str, add_own_options: Callable[[Any], None]
) -> tuple[Any, set[str]]:
    """Return a parser of vLLM's options and a frontend's, and the options vLLM does not have."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(
        FlexibleArgumentParser(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    theirs = set(parser._option_string_actions)
    add_own_options(parser)
    add_frontend_options(parser)
    own = set(parser._option_string_actions) - theirs
    parser.set_defaults(host="127.0.0.1", shutdown_timeout=30)
    return parser, own


def add_frontend_options(parser: Any) -> None:
    """Add what both ``vllm-pd serve`` and ``vllm-pd up`` take."""
    group = parser.add_argument_group(
        title="vllm-pd frontend", description="How requests find their way over the engines."
    )
    strategies = [strategy.value for strategy in Strategy]
    group.add_argument(
        "--prefill-strategy",
        choices=strategies,
        default=Strategy.BEST.value,
        help="How a prefill engine is chosen. best: the one whose first token is predicted to come "
        "first. Default: %(default)s.",
    )
    group.add_argument(
        "--decode-strategy",
        choices=strategies,
        default=Strategy.BEST.value,
        help="How a decode engine is chosen. best: most headroom, and the prompt's prefix. "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--no-prefill",
        choices=[policy.value for policy in NoPrefill],
        default=NoPrefill.LOCAL.value,
        help="What becomes of a request while no prefill engine is up: fail it, compute its prompt "
        "on a decode engine, or let it wait. Default: %(default)s.",
    )
    group.add_argument(
        "--local-below",
        type=int,
        metavar="TOKENS",
        help="Compute prompts with fewer uncached tokens on the decode engine; 0 hands off every "
        "prompt. Default: decided for each request, by what is measured.",
    )
    for name, seconds, text in (
        ("request", _TIMEOUTS.request_s, "a whole request may take"),
        ("first-token", _TIMEOUTS.first_token_s, "one attempt may take to its first token"),
        ("stall", _TIMEOUTS.stall_s, "may pass between two tokens"),
        ("queue", _TIMEOUTS.queue_s, "a request waits for an engine that can take it"),
    ):
        group.add_argument(
            f"--{name}-timeout",
            type=float,
            default=seconds,
            metavar="SECONDS",
            help=f"How long {text}. Default: %(default)s.",
        )
    group.add_argument(
        "--slo",
        action="append",
        default=[],
        metavar="NAME=TTFT_MS/TPOT_MS",
        help="Objectives of a class of requests, which a client chooses with the header "
        "X-SLO-Class; without NAME= those of requests that choose none. Counted as goodput. "
        "Example: --slo 500/50 --slo batch=10000/200.",
    )
    group.add_argument(
        "--wait-for-engines",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="How long to wait at the start for engines that can serve. Default: %(default)s.",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="Processes that share the port, for more requests than one core can take. "
        "Default: %(default)s.",
    )


def add_engine_options(parser: Any) -> None:
    """Add what says where the engines are."""
    group = parser.add_argument_group(
        title="vllm-pd engines",
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


LOCAL_OPTIONS = {"--prefill", "--decode", "--both", "--log-dir", "--deployment"}


def add_local_options(parser: Any) -> None:
    """Add what says how many engines are to be started here."""
    group = parser.add_argument_group(
        title="vllm-pd engines",
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
        help="A deployment that says all of this, see docs/ray.md; options on the command line are "
        "added to what it says.",
    )
    group.add_argument(
        "--log-dir",
        type=Path,
        metavar="FOLDER",
        help="Where the engines' logs go. Default: a new folder for temporary files.",
    )


def parse_options(
    args: argparse.Namespace, engines: Iterable[tuple[EngineKey, Role]]
) -> FrontendOptions:
    """Read what ``add_frontend_options`` has added."""
    cluster_key = PdConfig.parse({}, os.environ).cluster_key
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
        workers=max(1, args.workers),
        admin_key=os.environ.get(ADMIN_KEY_VARIABLE) or None,
        keys=CurveKeys.derive(cluster_key) if cluster_key else None,
    )


def parse_engines(args: argparse.Namespace) -> list[tuple[EngineKey, Role]]:
    """Read what ``add_engine_options`` has added."""
    return [(url, role) for role in Role for url in getattr(args, role.value)]


def engine_url(text: str) -> EngineKey:
    """Read an engine's address: http://HOST:PORT."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        rest = f"{parts.path.strip('/')}{parts.query}{parts.fragment}"
        is_address = parts.hostname and parts.port != 0 and not rest
    except ValueError:
        is_address = False
    if is_address is False and text.rpartition("#")[2].isdigit():
        raise argparse.ArgumentTypeError(
            f"{text!r} is one rank of an engine; name its server, {text.rpartition('#')[0]}"
        )
    if not is_address or parts.scheme not in ("http", "https"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an engine's address (http://HOST:PORT)")
    return f"{parts.scheme}://{parts.netloc}"

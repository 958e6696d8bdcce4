"""``vllm-pd``: what a person asks of the plug-in itself."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_pd_plugin import CONNECTOR, __version__
from vllm_pd_plugin.config import CLUSTER_KEY_VARIABLE, PdConfig
from vllm_pd_plugin.errors import PdError

_EPILOG = """examples:
  vllm-pd check                      say whether this machine can run the connector
  vllm serve MODEL --kv-connector pdplugin --kv-role prefill --port 8100
  vllm serve MODEL --kv-connector pdplugin --kv-role decode --port 8200
  vllm-pd serve MODEL --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
  vllm-pd up MODEL                   one prefill and one decode engine here, and a frontend
  vllm-pd engines list               the engines of a frontend
  vllm-pd top                        the same, live
"""
_UP = """Start prefill and decode engines on this machine, and serve one OpenAI endpoint over them.

The machine's cores or GPUs are divided among the engines. An engine that dies is started again;
Ctrl-C ends all. Options of `vllm serve` (--help=all lists them) go to the engines and to the
frontend.

examples:
  vllm-pd up MODEL
  vllm-pd up MODEL --prefill 1 --decode 2 --port 8080 --max-model-len 8192
  vllm-pd up MODEL --prefill 2 --decode 2 --tensor-parallel-size 2 --local-below 256
  vllm-pd up --deployment examples/ray_serve.yaml
"""
_SERVE = """One OpenAI endpoint over prefill and decode engines.

The engines are vLLM servers that were started with --kv-connector pdplugin. Besides the options
below, `vllm-pd serve` takes those of `vllm serve` (--help=all lists them): what concerns the API
counts (chat template, tool and reasoning parser, API keys, TLS), what concerns an engine does not.

examples:
  vllm-pd serve MODEL --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
  vllm-pd serve MODEL --prefill http://p1:8000 http://p2:8000 --decode http://d1:8000 --port 8080
  vllm-pd serve MODEL --both http://127.0.0.1:8100 http://127.0.0.1:8200 --local-below 256
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vllm-pd",
        description="Disaggregated prefill and decode for vLLM.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vllm-pd-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "check", help="check the installation: vLLM, NIXL, the registration, the extension, the key"
    )
    commands.add_parser("serve", help="serve one OpenAI endpoint over engines that run")
    commands.add_parser("up", help="start engines on this machine, and serve them")
    commands.add_parser("engines", help="list, add, drain and remove engines of a frontend")
    commands.add_parser("top", help="watch the engines of a frontend")
    arguments = list(sys.argv[1:] if argv is None else argv)
    others = {"serve": serve, "up": up, "engines": engines, "top": top}
    if other := others.get(arguments[0] if arguments else ""):
        return other(arguments[1:])  # each has a parser of its own
    parser.parse_args(arguments)
    return check()


def engines(arguments: Sequence[str]) -> int:
    """See and change the engines of a running frontend; returns the exit status."""
    from vllm_pd_plugin.frontend import console

    return _say_errors("engines", lambda: console.engines(arguments))


def top(arguments: Sequence[str]) -> int:
    """Watch the engines of a running frontend; returns the exit status."""
    from vllm_pd_plugin.frontend import console

    return _say_errors("top", lambda: console.top(arguments))


def _say_errors(name: str, run: Callable[[], int]) -> int:
    try:
        return run()
    except PdError as error:
        print(f"vllm-pd {name}: {error}", file=sys.stderr)
        return 1


def serve(arguments: Sequence[str]) -> int:
    """Serve one OpenAI endpoint over engines that run; returns the exit status."""
    from vllm_pd_plugin.frontend import options

    def prepare(args: argparse.Namespace, parser: Any, own: set[str]) -> tuple[Any, ...]:
        if not (args.decode or args.both):
            parser.error("name at least one engine that decodes: --decode URL, or --both URL")
        return options.parse_options(args, options.parse_engines(args)), (), list(arguments)

    return _run_frontend("serve", _SERVE, arguments, options.add_engine_options, prepare)


def up(arguments: Sequence[str]) -> int:
    """Start engines on this machine and serve them; returns the exit status."""
    environ = dict(os.environ)  # before vLLM changes it
    from vllm_pd_plugin.frontend import options
    from vllm_pd_plugin.frontend.deployment import take_deployment
    from vllm_pd_plugin.frontend.processes import local

    try:
        deployment, typed = take_deployment(arguments)
        said = [deployment.model, *deployment.up_words()] if deployment else []
    except PdError as error:
        print(f"vllm-pd up: {error}", file=sys.stderr)
        return 1

    def prepare(args: argparse.Namespace, parser: Any, own: set[str]) -> tuple[Any, ...]:
        def of_a_server(words: Sequence[str]) -> list[str]:
            rest = list(words)
            if args.model_tag in rest:
                rest.remove(args.model_tag)
            return rest

        engines = local.plan_engines(
            local.parse_counts(args),
            args.model,
            local.engine_settings(
                deployment, local.engine_arguments(parser, of_a_server(typed), own)
            ),
            args.log_dir or Path(tempfile.mkdtemp(prefix="vllm-pd-")),
            args.tensor_parallel_size,
            environ,
        )
        pool = [(engine.url, engine.role) for engine in engines]
        for_workers = local.without(parser, of_a_server([*said, *typed]), options.LOCAL_OPTIONS)
        urls = [word for url, role in pool for word in (f"--{role.value}", url)]
        return options.parse_options(args, pool), engines, [args.model, *for_workers, *urls]

    return _run_frontend("up", _UP, [*said, *typed], options.add_local_options, prepare)


def _run_frontend(
    name: str,
    description: str,
    arguments: Sequence[str],
    add_own_options: Callable[[Any], None],
    prepare: Callable[[argparse.Namespace, Any, set[str]], tuple[Any, ...]],
) -> int:
    """Run a frontend until it is told to stop, with vLLM's own parser for its options."""
    environ = dict(os.environ)  # before vLLM changes it
    import uvloop
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    from vllm_pd_plugin.frontend import options
    from vllm_pd_plugin.frontend.api.app import serve as serve_frontend

    cli_env_setup()
    parser, own = options.make_parser(f"vllm-pd {name}", description, add_own_options)
    args = parser.parse_args(list(arguments))
    args.model = args.model_tag or args.model
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    status = 0
    try:
        parsed, engines, for_workers = prepare(args, parser, own)
        worker = [sys.executable, "-m", "vllm_pd_plugin.cli", "serve", *for_workers]
        uvloop.run(serve_frontend(args, parsed, engines, worker, environ))
    except PdError as error:
        print(f"vllm-pd {name}: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        pass
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is closed. What libraries complain of at exit would hide the last words.
    os._exit(status)


class _Slower(Exception):
    """The connector runs without this, and is slower."""


def check() -> int:
    """Print one line for each thing that the connector needs; 0 if it can run."""
    checks = {
        "vLLM": _check_vllm,
        "NIXL": _check_nixl,
        "connector": _check_connector,
        "native extension": _check_extension,
        "cluster key": _check_key,
    }
    return run_checks(checks)


def run_checks(checks: Mapping[str, Callable[[], str]]) -> int:
    """Print what each says, or why it fails; returns 1 where one that is needed fails, else 0."""
    failures = 0
    for name, function in checks.items():
        try:
            print(f"ok    {name}: {function()}")
        except _Slower as slower:
            print(f"SLOW  {name}: {slower}")
        except (PdError, ImportError, RuntimeError) as error:
            failures += 1
            print(f"FAIL  {name}: {error}")
    return 1 if failures else 0


def _check_vllm() -> str:
    from vllm.version import __version__ as version

    from vllm_pd_plugin.compat import check_version

    check_version(version)
    return str(version)


def _check_nixl() -> str:
    from vllm_pd_plugin.net.nixl_transport import NixlTransport

    transport = NixlTransport("DRAM", 0, reads=False)
    transport.register([])
    transport.close()
    return importlib.metadata.version("nixl")


def _check_connector() -> str:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return str(KVConnectorFactory.get_connector_class_by_name(CONNECTOR).__name__)


def _check_extension() -> str:
    import torch

    from vllm_pd_plugin.codecs import native

    devices = {"CPU": native.missing(on_cuda=False)}
    if torch.version.cuda is not None or torch.version.hip is not None:
        devices["GPU"] = native.missing(on_cuda=True)
    for device, missing in devices.items():
        if missing is not None:
            raise _Slower(
                f"missing for {device}, slower ops in PyTorch take its place: {missing.why}. "
                f"To have it: {missing.remedy}"
            )
    return f"built, for {' and '.join(devices)}"


def _check_key() -> str:
    if PdConfig.parse({}, os.environ).cluster_key is None:
        return f"{CLUSTER_KEY_VARIABLE} is not set: engines bind loopback only"
    return f"{CLUSTER_KEY_VARIABLE} is set: the control channel is encrypted"


if __name__ == "__main__":
    sys.exit(main())

"""``vllm-pd``: what a person asks of the plug-in itself."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from vllm_pd_plugin import CONNECTOR, __version__
from vllm_pd_plugin.config import CLUSTER_KEY_VARIABLE, PdConfig
from vllm_pd_plugin.errors import PdError

_EPILOG = """examples:
  vllm-pd check                      say whether this machine can run the connector
  vllm serve MODEL --kv-connector pdplugin --kv-role prefill --port 8100
  vllm serve MODEL --kv-connector pdplugin --kv-role decode --port 8200
  vllm-pd serve MODEL --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
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
    commands.add_parser("serve", help="serve one OpenAI endpoint over engines", add_help=False)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:  # the rest is for vLLM's own parser
        return serve(arguments[1:])
    parser.parse_args(arguments)
    return check()


def serve(arguments: Sequence[str]) -> int:
    """Serve one OpenAI endpoint; returns the exit status."""
    import uvloop
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_pd_plugin.frontend import options
    from vllm_pd_plugin.frontend.app import serve as serve_frontend

    cli_env_setup()
    parser = FlexibleArgumentParser(
        prog="vllm-pd serve",
        description=_SERVE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser = make_arg_parser(parser)
    options.add_engine_options(parser)
    options.add_frontend_options(parser)
    parser.set_defaults(host="127.0.0.1")
    args = parser.parse_args(list(arguments))
    args.model = args.model_tag or args.model
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    if not (args.decode or args.both):
        parser.error("name at least one engine that decodes: --decode URL, or --both URL")
    try:
        uvloop.run(serve_frontend(args, options.parse_options(args)))
    except PdError as error:
        print(f"vllm-pd serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def check() -> int:
    """Print one line for each thing that the connector needs; 0 if all are there."""
    checks = {
        "vLLM": _check_vllm,
        "NIXL": _check_nixl,
        "connector": _check_connector,
        "native extension": _check_extension,
        "cluster key": _check_key,
    }
    failures = 0
    for name, function in checks.items():
        try:
            print(f"ok    {name}: {function()}")
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
    from vllm_pd_plugin.nixl_transport import NixlTransport

    transport = NixlTransport("DRAM", 0)
    transport.register([])
    transport.close()
    return importlib.metadata.version("nixl")


def _check_connector() -> str:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return str(KVConnectorFactory.get_connector_class_by_name(CONNECTOR).__name__)


def _check_extension() -> str:
    from vllm_pd_plugin.ops import HAS_NATIVE

    return "built" if HAS_NATIVE else "not built: slower ops in PyTorch take its place"


def _check_key() -> str:
    if PdConfig.parse({}, os.environ).cluster_key is None:
        return f"{CLUSTER_KEY_VARIABLE} is not set: engines bind loopback only"
    return f"{CLUSTER_KEY_VARIABLE} is set: the control channel is encrypted"


if __name__ == "__main__":
    sys.exit(main())

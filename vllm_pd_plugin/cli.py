"""``vllm-pd``: what a person asks of the plug-in itself."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping, Sequence

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
  vllm-pd doctor http://127.0.0.1:8100 http://127.0.0.1:8200    try one handoff between two engines
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
    commands.add_parser(
        "doctor", help="make one handoff between two engines, and say what is wrong"
    )
    arguments = list(sys.argv[1:] if argv is None else argv)
    others = {"serve": serve, "up": up, "engines": engines, "top": top, "doctor": doctor}
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


def doctor(arguments: Sequence[str]) -> int:
    """Make one handoff between two engines that run; returns the exit status."""

    def run() -> int:
        from vllm_pd_plugin.frontend.doctor import command

        return command.doctor(arguments)

    return _say_errors("doctor", run)


def _say_errors(name: str, run: Callable[[], int]) -> int:
    try:
        return run()
    except PdError as error:
        print(f"vllm-pd {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def serve(arguments: Sequence[str]) -> int:
    """Serve one OpenAI endpoint over engines that run; returns the exit status."""
    environ = dict(os.environ)  # before vLLM changes it
    from vllm_pd_plugin.frontend import commands

    return commands.serve(arguments, environ)


def up(arguments: Sequence[str]) -> int:
    """Start engines on this machine and serve them; returns the exit status."""
    environ = dict(os.environ)  # before vLLM changes it
    from vllm_pd_plugin.frontend import commands

    return commands.up(arguments, environ)


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
        except (PdError, ImportError, OSError, RuntimeError) as error:
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

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
    parser.parse_args(argv)
    return check()


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

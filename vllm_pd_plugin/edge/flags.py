"""``--kv-connector`` and ``--kv-role``, for which vLLM's command line offers no hook.

They are merged into ``--kv-transfer-config`` while the arguments are parsed, because API server
processes build their engine arguments from the parsed namespace before they load any plugin.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from typing import Any

from vllm_pd_plugin import CONNECTOR
from vllm_pd_plugin.compat import require_supported_vllm
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.errors import ConfigError, PdError

ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}


def add_flags(parser: Any) -> None:
    """Add ``--kv-connector`` and ``--kv-role`` to a parser, and merge them when it parses."""
    if "--kv-connector" in parser._option_string_actions:
        return
    group = parser.add_argument_group(
        title="vllm-pd-plugin",
        description="Disaggregated prefill and decode. Example: "
        "vllm serve MODEL --kv-connector pdplugin --kv-role prefill",
    )
    group.add_argument(
        "--kv-connector",
        choices=[CONNECTOR],
        help="Hand KV from engine to engine with this connector. Its options go into "
        "--kv-transfer-config.kv_connector_extra_config.NAME VALUE; other connectors are chosen "
        "with --kv-transfer-config.",
    )
    group.add_argument(
        "--kv-role",
        choices=list(ROLES),
        help="What this engine does: prefill (produces KV), decode (consumes KV), or both. "
        "Default: both.",
    )
    parse_known_args = parser.parse_known_args

    @functools.wraps(parse_known_args)
    def parse_and_merge(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        namespace, rest = parse_known_args(*args, **kwargs)
        try:
            merge_flags(namespace)
        except PdError as error:
            parser.error(str(error))
        return namespace, rest

    parser.parse_known_args = parse_and_merge


def merge_flags(namespace: argparse.Namespace) -> None:
    """Move the flags into ``namespace.kv_transfer_config``; idempotent.

    Raises:
        PdError: the flags contradict each other or the JSON, or an option is refused.
    """
    connector = getattr(namespace, "kv_connector", None)
    role = getattr(namespace, "kv_role", None)
    config = _as_dict(getattr(namespace, "kv_transfer_config", None))
    if (connector or config.get("kv_connector")) != CONNECTOR:
        if role is not None:
            raise ConfigError(f"--kv-role {role} needs --kv-connector {CONNECTOR}")
        return
    wanted = {"kv_connector": connector, "kv_role": ROLES[role] if role else None}
    for key, value in wanted.items():
        if value is not None and config.get(key, value) != value:
            raise ConfigError(
                f"--{key.replace('_', '-')} says {value!r}, --kv-transfer-config says "
                f"{config[key]!r}; give {key} in one place only"
            )
    config |= {key: value for key, value in wanted.items() if value is not None}
    config.setdefault("kv_role", ROLES["both"])
    require_supported_vllm()
    PdConfig.parse(config.get("kv_connector_extra_config") or {}, os.environ)
    from vllm.config import KVTransferConfig

    try:
        namespace.kv_transfer_config = KVTransferConfig(**config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--kv-transfer-config is refused: {error}") from error


def _as_dict(config: Any) -> dict[str, Any]:
    """Return only what was set, so that vLLM's own defaults and checks still apply."""
    if config is None:
        return {}
    if isinstance(config, str):
        config = json.loads(config)
    if isinstance(config, dict):
        return dict(config)
    return {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_") and value is not None
    }

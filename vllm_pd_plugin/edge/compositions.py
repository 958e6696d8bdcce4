"""Our connector where it is one of several: vLLM's MultiConnector asks each in turn.

KV is loaded by the first that has any, so ours comes first: a handoff that was asked for goes
before what another has stored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_pd_plugin import CONNECTOR
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.compat import require_supported_vllm
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MULTI = "MultiConnector"
BESIDE_US = ("LMCacheMPConnector", "ExampleConnector", "OffloadingConnector")
"""What may follow ours. The first two are tested on engines, the last by its hooks and their order
only: it refuses CPUs."""

_POLICY = "kv_load_failure_policy"


def own_connector(connector: Any) -> Any:
    """Return our connector, by itself or among others; None where it is not there."""
    from vllm_pd_plugin.edge.connector import PdConnector

    if connector is None or isinstance(connector, PdConnector):
        return connector
    found = map(own_connector, getattr(connector, "sub_connectors", ()))
    return next((each for each in found if each is not None), None)


def own_config(vllm_config: VllmConfig) -> Mapping[str, Any] | None:
    """Return our options, by themselves or among those of other connectors; None where our
    connector was not chosen."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return None
    if transfer.kv_connector == CONNECTOR:
        return dict(transfer.kv_connector_extra_config)
    for each in _parts(transfer):
        if each.get("kv_connector") == CONNECTOR:
            return dict(each.get("kv_connector_extra_config") or {})
    return None


def refuse_bad_config(vllm_config: VllmConfig, options: Mapping[str, Any]) -> None:
    """Refuse what cannot work with our connector, before anything is loaded.

    Raises:
        PdError: one line that names the option and what is allowed.
    """
    from vllm_pd_plugin.edge import geometry

    require_supported_vllm()
    config = PdConfig.parse(options, os.environ)
    refuse_composition(vllm_config.kv_transfer_config)
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if len(_parts(vllm_config.kv_transfer_config)) > 1 and stages > 1:
        raise UnsupportedError(
            f"--pipeline-parallel-size={stages} is not supported beside another connector of "
            f"{MULTI}: those do not tell its stages apart; leave them out, or use 1"
        )
    if len(_parts(vllm_config.kv_transfer_config)) > 1 and config.narrowest is not Codec.RAW:
        raise UnsupportedError(
            f"codec and lossy_max allow lossy codecs beside another connector of {MULTI}, which "
            "would keep such KV as if it were exact; set both to allow raw only"
        )
    geometry.refuse_unsupported(vllm_config)
    geometry.control_port(vllm_config, config.port)


def refuse_composition(transfer: Any) -> None:
    """Refuse our connector among others with which it was not tested. Raises UnsupportedError."""
    parts = _parts(transfer)
    if not parts:
        return
    names = [str(part.get("kv_connector")) for part in parts]
    first, *others = names
    if first != CONNECTOR or any(name not in BESIDE_US for name in others):
        raise UnsupportedError(
            f"{MULTI} with {names} is not supported by pdplugin; supported is pdplugin first, "
            f"then any of {', '.join(BESIDE_US)}"
        )
    ours, whole = parts[0].get(_POLICY, "fail"), getattr(transfer, _POLICY, "fail")
    if ours != whole:
        raise UnsupportedError(
            f"{_POLICY} is {ours!r} for pdplugin and {whole!r} for {MULTI}; give both the same"
        )


def _parts(transfer: Any) -> list[Mapping[str, Any]]:
    """Return what a MultiConnector is made of; nothing where it is another connector."""
    if transfer is None or transfer.kv_connector != MULTI:
        return []
    return list(transfer.kv_connector_extra_config.get("connectors") or ())

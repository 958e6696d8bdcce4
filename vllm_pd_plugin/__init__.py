"""Disaggregated prefill and decode for vLLM: KV connector ``pdplugin``, command ``vllm-pd``."""

from __future__ import annotations

__version__ = "0.1.0"

CONNECTOR = "pdplugin"
"""The name to give to ``--kv-connector``."""

_MODULE, _CLASS = "vllm_pd_plugin.edge.connector", "PdConnector"


def register() -> None:
    """Make the connector and its flags known to vLLM (entry point ``vllm.general_plugins``).

    vLLM calls this in every process, perhaps twice, and dies of an exception here: whatever is
    wrong is logged, and reported again when the connector is chosen.
    """
    import logging

    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        from vllm_pd_plugin.edge import hooks

        # By its class's name, too: vLLM's MultiConnector looks for the statistics of its parts so.
        for name in (CONNECTOR, _CLASS):
            if name not in KVConnectorFactory._registry:
                KVConnectorFactory.register_connector(name, _MODULE, _CLASS)
        hooks.install()
        hooks.log_like_vllm()
    except Exception:
        logging.getLogger(__name__).exception(
            "vllm-pd-plugin %s could not register with this vLLM; connector %s is not available",
            __version__,
            CONNECTOR,
        )

"""vLLM's MessagePack for what comes from another process that is not its own: never unpickled.

vLLM's decoder unpickles when ``VLLM_ALLOW_INSECURE_SERIALIZATION`` is set, which is meant for its
own processes only.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.serial_utils import CUSTOM_TYPE_RAW_VIEW, MsgpackDecoder

from vllm_pd_plugin.protocol.framing import WireError


class PeerDecoder(MsgpackDecoder):  # type: ignore[misc]
    """Decodes data and nothing else. Not thread-safe."""

    def ext_hook(self, code: int, data: memoryview) -> Any:
        if code != CUSTOM_TYPE_RAW_VIEW:
            raise WireError(f"a value of extension type {code} is not data")
        return data

    def _decode_utility_result(self, obj: Any) -> Any:
        raise WireError("a result of a utility call is not expected here")

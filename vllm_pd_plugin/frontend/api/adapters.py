"""LoRA adapters over a pool.

A frontend loads none: it knows an adapter's name and path, and says both with each request. Each
engine loads an adapter when the first request for it comes, from the path as it is there.
"""

from __future__ import annotations

import hashlib
import uuid
from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_pd_plugin.frontend.pool.members import Pool

_FIRST_NUMBER, _END = 1 << 20, 1 << 31
"""Above what an engine's own API server counts to, and what fits where vLLM keeps numbers."""


def number_adapter(lora: LoRARequest) -> None:
    """Give an adapter the number that engines know it by, the same at every frontend: vLLM counts
    from 1 in each API server, and engines would take one frontend's adapter for another's.

    One that is to be loaded anew in place is another adapter to the engines.
    """
    again = uuid.uuid4().hex if lora.load_inplace else ""
    lora.load_inplace = False
    text = "\0".join((lora.lora_name, lora.lora_path, again))
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    lora.lora_int_id = _FIRST_NUMBER + int.from_bytes(digest, "big") % (_END - _FIRST_NUMBER)


def refuse_without_lora(pool: Pool) -> None:
    """Raise VLLMValidationError where engines that decode are up, and none takes adapters, nor has
    one that is not there now."""
    decodes = [m for m in pool if m.role.decodes]
    with_lora = [m for m in decodes if m.kv is not None and m.link.description.has_lora]
    if not with_lora and any(m.is_up for m in decodes):
        raise VLLMValidationError(
            "no engine that decodes takes LoRA adapters; start engines with --enable-lora"
        )

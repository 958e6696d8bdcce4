"""Which engines that are there can be used together; pure.

The KV of a pool is what its decode engines' is: they write the answers. So a prefill engine of
other weights is refused, and never the other way; among decode engines that differ, the one named
first counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vllm_pd_plugin.compat import understand_each_other
from vllm_pd_plugin.engine_port.messages import EngineDescription
from vllm_pd_plugin.engine_port.served_options import differing_option
from vllm_pd_plugin.frontend.routing.choice import Role
from vllm_pd_plugin.memory.identity import KvIdentity, difference


@dataclasses.dataclass(frozen=True, slots=True)
class Requirement:
    """What an engine must be to be used: as long a context, the same vocabulary, the same vLLM.

    vocab_size: None while that is not known. several_kinds: engines whose KV differs are used side
        by side, each kind for itself. options: what the frontend takes its engines to sample by,
        see ``served_options``; empty while that is not known.
    """

    max_model_len: int
    vocab_size: int | None
    several_kinds: bool
    vllm_version: str
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


def misfit(
    engine: EngineDescription,
    role: Role,
    wanted: Requirement | None,
    pool: KvIdentity | None = None,
) -> str:
    """Say why an engine that is there cannot be used; empty if it can.

    role: as the operator has sorted it in. pool: what the pool's KV is; None while nobody says so.
    """
    if engine.role not in (Role.BOTH.value, role.value):
        return f"it is named as {role}, and was started with --kv-role {engine.role}"
    if wanted is not None:
        if engine.max_model_len < wanted.max_model_len:
            return (
                f"its --max-model-len is {engine.max_model_len}, and this frontend serves "
                f"{wanted.max_model_len}"
            )
        if wanted.vocab_size not in (None, engine.vocab_size):
            return f"it runs {engine.model}, which has another vocabulary than this frontend's"
        if not understand_each_other(engine.vllm_version, wanted.vllm_version):
            return f"it runs vLLM {engine.vllm_version}, and this frontend {wanted.vllm_version}"
        if found := differing_option(wanted.options, engine.options):
            return found
    # What a prefill engine computes can be converted; those that decode are to answer alike.
    is_strict = role.decodes
    if pool is not None and (other := difference(pool, engine.kv, is_strict)):
        return f"its KV does not go with that of the decode engines ({engine.model}): {other}"
    return ""

"""How an engine says that it does not take a request because of what is in it.

It is an output of vLLM's own, so that it is counted and ordered like every other: it ends the
request with an error, as an engine's own faults do, and the reason follows a mark that vLLM sets
nowhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from vllm_pd_plugin.errors import PdError
from vllm_pd_plugin.ids import RequestId

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

_MARK = "pd-refused: "
_MAX_TEXT = 1000


class RefusedError(PdError):
    """The request is wrong, and would be on any engine like this one; the message says how."""


def refusal(request_id: RequestId, why: str) -> EngineCoreOutput:
    """Return the output that refuses a request."""
    output = EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)
    refuse(output, why)
    return output


def refuse(output: EngineCoreOutput, why: str) -> None:
    """Say in an output that ends a request with an error that the request is to blame."""
    output.stop_reason = _MARK + why[:_MAX_TEXT]


def refusal_of(output: EngineCoreOutput) -> str | None:
    """Return why an engine refuses a request; None where it does not."""
    reason = output.stop_reason
    if output.finish_reason is not FinishReason.ERROR or not isinstance(reason, str):
        return None
    return reason.removeprefix(_MARK) if reason.startswith(_MARK) else None


def check(request: EngineCoreRequest, config: VllmConfig) -> None:
    """Refuse what the engine's own thread would not survive. Raises RefusedError."""
    prompt = request.prompt_token_ids
    if request.sampling_params is None or request.pooling_params is not None or not prompt:
        raise RefusedError("only a prompt of tokens to go on from can be served")
    if request.prompt_embeds is not None or request.mm_features:
        raise RefusedError("only text can be served")
    if request.resumable or request.abort_immediately:
        raise RefusedError("a session cannot be served")
    if len(prompt) >= config.model_config.max_model_len:
        raise RefusedError(f"a prompt of {len(prompt)} tokens is too long")
    if min(prompt) < 0 or max(prompt) >= config.model_config.get_vocab_size():
        raise RefusedError("the prompt has tokens that the model does not know")
    if request.lora_request is not None and config.lora_config is None:
        raise RefusedError("this engine has no LoRA adapters")


def refuse_bad_grammar(output: EngineCoreOutput, request: Request | None) -> None:
    """Say of a request that has ended with an error if its grammar is why: it is none anywhere."""
    if request is None or output.finish_reason is not FinishReason.ERROR:
        return
    wanted = request.structured_output_request
    if wanted is not None and isinstance(wanted.grammar, Exception):
        refuse(output, f"the grammar does not compile: {wanted.grammar}")

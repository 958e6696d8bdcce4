"""vLLM's MessagePack from another process: data, and nothing that runs."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.fakes.courses import PROMPT, make_request, sampling_of
from vllm_pd_plugin.protocol.framing import WireError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.outputs import LogprobsLists
    from vllm.v1.serial_utils import CUSTOM_TYPE_CLOUDPICKLE, CUSTOM_TYPE_PICKLE, MsgpackEncoder

    from vllm_pd_plugin.engine_port.peer_decoder import PeerDecoder


class Dangerous:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self._path,))


@pytest.mark.parametrize("insecure", ["0", "1"])
@pytest.mark.parametrize("code", [CUSTOM_TYPE_PICKLE, CUSTOM_TYPE_CLOUDPICKLE, 99])
def test_nothing_is_unpickled_whatever_vllm_is_allowed(
    code: int, insecure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", insecure)
    path = tmp_path / "was unpickled"
    value = msgspec.msgpack.Ext(code, pickle.dumps(Dangerous(path)))
    with pytest.raises((WireError, msgspec.ValidationError)):
        PeerDecoder().decode([msgspec.msgpack.encode(value)])
    assert not path.exists()


def test_a_request_is_read_as_it_was_written() -> None:
    request = make_request("r", stop_token_ids=[3], logprobs=2)
    frames = [bytes(frame) for frame in MsgpackEncoder().encode(request)]
    read = PeerDecoder(EngineCoreRequest).decode(frames)
    assert (read.request_id, read.prompt_token_ids) == ("r", PROMPT)
    assert sampling_of(read) == sampling_of(request)


@pytest.mark.parametrize("rows", [1, 1000])
def test_arrays_are_read_inside_and_beside_a_message(rows: int) -> None:
    """vLLM sends long arrays as frames of their own."""
    ids = np.arange(2 * rows, dtype=np.int32).reshape(rows, 2)
    logprobs = LogprobsLists(ids, -ids.astype(np.float32), np.arange(rows, dtype=np.int32))
    output = EngineCoreOutput("r", [5], new_logprobs=logprobs)
    encoded = MsgpackEncoder().encode(EngineCoreOutputs(outputs=[output]))
    frames = [bytes(frame) for frame in encoded]
    assert (len(frames) > 1) is (rows > 1)
    (read,) = PeerDecoder(EngineCoreOutputs).decode(frames).outputs
    assert read.new_logprobs is not None
    assert np.array_equal(read.new_logprobs.logprob_token_ids, ids)
    assert np.array_equal(read.new_logprobs.logprobs, -ids.astype(np.float32))

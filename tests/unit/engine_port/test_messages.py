"""What frontends and engines say to each other."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fakes.engines import make_kv
from vllm_pd_plugin.engine_port import messages
from vllm_pd_plugin.ids import Incarnation, new_handoff_id, new_incarnation
from vllm_pd_plugin.protocol import framing, wire
from vllm_pd_plugin.protocol.framing import (
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    PROTOCOL_VERSION,
    Header,
)

SENDER, TARGET = new_incarnation(), new_incarnation()
LOAD = messages.EngineLoad(3, 2, 1000, 0.25)
DESCRIPTION = messages.EngineDescription(
    engine_id="engine",
    role="both",
    model="model",
    vllm_version="0.32.0",
    control_host="::1",
    control_port=7000,
    max_model_len=4096,
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    data_parallel_size=1,
    codecs=("auto", "raw"),
    vocab_size=1000,
    kv=make_kv(),
    kv_tokens=100_000,
    block_tokens=16,
)
MESSAGES: list[messages.Message] = [
    messages.Attach("frontend"),
    messages.Attached(DESCRIPTION, LOAD),
    messages.Add("r"),
    messages.Abort(("r", "s")),
    messages.Abort(()),
    messages.Ping(),
    messages.Outputs(7),
    messages.State(LOAD, 7),
    messages.Blocks((messages.Stored(None, (b"a", 2), (5, 6), 1), messages.Removed((b"a",)))),
    messages.Blocks((messages.Cleared(), messages.Stored(b"a", (b"b",), (7,), 1))),
    messages.Unknown(),
]


def name_of(message: messages.Message) -> str:
    return type(message).__name__


def header(kind: str = "ping", version: int = PROTOCOL_VERSION) -> bytes:
    return msgspec.msgpack.encode(Header(version, kind, SENDER, TARGET))


def body(message: messages.Message | None = None) -> bytes:
    return msgspec.msgpack.encode(message or messages.Ping())


@pytest.mark.parametrize("message", MESSAGES, ids=name_of)
@pytest.mark.parametrize("payload", [[], [b"one"], [b"one", b"", b"three"]])
def test_what_was_said_is_understood(message: messages.Message, payload: list[bytes]) -> None:
    frames = messages.encode(message, SENDER, TARGET, payload)
    assert messages.is_ours(frames)
    read, understood, rest = messages.decode(frames)
    assert (understood, rest) == (message, payload)
    assert (read.sender, read.target, read.version) == (SENDER, TARGET, PROTOCOL_VERSION)


def test_every_kind_of_message_is_tried_here() -> None:
    assert {type(message) for message in MESSAGES} == set(messages._KINDS.values())


@pytest.mark.parametrize("message", MESSAGES, ids=name_of)
def test_a_message_is_short_and_its_payload_is_not_copied(message: messages.Message) -> None:
    payload = [bytes(1000)]
    frames = messages.encode(message, SENDER, TARGET, payload)
    assert frames[2] is payload[0]
    assert sum(len(frame) for frame in frames[:2]) < 512


def test_a_message_between_engines_is_none_of_ours() -> None:
    for message in (wire.Want(new_handoff_id()), wire.Hello("engine")):
        frames = framing.encode(message, SENDER, TARGET)
        assert not messages.is_ours(frames)
        with pytest.raises(framing.WireError, match="unknown kind"):
            messages.decode(frames)


@pytest.mark.parametrize("message", MESSAGES, ids=name_of)
def test_ours_is_no_message_between_engines(message: messages.Message) -> None:
    with pytest.raises(framing.WireError):
        framing.decode(messages.encode(message, SENDER, TARGET)[:2])


def test_another_version_is_told_apart_and_is_still_ours() -> None:
    frames = [header(version=PROTOCOL_VERSION + 1), body()]
    assert messages.is_ours(frames)
    with pytest.raises(framing.VersionError) as caught:
        messages.decode(frames)
    assert caught.value.theirs == PROTOCOL_VERSION + 1


BAD: dict[str, list[bytes]] = {
    "nothing": [],
    "a header alone": [header()],
    "empty frames": [b"", b""],
    "a body of another kind": [header("add"), body(messages.Ping())],
    "an unknown kind": [header("hello"), body()],
    "a body with something behind it": [header(), body() + b"\x00"],
    "half a body": [header("abort"), body(messages.Abort(("r",)))[:-1]],
    "a header with something behind it": [header() + b"\x00", body()],
    "a header that is too long": [header() + bytes(MAX_HEADER_BYTES), body()],
    "a negative count": [header("outputs"), msgspec.msgpack.encode(["outputs", -1])],
    "a count that is none": [header("outputs"), msgspec.msgpack.encode(["outputs", "1"])],
    "a request id that is none": [header("add"), msgspec.msgpack.encode(["add", 5])],
    "text that is none": [header("add"), b"\x92\xa3add\xa2\xff\xfe"],
    "a nested abyss": [header(), b"\x91" * 100_000],
}


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_refused(name: str) -> None:
    with pytest.raises(framing.WireError):
        messages.decode(BAD[name])


def test_a_body_that_is_too_long_is_not_even_read() -> None:
    with pytest.raises(framing.WireError, match="allowed size"):
        messages.decode([header(), bytes(MAX_BODY_BYTES + 1)])


@pytest.mark.parametrize("frames", [[], [b""], [b"\xc1"], [header() + bytes(MAX_HEADER_BYTES)]])
def test_what_has_no_header_is_not_ours(frames: list[bytes]) -> None:
    assert not messages.is_ours(frames)


@given(frames=st.lists(st.binary(max_size=64), max_size=4))
@example(frames=[header("attach"), b""])
def test_no_bytes_at_all_do_harm(frames: list[bytes]) -> None:
    messages.is_ours(frames)
    try:
        messages.decode(frames)
    except framing.WireError:
        return


@given(data=st.data())
def test_no_damage_to_a_message_does_harm(data: st.DataObject) -> None:
    """It is refused, or read as something that may be said."""
    frames = messages.encode(data.draw(st.sampled_from(MESSAGES)), SENDER, TARGET, [b"payload"])
    which = data.draw(st.integers(0, 1))
    damaged = bytearray(frames[which])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    frames[which] = bytes(damaged)
    messages.is_ours(frames)
    try:
        _, message, _ = messages.decode(frames)
    except framing.WireError:
        return
    assert type(message) in messages._KINDS.values()


_counts = st.integers(0, 2**40)


@given(
    loads=st.tuples(_counts, _counts, _counts, st.floats(0, 1)),
    ids=st.lists(st.text(max_size=40)),
    number=_counts,
    payload=st.lists(st.binary(max_size=40), max_size=3),
)
def test_whatever_the_numbers_are_it_is_understood(
    loads: Any, ids: list[str], number: int, payload: list[bytes]
) -> None:
    load = messages.EngineLoad(*loads)
    for message in (
        messages.State(load, number),
        messages.Abort(tuple(ids)),
        messages.Outputs(number),
    ):
        frames = messages.encode(message, SENDER, Incarnation(""), payload)
        assert messages.decode(frames)[1:] == (message, payload)

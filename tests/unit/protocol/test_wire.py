from __future__ import annotations

import contextlib
import typing

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.fakes.engines import full_group, make_kv, make_kv_cache, make_layout
from vllm_pd_plugin.codecs.codec import Codec, Part
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import HandoffId, Incarnation
from vllm_pd_plugin.memory.layout import RankMemory, Region, Span
from vllm_pd_plugin.protocol import framing, wire

A, B = Incarnation("a1" * 8), Incarnation("b2" * 8)
H = HandoffId("c3" * 16)
RANK = RankMemory((Region(2**63, 10, 32, 48),), b"\x00meta\xff")
STAGING_RANK = msgspec.structs.replace(RANK, staging=Span(2**63, 4096))
TABLES = (
    wire.TableSlice(2, (1, 2, 3)),
    wire.TableSlice(0, ()),
    wire.TableSlice(0, (0, 9)),
)
CHECK = wire.Check(H, 1, 0, 0, 400, 1000)
PARTS = (Part.of_rows("key", 4, 0, 8), Part.of_rows("value", 4, 4, 8))
LAYOUT = make_layout(
    groups=[msgspec.structs.replace(full_group("a"), block_strides=(16, 4, 1), parts=PARTS)]
)
KV_CACHE = make_kv_cache(LAYOUT, RANK, 2)
RUNS = (wire.LayerRun(2, 0, 3), wire.LayerRun(1, 0, 0))
PACK = wire.Pack(H, 1, 0, 0, 7, Codec.INT4, 100, RUNS, True)
GATHER = wire.Gather(H, 1, 0, 3, 7, 1, (2, 4), 1, 2, 16, 48, "bfloat16", True)
PACKED = wire.Packed(H, 1, 7, 256, 4096, b"\x00\xff")
EVERY_KIND: list[wire.Message] = [
    wire.Hello("engine", 5),
    wire.Welcome("engine", KV_CACHE, make_kv(), 3, (RANK, STAGING_RANK), 30.0),
    wire.Want(H),
    wire.Offer(H, 1000, b"\x00\xff", 3),
    wire.Subscribe(H, 1, 1, (1,)),
    wire.Progress(H, 1, (wire.Written(400, 700, 2), wire.Written()), TABLES),
    wire.Seal(H, 1, 1000, TABLES),
    wire.Commit(H, 1, 0, True),
    wire.Committed(H, 1, False),
    CHECK,
    wire.Checked(H, 1, b"\x00\xff"),
    PACK,
    GATHER,
    PACKED,
    wire.Unpacked(H, 0, 0, 7),
    wire.Refuse(H, Reason.LEASE_EXPIRED),
    wire.Heartbeat((H, H)),
    wire.Alive({H: Reason.CANCELLED}),
    wire.Batch((wire.Refuse(H, Reason.CANCELLED), wire.Alive({}))),
    wire.Cancel(H),
    wire.Announce(7, 1, 2),
    wire.Examine(CHECK, ((1, 2), ())),
    wire.Examined(CHECK, b"\x00\xff"),
    wire.Stage(PACK, ((1, 2), ()), Incarnation("rank")),
    wire.Stage(GATHER, ((1, 2), ()), Incarnation("rank")),
    wire.Staged(H, A, 0, 0, PACKED, None),
    wire.Staged(H, A, 0, 0, None, Reason.MISSING_BLOCKS),
    wire.Unstage(H, A, 0, 7),
    wire.Unstage(H),
    wire.Nudge(),
]


def header(version: object = framing.PROTOCOL_VERSION, kind: object = "hello") -> bytes:
    return msgspec.msgpack.encode([version, kind, A, B])


def body_of(kind: str, *fields: bytes) -> bytes:
    """A MessagePack array of a tag and raw fields."""
    return bytes([0x91 + len(fields)]) + msgspec.msgpack.encode(kind) + b"".join(fields)


def seal_body(**changes: object) -> bytes:
    """The body of a seal with some fields changed; None leaves one out."""
    fields = {"type": "seal", "handoff_id": H, "epoch": 0, "num_tokens": 1, "tables": [[0, [1]]]}
    fields |= changes
    return msgspec.msgpack.encode([v for v in fields.values() if v is not None])


def test_the_body_that_is_spoilt_below_is_well_formed() -> None:
    _, message = framing.decode([header(kind="seal"), seal_body()])
    assert message == wire.Seal(H, 0, 1, (wire.TableSlice(0, (1,)),))


def refusal(frames: list[bytes]) -> str:
    with pytest.raises(framing.WireError) as caught:
        framing.decode(frames)
    assert not isinstance(caught.value, framing.VersionError)
    return str(caught.value)


@pytest.mark.parametrize("message", EVERY_KIND, ids=lambda m: type(m).__name__)
def test_every_kind_of_message_comes_back_as_it_was(message: wire.Message) -> None:
    frames = framing.encode(message, A, B)
    got, back = framing.decode(frames)
    assert back == message
    assert type(back) is type(message)
    assert (got.version, got.sender, got.target) == (framing.PROTOCOL_VERSION, A, B)


def test_no_kind_of_message_is_left_out_above() -> None:
    assert {type(m) for m in EVERY_KIND} == set(typing.get_args(wire.Message))


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_can_be_sent(reason: Reason) -> None:
    _, back = framing.decode(framing.encode(wire.Refuse(H, reason), A, B))
    assert isinstance(back, wire.Refuse)
    assert back.reason is reason


@pytest.mark.parametrize("version", [0, 1, framing.PROTOCOL_VERSION + 1, 2**63])
def test_another_version_is_told_apart_from_rubbish(version: int) -> None:
    with pytest.raises(framing.VersionError) as caught:
        framing.decode([header(version, "kind-of-the-future"), b"\xc1 not MessagePack"])
    assert caught.value.theirs == version
    assert f"version {version} of the control protocol" in str(caught.value)
    assert "run the same release" in str(caught.value)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_frames_is_refused(count: int) -> None:
    frames = framing.encode(wire.Want(H), A, B)
    refusal((frames + frames)[:count])


def test_a_header_of_excessive_size_is_refused() -> None:
    frames = framing.encode(wire.Want(H), A, Incarnation("x" * framing.MAX_HEADER_BYTES))
    assert "allowed size" in refusal(frames)


def test_a_body_of_excessive_size_is_refused_before_it_is_parsed() -> None:
    body = bytes(framing.MAX_BODY_BYTES + 1)
    assert "allowed size" in refusal([header(), body])


def test_an_unknown_kind_is_refused_and_shown_cut_short() -> None:
    message = refusal([header(kind="x" * 300), b"\x80"])
    assert "unknown kind" in message
    assert len(message) < 100


def test_a_body_of_another_kind_than_its_header_says_is_refused() -> None:
    want, cancel = framing.encode(wire.Want(H), A, B), framing.encode(wire.Cancel(H), A, B)
    assert "malformed want" in refusal([want[0], cancel[1]])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x80",
        b"\xc0",
        seal_body(handoff_id=None),
        seal_body(epoch=-1),
        seal_body(epoch=1.5),
        seal_body(num_tokens="1"),
        seal_body(num_tokens=-1),
        seal_body(tables=None),
        seal_body(tables=[[1.5]]),
        seal_body(tables=[[0, [1.5]]]),
        seal_body(tables=[[-1, [1]]]),
        seal_body(tables=[[1]]),
        seal_body()[:-1],
        seal_body() + b"\x00",
    ],
)
def test_a_malformed_body_is_refused(body: bytes) -> None:
    assert "malformed seal" in refusal([header(kind="seal"), body])


@pytest.mark.parametrize(
    "message",
    [
        wire.Progress(H, -1, (), ()),
        wire.Progress(H, 0, (wire.Written(-1, 0, 0),), ()),
        wire.Progress(H, 0, (wire.Written(0, -1, 0),), ()),
        wire.Progress(H, 0, (wire.Written(0, 0, -1),), ()),
        wire.Progress(H, 0, (), (wire.TableSlice(-1, ()),)),
        wire.Subscribe(H, -1, 1, (0,)),
        wire.Subscribe(H, 0, -1, (0,)),
        wire.Subscribe(H, 0, 1, (-1,)),
        wire.Commit(H, -1, 0, True),
        wire.Commit(H, 0, -1, True),
        wire.Committed(H, -1, True),
        wire.Announce(-1, 0, 0),
        wire.Announce(0, 0, -1),
        *(
            msgspec.structs.replace(PACK, **{field: -1})
            for field in ("epoch", "rank", "source_rank", "number", "num_tokens")
        ),
        *(
            msgspec.structs.replace(GATHER, **{field: -1})
            for field in (
                "epoch",
                "rank",
                "source_rank",
                "number",
                "group",
                "first_head",
                "num_heads",
                "start",
                "stop",
            )
        ),
        msgspec.structs.replace(GATHER, regions=(-1,)),
        *(
            msgspec.structs.replace(PACK, layers=(run,))
            for run in (
                wire.LayerRun(-1, 0, 1),
                wire.LayerRun(1, -1, 1),
                wire.LayerRun(1, 0, -1),
            )
        ),
        *(
            msgspec.structs.replace(PACKED, **{field: -1})
            for field in ("epoch", "number", "offset", "num_bytes")
        ),
        wire.Unpacked(H, -1, 0, 0),
        wire.Unpacked(H, 0, -1, 0),
        wire.Unpacked(H, 0, 0, -1),
        wire.Staged(H, A, -1, 0, None, None),
        wire.Staged(H, A, 0, -1, None, None),
        wire.Unstage(H, A, -1, 0),
        wire.Unstage(H, A, 0, -1),
    ],
    ids=str,
)
def test_a_negative_count_is_refused(message: wire.Message) -> None:
    assert "malformed" in refusal(framing.encode(message, A, B))


def test_an_unknown_reason_is_refused() -> None:
    body = msgspec.msgpack.encode({"type": "refuse", "handoff_id": H, "reason": "boredom"})
    assert "malformed refuse" in refusal([header(kind="refuse"), body])


@pytest.mark.parametrize("codec", Codec)
def test_every_codec_can_be_asked_for(codec: Codec) -> None:
    _, back = framing.decode(framing.encode(msgspec.structs.replace(PACK, codec=codec), A, B))
    assert isinstance(back, wire.Pack)
    assert back.codec is codec


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "int3"},
        {"codec": None},
        {"codec": 4},
        {"layers": [[1, 0]]},
        {"layers": [[1.5, 0, 1]]},
        {"layers": 3},
        {"digest": "yes"},
        {"num_tokens": 1.5},
    ],
    ids=str,
)
def test_a_malformed_request_for_a_piece_is_refused(change: dict[str, object]) -> None:
    fields = {"type": "pack"} | msgspec.structs.asdict(PACK)
    _, message = framing.decode(
        [header(kind="pack"), msgspec.msgpack.encode(list(fields.values()))]
    )
    assert message == PACK
    body = msgspec.msgpack.encode(list((fields | change).values()))
    assert "malformed pack" in refusal([header(kind="pack"), body])


@pytest.mark.parametrize("offset", ["1", None, -1])
def test_a_piece_that_lies_nowhere_is_refused(offset: object) -> None:
    frames = framing.encode(msgspec.structs.replace(PACKED, offset=offset), A, B)
    assert "malformed packed" in refusal(frames)


# msgspec raises UnicodeDecodeError for it, which is no MsgspecError.
@pytest.mark.parametrize(
    "frames",
    [
        [b"\x94\x01\xa2\xff\xfe\xa0\xa0", b""],
        [header(), body_of("hello", b"\xa2\xff\xfe")],
        [header(), b"\x92\xa2\xff\xfe\xa1e"],
    ],
    ids=["header", "field", "tag"],
)
def test_text_that_is_not_utf8_is_refused(frames: list[bytes]) -> None:
    refusal(frames)


# msgspec raises RecursionError where it skips an unknown field; it is no MsgspecError.
def test_a_deeply_nested_body_is_refused() -> None:
    deep = b"\x91" * 100_000 + b"\xc0"
    refusal([header(), body_of("hello", b"\xa1x", deep)])


# Heartbeats follow from it: one that is no time makes the consumer's control thread spin.
@pytest.mark.parametrize("lease_s", [float("nan"), 0.0, -1.0, 1e-9, 86_401.0])
def test_a_lease_that_is_no_time_is_refused(lease_s: float) -> None:
    refusal(framing.encode(wire.Welcome("engine", KV_CACHE, make_kv(), 0, (RANK,), lease_s), A, B))


def decode_anything(frames: list[bytes]) -> None:
    with contextlib.suppress(framing.WireError):
        framing.decode(frames)


# The headers are those of every kind, so that the bodies reach every
# decoder.
@settings(max_examples=400, deadline=None)
@given(
    frame=st.binary(max_size=200),
    kind=st.sampled_from([str(type(m).__struct_config__.tag) for m in EVERY_KIND]),
)
@example(frame=b"\x80", kind="hello")
def test_arbitrary_bytes_are_never_more_than_a_wire_error(frame: bytes, kind: str) -> None:
    decode_anything([frame, frame])
    decode_anything([header(kind=kind), frame])
    decode_anything([frame])


@settings(max_examples=200, deadline=None)
@given(
    message=st.sampled_from(EVERY_KIND),
    changes=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 10_000), st.integers(0, 255)),
        min_size=1,
        max_size=3,
    ),
)
def test_a_message_with_bytes_changed_is_never_more_than_a_wire_error(
    message: wire.Message, changes: list[tuple[int, int, int]]
) -> None:
    frames = [bytearray(frame) for frame in framing.encode(message, A, B)]
    for frame, position, value in changes:
        frames[frame][position % len(frames[frame])] = value
    decode_anything([bytes(frame) for frame in frames])

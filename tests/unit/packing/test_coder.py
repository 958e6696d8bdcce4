"""Pieces of real caches: what one engine writes down is what another takes into its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch

from tests.fakes.engines import make_layout
from vllm_pd_plugin.codecs.codec import TOKEN_GROUP, Codec, Part, encoding_of
from vllm_pd_plugin.memory.layout import BlockTables, Group, RankLayout, Stretch
from vllm_pd_plugin.memory.regions import region_of
from vllm_pd_plugin.packing.coder import BlockCoder, slab_digest
from vllm_pd_plugin.packing.pieces import Piece, Pieces

NUM_BLOCKS = 12
STAGING_BYTES = 2**20
pytestmark = pytest.mark.usefixtures("one_thread")
LOSSY = [codec for codec in Codec if codec is not Codec.RAW]
NOTHING = range(0)
Cache = Callable[[], torch.Tensor]


# --- caches ----------------------------------------------------------------------------------

HEADS, WIDTH = 2, 64


def rows_of(tokens: int) -> tuple[tuple[Part, ...], Cache]:
    """A head's tokens one after the other, each a key and a value: ``[B, H, N, C]``."""
    parts = (
        Part.of_rows("key", WIDTH, 0, 2 * WIDTH),
        Part.of_rows("value", WIDTH, WIDTH, 2 * WIDTH),
    )
    return parts, lambda: torch.zeros((NUM_BLOCKS, HEADS, tokens, 2 * WIDTH))


def tokens_before_heads(tokens: int) -> tuple[tuple[Part, ...], Cache]:
    """The same, in memory ``[B, N, H, C]``."""
    stride = HEADS * 2 * WIDTH
    parts = Part.of_rows("key", WIDTH, 0, stride), Part.of_rows("value", WIDTH, WIDTH, stride)
    return parts, lambda: torch.zeros((NUM_BLOCKS, tokens, HEADS, 2 * WIDTH)).transpose(1, 2)


def columns_and_rows(tokens: int) -> tuple[tuple[Part, ...], Cache]:
    """All of a head's keys channel by channel, and behind them its values token by token."""
    parts = (
        Part.of_columns("key", WIDTH, 0, tokens),
        Part.of_rows("value", WIDTH, tokens * WIDTH, WIDTH),
    )
    return parts, lambda: torch.zeros((NUM_BLOCKS, HEADS, tokens, 2 * WIDTH))


def tiles(tokens: int) -> tuple[tuple[Part, ...], Cache]:
    """Keys and values in tiles of four tokens by two channels, in different orders."""
    by_channel = (8, 2, 2 * tokens, 1)
    by_token = (4 * WIDTH, 1, 8, 4)
    parts = (
        Part("key", WIDTH, 0, 4, 2, by_channel),
        Part("value", WIDTH, tokens * WIDTH, 4, 2, by_token),
    )
    return parts, lambda: torch.zeros((NUM_BLOCKS, HEADS, tokens, 2 * WIDTH))


def mla(tokens: int) -> tuple[tuple[Part, ...], Cache]:
    """A latent and a rotary key for all heads together: ``[B, N, C]``."""
    parts = Part.of_rows("latent", 128, 0, 160), Part.of_rows("rope", 32, 128, 160)
    return parts, lambda: torch.zeros((NUM_BLOCKS, tokens, 160))


KINDS = [rows_of, tokens_before_heads, columns_and_rows, tiles, mla]
Kind = Callable[[int], tuple[tuple[Part, ...], Cache]]


@dataclasses.dataclass(frozen=True)
class Engine:
    """The caches of some groups of layers, and their coder."""

    layout: RankLayout
    caches: list[torch.Tensor]
    pieces: Pieces
    outgoing: torch.Tensor
    incoming: torch.Tensor

    @property
    def coder(self) -> BlockCoder:
        return BlockCoder(self.layout, self.pieces, self.caches, self.outgoing, self.incoming)

    def parts_of(self, layer: int) -> tuple[Part, ...]:
        return self.layout.groups[self.group_of(layer)].parts

    def group_of(self, layer: int) -> int:
        return [i for i, group in enumerate(self.layout.groups) for _ in group.layers][layer]

    def values(self, layer: int, part: Part, table: Sequence[int], tokens: int) -> torch.Tensor:
        """What a sequence has in one layer and part, ``[heads, tokens, width]``, element by
        element as ``Part`` says."""
        cache = self.caches[layer]
        heads = cache.shape[1] if cache.dim() == 4 else 1
        head_stride = cache.stride(1) if cache.dim() == 4 else 0
        block_tokens = cache.shape[-2]
        token = torch.arange(tokens)
        in_block = token % block_tokens
        channel = torch.arange(part.width)
        blocks = torch.tensor(list(table))[token // block_tokens]
        rows = blocks * cache.stride(0) + (
            in_block // part.token_tile * part.strides[0]
            + in_block % part.token_tile * part.strides[1]
        )
        columns = (
            channel // part.channel_tile * part.strides[2]
            + channel % part.channel_tile * part.strides[3]
        )
        head = torch.arange(heads) * head_stride
        places = head[:, None, None] + rows[None, :, None] + columns[None, None, :] + part.start
        memory = cache.as_strided((cache.untyped_storage().nbytes() // cache.element_size(),), (1,))
        return memory[places]


def engine(kinds: Sequence[Kind], tokens: Sequence[int], dtype: torch.dtype, seed: int) -> Engine:
    """Two layers of each kind; seed 0 leaves them empty."""
    groups, caches = [], []
    generator = torch.Generator().manual_seed(seed)
    for index, (kind, block_tokens) in enumerate(zip(kinds, tokens, strict=True)):
        parts, make = kind(block_tokens)
        layers = tuple(f"l.{index + len(kinds) * i}" for i in range(2))
        shape, strides = make().shape[1:], make().stride()[1:]
        name = str(dtype).removeprefix("torch.")
        groups.append(
            Group("full", block_tokens, None, layers, tuple(shape), name, tuple(strides), parts)
        )
        for _ in layers:
            cache = make().to(dtype)
            if seed:
                cache.copy_(torch.randn(cache.shape, generator=generator))
            caches.append(cache)
    layout = make_layout(groups=groups)
    pieces = Pieces(layout, [region_of(*pair) for pair in zip(layout.layers, caches, strict=True)])
    staging = (torch.zeros(STAGING_BYTES, dtype=torch.uint8) for _ in range(2))
    return Engine(layout, caches, pieces, *staging)


def move(
    producer: Engine,
    consumer: Engine,
    piece: Piece,
    codec: Codec,
    there: BlockTables,
    here: BlockTables,
) -> None:
    """Write a piece down, read it, take it in; its places in staging memory are not the same."""
    producer.coder.encode(piece, codec, there, 512)
    consumer.incoming[256 : 256 + piece.num_bytes] = producer.outgoing[512 : 512 + piece.num_bytes]
    consumer.coder.decode(piece, codec, here, 256)
    size = piece.num_bytes
    assert producer.coder.digest_outgoing(512, size) == consumer.coder.digest_incoming(256, size)
    assert not producer.outgoing[512 + size :].any(), "more was written than the piece has"


THERE = [[9, 3, 7, 1, 5, 11], [2, 4, 6, 8, 10, 1]]
HERE = [[2, 5, 8, 11, 4, 3], [7, 9, 1, 3, 5, 2]]


def allowed(values: torch.Tensor, part: Part, codec: Codec, tokens: range) -> torch.Tensor:
    """A bound for every value of some tokens that are written down together: the widest that any
    range of them has, and what rounding to bfloat16 adds."""
    encoding = encoding_of(codec, part)
    low, high = float(values[:, tokens].min()), float(values[:, tokens].max())
    return encoding.error_bound(low, high) + values.abs() * 2**-8 + 1e-6


# --- bit for bit -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_raw_pieces_arrive_bit_for_bit(kind: Kind, dtype: torch.dtype) -> None:
    producer, consumer = (engine([kind, rows_of], [16, 8], dtype, seed) for seed in (1, 0))
    stretch = (range(1, 4), range(1, 4), range(6), NOTHING)
    piece = producer.pieces.piece(stretch, 44, Codec.RAW)
    move(producer, consumer, piece, Codec.RAW, THERE, HERE)
    for layer, positions in enumerate(stretch):
        group = producer.group_of(layer)
        here = [HERE[group][i] for i in positions]
        there = [THERE[group][i] for i in positions]
        assert torch.equal(consumer.caches[layer][here], producer.caches[layer][there])
        elsewhere = [block for block in range(NUM_BLOCKS) if block not in here]
        assert not consumer.caches[layer][elsewhere].any()


# --- as small integers -----------------------------------------------------------------------


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 31, 32, 45, 64, 96])
def test_lossy_pieces_arrive_within_their_bounds(kind: Kind, codec: Codec, tokens: int) -> None:
    producer, consumer = (engine([kind], [16], torch.bfloat16, seed) for seed in (2, 0))
    positions = range(-(-tokens // 16))
    piece = producer.pieces.piece((positions,) * 2, tokens, codec)
    assert piece.num_bytes < piece.kv_bytes or tokens == 1
    move(producer, consumer, piece, codec, THERE[:1], HERE[:1])
    for layer in range(2):
        for part in producer.parts_of(layer):
            values = producer.values(layer, part, THERE[0], tokens).float()
            back = consumer.values(layer, part, HERE[0], tokens).float()
            bound = allowed(values, part, codec, range(tokens))
            assert ((back - values).abs() <= bound).all()
            assert not torch.equal(back, torch.zeros_like(back))


@pytest.mark.parametrize("codec", LOSSY)
def test_what_lies_behind_the_last_token_stays_as_it_is(codec: Codec) -> None:
    producer, consumer = (engine([rows_of], [16], torch.bfloat16, seed) for seed in (3, 4))
    before = [cache.clone() for cache in consumer.caches]
    piece = producer.pieces.piece((range(3), NOTHING), 37, codec)
    move(producer, consumer, piece, codec, THERE[:1], HERE[:1])
    last = HERE[0][2]
    assert torch.equal(consumer.caches[0][last, :, 5:], before[0][last, :, 5:])
    assert not torch.equal(consumer.caches[0][last, :, :5], before[0][last, :, :5])
    elsewhere = [block for block in range(NUM_BLOCKS) if block not in HERE[0][:3]]
    assert torch.equal(consumer.caches[0][elsewhere], before[0][elsewhere])
    assert torch.equal(consumer.caches[1], before[1])


@pytest.mark.parametrize("codec", LOSSY)
def test_two_engines_need_not_lay_their_blocks_out_alike(codec: Codec) -> None:
    """A slab has the same bytes whatever the layout; so have the values that come back."""
    there, here = rows_of, columns_and_rows
    producer, other, consumer = (
        engine([kind], [16], torch.bfloat16, seed)
        for kind, seed in ((there, 5), (there, 0), (here, 0))
    )
    piece = producer.pieces.piece((range(3), range(3)), 48, codec)
    for one in (other, consumer):
        move(producer, one, piece, codec, THERE[:1], HERE[:1])
    for layer in range(2):
        for ours, theirs in zip(other.parts_of(layer), consumer.parts_of(layer), strict=True):
            assert torch.equal(
                other.values(layer, ours, HERE[0], 48), consumer.values(layer, theirs, HERE[0], 48)
            )


def moved_in(cut: Sequence[Stretch], codec: Codec, tokens: int) -> Engine:
    """A consumer that has fetched in several pieces."""
    producer, consumer = (engine([rows_of, mla], [16, 8], torch.float32, s) for s in (6, 0))
    for stretch in cut:
        piece = producer.pieces.piece(stretch, tokens, codec)
        producer.outgoing.zero_()
        move(producer, consumer, piece, codec, THERE, HERE)
    return consumer


@pytest.mark.parametrize("codec", Codec)
def test_groups_of_tokens_may_be_moved_in_several_pieces(codec: Codec) -> None:
    """With whole groups of 32 tokens nothing changes, whichever layers and groups go together."""
    whole = moved_in([(range(4), range(4), range(6), range(6))], codec, tokens=64)
    several = moved_in(
        [
            (range(2), NOTHING, range(4), NOTHING),
            (NOTHING, range(4), range(4, 6), range(4)),
            (range(2, 4), NOTHING, NOTHING, range(4, 6)),
        ],
        codec,
        tokens=64,
    )
    assert TOKEN_GROUP == 2 * 16 == 4 * 8
    for ours, theirs in zip(whole.caches, several.caches, strict=True):
        assert torch.equal(ours, theirs)


def test_a_narrower_codec_is_less_exact() -> None:
    producer = engine([rows_of], [16], torch.bfloat16, 7)
    errors = []
    for codec in Codec:
        consumer = engine([rows_of], [16], torch.bfloat16, 0)
        piece = producer.pieces.piece((range(6), range(6)), 96, codec)
        producer.outgoing.zero_()
        move(producer, consumer, piece, codec, THERE[:1], HERE[:1])
        pairs = [(consumer.caches[i][HERE[0]], producer.caches[i][THERE[0]]) for i in range(2)]
        errors.append(max(float((a.float() - b.float()).abs().max()) for a, b in pairs))
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert len(set(errors)) == 4


# --- digests and speed -----------------------------------------------------------------------


def test_a_digest_depends_on_every_byte_and_on_their_number() -> None:
    slab = torch.arange(200).byte()
    expected = slab_digest(slab)
    assert len(expected) == 8
    assert slab_digest(slab[:-1]) != expected
    for place in (0, 7, 100, 199):
        changed = slab.clone()
        changed[place] ^= 1
        assert slab_digest(changed) != expected


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("kind", KINDS)
def test_every_codec_is_tried_on_blocks_that_are_not_in_use(kind: Kind, codec: Codec) -> None:
    one = engine([kind], [16], torch.bfloat16, 8)
    before = [cache.clone() for cache in one.caches]
    assert one.coder.speed(codec) > 0
    assert torch.equal(one.caches[0][0], before[0][0])
    assert torch.equal(one.caches[1], before[1])


def test_a_codec_whose_trial_does_not_fit_has_no_speed() -> None:
    one = engine([rows_of], [16], torch.bfloat16, 9)
    small = dataclasses.replace(one, outgoing=one.outgoing[:64])
    assert small.coder.speed(Codec.INT8) == 0

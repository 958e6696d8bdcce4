"""Pairs of engines as Hypothesis draws them: any shapes that are to go together."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence

from hypothesis import strategies as st

from tests.mapping.handoff import Pair
from tests.mapping.memory import Engine, heads_on
from tests.mapping.pages import FORMATS, STATE, page
from vllm_pd_plugin.mapping.kv_cache import (
    FP8,
    ITEM_BYTES,
    EngineKvCache,
    KvCacheGroup,
    KvCacheLayout,
    KvCacheSpec,
)
from vllm_pd_plugin.memory.layout import RankMemory, Region

BLOCKS = (1, 2, 3, 4, 4, 6, 8, 8, 12, 16)
SIZES = (1, 1, 2, 2, 3, 4, 4, 6, 8)
MAX_RANKS, MAX_LAYERS, MAX_TOKENS = 8, 5, 50
DTYPES = (
    ("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", "float16"), (FP8, FP8),
    ("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32"),
    ("float16", "bfloat16"), ("bfloat16", FP8),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """Layers that mean the same, and on each side (theirs, ours) how they lie.

    is_told: whether either side knows what is in its pages.
    """

    spec: KvCacheSpec
    blocks: tuple[int, int]
    forms: tuple[str, str]
    paddings: tuple[int, int]
    is_told: bool


@st.composite
def kinds(draw: st.DrawFn, sizes: tuple[int, int]) -> Kind:
    """Draw what some layers are, for such tensor parallel sizes."""
    is_equal = sizes[0] == sizes[1]
    names = ["full", "full", "sliding_window", "mla", *(["mamba"] if is_equal else [])]
    name = draw(st.sampled_from(names))
    divided = [n for n in range(1, 9) if all(n % size == 0 or size % n == 0 for size in sizes)]
    heads = 1 if name == "mla" else draw(st.sampled_from(divided))
    widths = draw(st.sampled_from([(2, 2), (4, 4), (4, 2)]))
    has_values = name in ("full", "sliding_window")
    parts = ("key", "value") if has_values else ("latent", "rope")
    window = draw(st.integers(1, 20)) if name == "sliding_window" else None
    spec = KvCacheSpec(name, heads, tuple(zip(parts, widths, strict=True)), window)
    is_told = name != "mamba" and not (is_equal and draw(st.integers(0, 7)) == 0)
    blocks = draw(st.tuples(st.sampled_from(BLOCKS), st.sampled_from(BLOCKS)))
    forms = draw(st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)))
    paddings = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    if draw(st.booleans()):
        forms = forms[0], forms[0]
    if not is_told:
        form = STATE if name == "mamba" else forms[0]
        blocks, forms, paddings = (blocks[0],) * 2, (form,) * 2, (paddings[0],) * 2
    return Kind(spec, blocks, forms, paddings, is_told)


@st.composite
def stages(draw: st.DrawFn, num_layers: int, most: int) -> list[range]:
    """Draw a division of the layers among pipeline stages."""
    count = draw(st.integers(1, min(3, num_layers, most)))
    inner = st.lists(
        st.integers(1, num_layers - 1), min_size=count - 1, max_size=count - 1, unique=True
    )
    cuts = [0, *sorted(draw(inner) if count > 1 else []), num_layers]
    return [range(start, stop) for start, stop in itertools.pairwise(cuts)]


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """Draw two engines of one model that are to go together, and a request."""
    sizes = draw(st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES)))
    model = draw(st.lists(kinds(sizes), min_size=1, max_size=3))
    of_layer = draw(st.lists(st.sampled_from(model), min_size=1, max_size=MAX_LAYERS))
    dtypes = draw(st.sampled_from(DTYPES))
    if not all(kind.is_told for kind in of_layer):
        dtypes = dtypes[0], dtypes[0]
    step = math.lcm(*(k.blocks[1] for k in of_layer if k.spec.kind == "mamba"))
    num_tokens = step * draw(st.integers(1, max(1, MAX_TOKENS // step)))
    shared = math.lcm(*(kind.blocks[1] for kind in of_layer))
    first_token = shared * draw(st.integers(0, (num_tokens - 1) // shared))
    rng = random.Random(draw(st.integers(0, 2**16)))
    engines = []
    for side in (0, 1):
        depth = draw(stages(len(of_layer), max(1, MAX_RANKS // sizes[side])))
        rank = draw(st.integers(0, 3)) if side else 0
        shape = Shape(sizes[side], tuple(depth), dtypes[side], rank)
        engines.append(engine(shape, side, of_layer, num_tokens, rng))
    cut, prefers_slabs = rng.randint(0, num_tokens), draw(st.integers(0, 3)) == 0
    return Pair(engines[0], engines[1], first_token, num_tokens, cut, prefers_slabs)


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """tp: tensor parallel size. stages: which layers each pipeline stage has. rank: which data
    parallel one it is."""

    tp: int
    stages: tuple[range, ...]
    dtype: str
    rank: int = 0


def engine(
    shape: Shape, side: int, of_layer: Sequence[Kind], num_tokens: int, rng: random.Random
) -> Engine:
    """Return an engine, the source (side 0) or ours (1); layers of a kind may be in two groups."""
    names = tuple(f"layers.{number}" for number in range(len(of_layer)))
    keys = [(of_layer.index(kind), rng.randint(0, 1)) for kind in of_layer]
    groups, parts, tables = [], [], []
    for key in sorted(set(keys), reverse=rng.random() < 0.5):
        kind = of_layer[key[0]]
        of_group = {name for name, other in zip(names, keys, strict=True) if other == key}
        layers = tuple(
            tuple(names[n] for n in stage if names[n] in of_group) for stage in shape.stages
        )
        heads = len(heads_on(kind.spec.num_heads, shape.tp, 0))
        block, form = kind.blocks[side], kind.forms[side]
        made = page(form, kind.spec.channels, heads, block)
        layout = KvCacheLayout(
            dtype=shape.dtype,
            block_tokens=block,
            page_bytes=(made.num_elements + kind.paddings[side]) * ITEM_BYTES[shape.dtype],
            layers=layers,
            page_format="" if kind.is_told else form,
            parts=made.parts if kind.is_told else (),
            head_stride=made.head_stride,
        )
        groups.append(KvCacheGroup(kind.spec, layout))
        parts.append(made.parts)
        tables.append(_table(groups[-1], num_tokens, rng))
    told = EngineKvCache(shape.tp, tuple(groups), shape.rank)
    num_blocks = max(max(table) for table in tables) + rng.randint(1, 3)
    ranks = tuple(
        _rank(told, rank // shape.tp, num_blocks, rng.random() < 0.5)
        for rank in range(told.num_ranks)
    )
    return Engine(told, tuple(parts), tuple(tables), ranks, names)


def _table(group: KvCacheGroup, num_tokens: int, rng: random.Random) -> tuple[int, ...]:
    """Return a block table; what a window has left behind is not there any more."""
    block = group.layout.block_tokens
    gone = group.needed_tokens(0, num_tokens).start // block
    length = -(-num_tokens // block) + rng.randint(0, 1)
    blocks = list(range(1, length + 3))
    if rng.random() < 0.7:
        rng.shuffle(blocks)
    return tuple(0 if n < gone else blocks[n] for n in range(length))


def _rank(told: EngineKvCache, stage: int, num_blocks: int, is_interleaved: bool) -> RankMemory:
    """Return where a rank's regions are: one behind the other, or block by block between those of
    other layers."""
    pages = [g.layout.page_bytes for g in told.groups for _ in g.layout.layers[stage]]
    before = list(itertools.accumulate(pages, initial=0))
    if is_interleaved:
        regions = [
            Region(start, num_blocks, size, before[-1])
            for start, size in zip(before[:-1], pages, strict=True)
        ]
    else:
        regions = [
            Region(num_blocks * start, num_blocks, size, size)
            for start, size in zip(before[:-1], pages, strict=True)
        ]
    return RankMemory(tuple(regions), b"")

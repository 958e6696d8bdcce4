"""Small descriptions of engines, to be changed in one place at a time."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from tests.mapping.handoff import Pair
from tests.mapping.pages import page
from tests.mapping.pairs import Kind, Shape, engine
from vllm_pd_plugin.mapping.kv_cache import (
    ITEM_BYTES,
    EngineKvCache,
    KvCacheGroup,
    KvCacheLayout,
    KvCacheSpec,
)

WIDTHS = (("key", 4), ("value", 4))
ROW = (("latent", 8), ("rope", 4))


def kv_cache(
    tp: int = 1,
    heads: int = 4,
    block: int = 16,
    form: str = "rows",
    dtype: str = "bfloat16",
    stages: tuple[tuple[str, ...], ...] = (("layers.0", "layers.1"),),
    rank: int = 0,
    **spec: Any,
) -> EngineKvCache:
    """Return an engine of one group, of full attention unless ``spec`` says otherwise."""
    means = KvCacheSpec(**{"kind": "full", "num_heads": heads, "channels": WIDTHS} | spec)
    made = page(form, means.channels, max(1, heads // tp), block)
    layout = KvCacheLayout(
        dtype,
        block,
        made.num_elements * ITEM_BYTES[dtype],
        stages,
        parts=made.parts,
        head_stride=made.head_stride,
    )
    return EngineKvCache(tp, (KvCacheGroup(means, layout),), rank)


def mla(tp: int, **others: Any) -> EngineKvCache:
    return kv_cache(tp, heads=1, kind="mla", channels=ROW, **others)


def opaque(form: str = "packed", **others: Any) -> EngineKvCache:
    """Return an engine that does not know what is in its pages."""
    return changed(kv_cache(**others), layout={"parts": (), "page_format": form})


def changed(
    engine: EngineKvCache,
    spec: dict[str, Any] | None = None,
    layout: dict[str, Any] | None = None,
    **fields: Any,
) -> EngineKvCache:
    """Return the same engine with something else in its first group, or in itself."""
    first, *others = engine.groups
    replace = msgspec.structs.replace
    group = KvCacheGroup(
        replace(first.spec, **(spec or {})), replace(first.layout, **(layout or {}))
    )
    return replace(engine, **{"groups": (group, *others)} | fields)


def request(
    blocks: tuple[int, int],
    forms: tuple[str, str] = ("rows", "rows"),
    sizes: tuple[int, int] = (1, 1),
    heads: int = 4,
    dtypes: tuple[str, str] = ("bfloat16", "bfloat16"),
    num_tokens: int = 200,
    first_token: int = 0,
    **spec: Any,
) -> Pair:
    """Return two engines of two layers in memory, and a request."""
    means = KvCacheSpec(**{"kind": "full", "num_heads": heads, "channels": WIDTHS} | spec)
    kind = Kind(means, blocks, forms, (0, 0), is_told=True)
    rng = random.Random(0)
    source, local = (
        engine(Shape(sizes[side], (range(2),), dtypes[side]), side, [kind, kind], num_tokens, rng)
        for side in (0, 1)
    )
    return Pair(source, local, first_token, num_tokens)

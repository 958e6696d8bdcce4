"""The staging memory of a rank, as its configuration says."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import torch

from tests.fakes.engines import make_layout
from vllm_pd_plugin.codecs.codec import Codec, Part
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.errors import UnsupportedError
from vllm_pd_plugin.memory.layout import Group, RankLayout
from vllm_pd_plugin.packing.incoming import Packing
from vllm_pd_plugin.packing.slabs import Slabs
from vllm_pd_plugin.packing.staging import ALIGNMENT

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = Part.of_rows("key", 64, 0, 128), Part.of_rows("value", 64, 64, 128)
LAYOUT: RankLayout = make_layout(
    groups=[Group("full", 16, None, ("l.0", "l.1"), (2, 16, 128), "bfloat16", parts=PARTS)]
)


def caches() -> list[torch.Tensor]:
    return [torch.zeros((8, 2, 16, 128), dtype=torch.bfloat16) for _ in range(2)]


def allocate(**options: object) -> Slabs | None:
    return Slabs.allocate(PdConfig.parse(options, {}), LAYOUT, caches())


def allocated(**options: object) -> Slabs:
    slabs = allocate(**options)
    assert slabs is not None
    return slabs


def test_a_half_is_for_what_is_packed_and_the_other_for_what_is_read() -> None:
    slabs = allocated(staging_bytes=2**20)
    assert slabs.outgoing.num_bytes == slabs.incoming.num_bytes == 2**19
    ours, theirs = slabs.outgoing, slabs.incoming
    assert abs(ours.address - theirs.address) >= 2**19


def test_each_half_is_a_multiple_of_the_alignment() -> None:
    assert allocated(staging_bytes=2**20 + 999).outgoing.num_bytes == 2**19 + ALIGNMENT


@pytest.mark.parametrize("staging_bytes", [0, 1, 2 * ALIGNMENT - 1])
def test_without_room_for_anything_there_is_no_staging_memory(staging_bytes: int) -> None:
    assert allocate(staging_bytes=staging_bytes) is None


@pytest.mark.parametrize("options", [{"codec": "int4"}, {"codec": "auto", "lossy_max": "int8"}])
def test_too_small_a_staging_memory_for_a_lossy_codec_is_refused_with_what_is_enough(
    options: dict[str, object],
) -> None:
    with pytest.raises(UnsupportedError, match="too small for a block of l.0") as caught:
        allocate(staging_bytes=8192, **options)
    enough = int(str(caught.value).split("use ")[1].split()[0])
    assert allocate(staging_bytes=enough, **options) is not None


def test_for_raw_kv_any_size_will_do() -> None:
    assert allocate(staging_bytes=8192) is not None


@pytest.mark.parametrize("packing", Packing)
def test_reads_are_packed_as_configured(packing: Packing) -> None:
    config = PdConfig.parse({"packing": packing.value}, {})
    slabs = Slabs.allocate(config, LAYOUT, caches())
    assert slabs is not None
    incoming = slabs.for_reads(config)
    assert (incoming.packing, incoming.span, incoming.coding) == (packing, slabs.incoming, {})
    assert incoming.room.max_piece_bytes == slabs.incoming.num_bytes // 4


@pytest.mark.parametrize(("device", "packing"), [("cpu", Packing.AUTO), ("cuda", Packing.NEVER)])
def test_nothing_is_packed_where_that_was_not_measured_and_nobody_asks_for_it(
    device: str, packing: Packing
) -> None:
    config = PdConfig.parse({}, {})
    slabs = Slabs.allocate(config, LAYOUT, caches())
    assert slabs is not None
    assert dataclasses.replace(slabs, device=device).for_reads(config).packing is packing
    asked = PdConfig.parse({"packing": "always"}, {})
    assert dataclasses.replace(slabs, device=device).for_reads(asked).packing is Packing.ALWAYS


@pytest.mark.parametrize(
    ("options", "tried"),
    [
        ({"codec": "auto"}, []),
        ({"codec": "auto", "lossy_max": "int4"}, [Codec.INT8, Codec.INT4]),
        ({"codec": "auto", "lossy_max": "int2"}, [Codec.INT8, Codec.INT4, Codec.INT2]),
        ({"codec": "int4"}, [Codec.INT8, Codec.INT4]),
        ({"lossy_max": "int2"}, [Codec.INT8, Codec.INT4, Codec.INT2]),
        ({}, []),
    ],
    ids=str,
)
def test_codecs_that_may_be_chosen_are_tried_the_widest_first(
    options: dict[str, object], tried: list[Codec]
) -> None:
    config = PdConfig.parse(options, {})
    slabs = Slabs.allocate(config, LAYOUT, caches())
    assert slabs is not None
    coding = slabs.for_reads(config).coding
    assert list(coding) == tried
    assert all(rate > 0 for rate in coding.values())


def test_a_cache_that_no_codec_knows_has_staging_memory_for_raw_pieces() -> None:
    group = msgspec.structs.replace(LAYOUT.groups[0], parts=())
    layout = make_layout(groups=[group])
    slabs = Slabs.allocate(PdConfig.parse({}, {}), layout, caches())
    assert slabs is not None
    piece = slabs.pieces.piece((range(1), range(1)), 16, Codec.RAW)
    slabs.coder.encode(piece, Codec.RAW, [[1]], 0)
    assert slabs.packer().taken_bytes == 0

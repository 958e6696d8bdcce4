"""What is remembered of a link, and which way and codec are chosen from that."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.clock import FakeClock
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.transfer.rates import PeerRates, Prospect, Rate, choose_codec

MIB = 2**20


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def rates(clock: FakeClock) -> PeerRates:
    return PeerRates(clock)


# --- rates -----------------------------------------------------------------------------------


def test_a_rate_is_not_known_before_anything_was_seen(clock: FakeClock) -> None:
    rate = Rate(clock)
    assert rate.value is None
    assert rate.samples == 0


def test_what_took_no_time_tells_nothing(clock: FakeClock) -> None:
    rate = Rate(clock)
    rate.add(100, 0.0)
    assert rate.value is None
    assert rate.samples == 1


def test_samples_count_by_how_long_they_took(clock: FakeClock) -> None:
    rate = Rate(clock)
    rate.add(100, 1.0)
    rate.add(100, 3.0)
    assert rate.value == 50.0


def test_what_was_seen_a_minute_ago_counts_half(clock: FakeClock) -> None:
    rate = Rate(clock)
    rate.add(100, 1.0)
    clock.advance(60)
    rate.add(10, 1.0)
    assert rate.value == pytest.approx((50 + 10) / 1.5)


def test_a_rate_that_has_changed_is_the_new_one_after_some_minutes(clock: FakeClock) -> None:
    rate = Rate(clock)
    for _ in range(1000):
        rate.add(1000, 1.0)
    for _ in range(20):
        clock.advance(60)
        rate.add(10, 1.0)
    assert rate.value == pytest.approx(10, rel=0.1)


def test_time_alone_changes_nothing(clock: FakeClock) -> None:
    rate = Rate(clock)
    rate.add(100, 2.0)
    clock.advance(1e6)
    assert rate.value == 50.0


# --- packing ---------------------------------------------------------------------------------


def use(rates: PeerRates, packed_rate: float, direct_rate: float, descriptor: float = 4096) -> bool:
    """One fetch that goes the preferred way; return which it was."""
    packed = rates.prefers_packing(descriptor)
    rates.moved(packed, descriptor, MIB, MIB / (packed_rate if packed else direct_rate))
    return packed


@pytest.mark.parametrize("packing_is_faster", [True, False])
def test_both_ways_are_tried_and_then_the_faster_is_gone(
    rates: PeerRates, packing_is_faster: bool
) -> None:
    speeds = (2e9, 1e9) if packing_is_faster else (1e9, 2e9)
    tried = [use(rates, *speeds) for _ in range(6)]
    assert sorted(tried) == [False] * 3 + [True] * 3
    assert [use(rates, *speeds) for _ in range(200)] == [packing_is_faster] * 200


def test_the_slower_way_is_tried_again_now_and_then(rates: PeerRates) -> None:
    chosen = [use(rates, 2e9, 1e9) for _ in range(6 + 1024)][6:]
    assert 1 <= chosen.count(False) <= 1024 // 100


def test_a_way_that_has_become_the_faster_is_found(rates: PeerRates, clock: FakeClock) -> None:
    for _ in range(300):
        use(rates, packed_rate=2e9, direct_rate=1e9)
    chosen = []
    for _ in range(3000):
        clock.advance(1.0)
        chosen.append(use(rates, packed_rate=1e8, direct_rate=1e9))
    assert not any(chosen[-100:])


def test_scattered_blocks_and_long_runs_are_told_apart(rates: PeerRates) -> None:
    for _ in range(50):
        use(rates, packed_rate=2e9, direct_rate=1e9, descriptor=2048)
        use(rates, packed_rate=1e9, direct_rate=2e9, descriptor=MIB)
    assert rates.prefers_packing(2048)
    assert rates.prefers_packing(2100)  # much the same
    assert not rates.prefers_packing(MIB)


@pytest.mark.parametrize("descriptor", [0.0, 0.5, 1.0])
def test_descriptors_of_next_to_nothing_do_no_harm(rates: PeerRates, descriptor: float) -> None:
    assert not rates.prefers_packing(descriptor)


# --- codecs ----------------------------------------------------------------------------------

SIZES = {Codec.RAW: 1.0, Codec.INT8: 0.52, Codec.INT4: 0.30, Codec.INT2: 0.20}
CODING = {Codec.INT8: 2.5e9, Codec.INT4: 2.2e9, Codec.INT2: 2.0e9}
MBIT = 1e6 / 8


def prospect(
    kv_bytes: int = 64 * MIB,
    link: float | None = 300 * MBIT,
    prefill: float | None = None,
    stretches: int = 16,
) -> Prospect:
    sizes = {codec: int(kv_bytes * share) for codec, share in SIZES.items()}
    return Prospect(kv_bytes, sizes, link, prefill, CODING, stretches)


@pytest.mark.parametrize("narrowest", Codec)
def test_with_a_link_that_is_not_known_kv_stays_as_it_is(narrowest: Codec) -> None:
    assert choose_codec(prospect(link=None), narrowest) is Codec.RAW


@pytest.mark.parametrize("narrowest", Codec)
def test_through_shared_memory_kv_stays_as_it_is(narrowest: Codec) -> None:
    assert choose_codec(prospect(link=2.7e9), narrowest) is Codec.RAW


@pytest.mark.parametrize("narrowest", Codec)
def test_a_slow_link_takes_the_narrowest_that_is_allowed(narrowest: Codec) -> None:
    assert choose_codec(prospect(link=300 * MBIT), narrowest) is narrowest


def test_a_link_nearly_as_fast_as_coding_takes_kv_as_it_is() -> None:
    assert choose_codec(prospect(link=CODING[Codec.INT2] / 3), Codec.INT2) is Codec.RAW


def test_where_prefill_is_slower_than_the_link_kv_stays_as_it_is() -> None:
    """It moves while the prompt is computed: only the last stretch is waited for."""
    slow = prospect(link=1000 * MBIT, prefill=20e6, stretches=64)
    assert choose_codec(slow, Codec.INT2) is Codec.RAW


def test_where_prefill_hides_int8_nothing_narrower_is_chosen() -> None:
    """300 Mbit/s move 37 MB a second, of which int8 makes 72."""
    paced = prospect(link=300 * MBIT, prefill=70e6, stretches=64)
    assert choose_codec(paced, Codec.INT2) is Codec.INT8


def test_a_prompt_that_is_over_in_a_moment_is_not_worth_it() -> None:
    assert choose_codec(prospect(kv_bytes=32 * 2**10), Codec.INT2) is Codec.RAW


def test_the_wider_of_two_that_finish_about_together_is_chosen() -> None:
    sizes = {Codec.RAW: 10**8, Codec.INT8: 5 * 10**7, Codec.INT4: 47 * 10**6}
    near = dataclasses.replace(prospect(kv_bytes=10**8), sizes=sizes | {Codec.INT2: 46 * 10**6})
    assert choose_codec(near, Codec.INT2) is Codec.INT8


def test_with_no_codec_that_was_measured_kv_stays_as_it_is() -> None:
    unmeasured = dataclasses.replace(prospect(), coding={})
    assert choose_codec(unmeasured, Codec.INT2) is Codec.RAW


@given(
    kv_bytes=st.integers(1, 2**34),
    link=st.one_of(st.none(), st.floats(1e3, 1e12)),
    prefill=st.one_of(st.none(), st.floats(1e3, 1e12)),
    speeds=st.tuples(*[st.floats(1e6, 1e12)] * 3),
    stretches=st.integers(1, 1000),
    narrowest=st.sampled_from(Codec),
)
def test_what_is_chosen_is_allowed_and_clearly_sooner_or_raw(
    kv_bytes: int,
    link: float | None,
    prefill: float | None,
    speeds: tuple[float, float, float],
    stretches: int,
    narrowest: Codec,
) -> None:
    coding = dict(zip(CODING, speeds, strict=True))
    known = dataclasses.replace(prospect(kv_bytes, link, prefill, stretches), coding=coding)
    chosen = choose_codec(known, narrowest)
    assert chosen.rank <= narrowest.rank
    if chosen is not Codec.RAW:
        raw_s = known.finish_s(Codec.RAW)
        soonest_s = min(known.finish_s(codec) for codec in coding if codec.rank <= narrowest.rank)
        assert known.finish_s(chosen) < raw_s
        assert 0.9 * raw_s > soonest_s + 0.002

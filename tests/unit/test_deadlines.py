"""Deadlines are those of a dictionary that is searched through, at any number of keys."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_plugin.deadlines import Deadlines

KEYS = st.integers(0, 5)
TIMES = st.integers(0, 20).map(float)
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), KEYS, TIMES),
        st.tuples(st.just("remove"), KEYS, TIMES),
        st.tuples(st.just("take"), KEYS, TIMES),
        st.tuples(st.just("next"), KEYS, TIMES),
    ),
    max_size=60,
)


@given(ACTS)
def test_deadlines_are_those_of_a_plain_dictionary(acts: list[tuple[str, int, float]]) -> None:
    deadlines, plain = Deadlines[int](), dict[int, float]()
    for act, key, at in acts:
        if act == "set":
            deadlines.set(key, at)
            plain[key] = at
        elif act == "remove":
            deadlines.remove(key)
            plain.pop(key, None)
        elif act == "take":
            due = deadlines.take(at)
            assert sorted(due) == sorted(k for k, t in plain.items() if t <= at)
            assert [plain[k] for k in due] == sorted(plain[k] for k in due)
            plain = {k: t for k, t in plain.items() if t > at}
        assert deadlines.next() == min(plain.values(), default=None)
        assert len(deadlines) == len(plain)
        assert (key in deadlines) == (key in plain)


def test_keys_that_come_and_go_leave_nothing_behind() -> None:
    deadlines = Deadlines[int]()
    for key in range(10_000):
        deadlines.set(key, 1e6)
        deadlines.remove(key)
    assert len(deadlines._heap) < 100
    assert not deadlines._queued


def test_putting_off_adds_nothing() -> None:
    deadlines = Deadlines[str]()
    for at in range(10_000):
        deadlines.set("lease", float(at))
    assert len(deadlines._heap) == 1
    assert deadlines.next() == 9_999.0

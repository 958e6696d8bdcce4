"""KV memory as a table."""

from __future__ import annotations

import numpy as np

from vllm_pd_plugin.memory.layout import Group, RankLayout
from vllm_pd_plugin.simulation.memory import Contents, KvTable, Writer

LAYOUT = RankLayout((Group("full", 4, None, ("a.0", "a.1"), (4, 8), "uint8"),))
BLOCKS = [3, 1, 2]


def chain(contents: Contents, tokens: list[int], weights: int = 1) -> np.ndarray:
    prefix, found = contents.begin(weights), list[int]()
    for token in tokens:
        prefix = contents.after(prefix, token)
        found.append(prefix)
    return np.array(found)


def test_content_is_equal_where_weights_and_all_tokens_before_are() -> None:
    contents = Contents()
    one, other = chain(contents, [1, 2, 3]), chain(contents, [1, 2, 4])
    assert one[:2].tolist() == other[:2].tolist()
    assert one[2] != other[2]
    assert set(one).isdisjoint(chain(contents, [2, 3, 4]))
    assert set(one).isdisjoint(chain(contents, [1, 2, 3], weights=2))


def test_what_was_written_is_found_in_its_place_and_nowhere_else() -> None:
    contents, table = Contents(), KvTable(LAYOUT, 5, 0)
    tokens = chain(contents, list(range(10)))
    table.write(0, BLOCKS, 0, tokens, contents.enter(Writer("i", "r", 1)))
    assert table.find_wrong(0, BLOCKS, 0, tokens) is None
    assert table.find_wrong(0, BLOCKS, 5, tokens[5:]) is None
    assert table.find_wrong(1, BLOCKS, 0, tokens) is not None, "another layer"
    wrong = table.find_wrong(0, [3, 2, 1], 0, tokens)
    assert wrong is not None
    assert (wrong.position, wrong.block) == (4, 2)


def test_a_wrong_place_tells_who_wrote_it_last() -> None:
    contents, table = Contents(), KvTable(LAYOUT, 5, 0)
    mine, theirs = Writer("i", "mine", 1), Writer("i", "theirs", 2)
    tokens = chain(contents, list(range(6)))
    table.write(1, BLOCKS, 0, tokens, contents.enter(mine))
    table.write(1, [1], 1, chain(contents, [7, 7]), contents.enter(theirs))
    wrong = table.find_wrong(1, BLOCKS, 0, tokens)
    assert wrong is not None
    assert (wrong.position, contents.writer(wrong.cell)) == (5, theirs)


def test_ranks_do_not_hold_the_same() -> None:
    contents = Contents()
    tokens = chain(contents, [1, 2])
    tables = [KvTable(LAYOUT, 5, rank) for rank in range(2)]
    tables[0].write(0, BLOCKS, 0, tokens, 0)
    tables[1].caches["a.0"][:] = tables[0].caches["a.0"]
    assert tables[1].find_wrong(0, BLOCKS, 0, tokens) is not None

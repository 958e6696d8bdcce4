"""Workers agree on the engines through a file, whoever changes it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.pool.membership import Membership, Wanted
from vllm_pd_plugin.frontend.routing.choice import Role

A, B = "http://a:1", "http://b:2"


def test_one_worker_needs_no_file() -> None:
    membership = Membership.open({A: Wanted(Role.DECODE)}, None)
    membership.add(B, Role.PREFILL)
    membership.remove(A)
    assert membership.engines == {B: Wanted(Role.PREFILL)}
    assert not membership.look()


def test_what_one_changes_the_others_see(tmp_path: Path) -> None:
    path = tmp_path / "engines.json"
    one = Membership.open({A: Wanted(Role.DECODE)}, path)
    other = Membership.open({}, path)
    assert other.engines == {A: Wanted(Role.DECODE)}
    one.add(B, Role.BOTH)
    assert other.look()
    assert other.engines == one.engines == {A: Wanted(Role.DECODE), B: Wanted(Role.BOTH)}
    assert not other.look()
    other.remove(A)
    assert one.look()
    assert one.engines == {B: Wanted(Role.BOTH)}


def test_who_makes_a_change_need_not_look_for_it(tmp_path: Path) -> None:
    membership = Membership.open({A: Wanted(Role.DECODE)}, tmp_path / "engines.json")
    membership.add(B, Role.DECODE)
    assert not membership.look()


def test_a_drained_engine_is_used_again_when_it_is_added(tmp_path: Path) -> None:
    membership = Membership.open({A: Wanted(Role.DECODE)}, tmp_path / "engines.json")
    before = time.time()
    membership.drain(A, 60.0)
    until = membership.engines[A].drain_until
    assert until is not None
    assert before + 60 <= until <= time.time() + 60
    membership.add(A, Role.DECODE)
    assert membership.engines[A].drain_until is None


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_not_there_cannot_be_drained_or_removed(tmp_path: Path, shared: bool) -> None:
    membership = Membership.open({}, tmp_path / "engines.json" if shared else None)
    with pytest.raises(KeyError):
        membership.drain(A, 1.0)
    with pytest.raises(KeyError):
        membership.remove(A)


def test_no_change_is_lost_when_all_make_one_at_once(tmp_path: Path) -> None:
    path = tmp_path / "engines.json"
    Membership.open({}, path)

    def add(index: int) -> None:
        membership = Membership.open({}, path)
        for i in range(10):
            membership.add(f"http://{index}:{i}", Role.DECODE)

    threads = [threading.Thread(target=add, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Membership.open({}, path).engines) == 40


@pytest.mark.parametrize("text", ["{", "[]", '{"http://a:1": {"role": "cook"}}', '{"u": {}}'])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "engines.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a list of engines"):
        Membership.open({}, path)

"""With ``integrity: digest`` a consumer uses only bytes that its producer's memory holds, too."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.fakes.cluster import FakeCluster
from tests.fakes.engines import full_group, sliding_group
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Source, new_incarnation
from vllm_pd_plugin.packing.digests import kv_digest
from vllm_pd_plugin.protocol import framing, wire
from vllm_pd_plugin.transfer.rank import Timeouts

TOKENS = 16
PROMPT, ANOTHER = 1, 2
THERE, ELSEWHERE = [3, 4, 5, 6], [13, 14, 15, 16]
HERE = [7, 9, 11, 13]
TIMEOUTS = Timeouts(queue_s=100.0, read_s=60.0, drain_s=5.0)


@pytest.fixture
def cluster() -> FakeCluster:
    """Reads end only when a test lets them."""
    cluster = FakeCluster(timeouts=TIMEOUTS, checks_bytes=True)
    cluster.consumer.transport.holds_reads = True
    return cluster


def compute(cluster: FakeCluster, tokens: range, blocks: list[int] = THERE) -> None:
    """A step of the producer."""
    for layer in range(cluster.producer.num_layers):
        cluster.producer.write_kv(PROMPT, (blocks,), tokens, layer)
    cluster.producer.compute("p", tokens.stop, blocks)
    cluster.settle()


def read(cluster: FakeCluster, first_token: int = 0) -> Source:
    """A fetch that has read everything, and has not noticed yet."""
    source = cluster.producer.begin("p", TOKENS)
    cluster.consumer.fetch("c", source, HERE, TOKENS, first_token)
    cluster.settle()
    compute(cluster, range(TOKENS))
    cluster.consumer.transport.finish_reads()
    return source


@pytest.mark.parametrize("first_token", [0, 8])
@pytest.mark.parametrize("is_sealed", [False, True])
def test_equal_bytes_are_used(cluster: FakeCluster, first_token: int, is_sealed: bool) -> None:
    read(cluster, first_token)
    if is_sealed:
        cluster.producer.seal("p", THERE)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    order = cluster.network.delivered
    assert order.index("checked") < order.index("commit")


@pytest.mark.parametrize("block", HERE)
def test_bytes_that_changed_on_the_way_fail_the_fetch(cluster: FakeCluster, block: int) -> None:
    read(cluster)
    cluster.consumer.caches[1][block, -1] ^= 1
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.DIGEST_MISMATCH
    assert cluster.consumer.result("c").valid_tokens == 0
    assert "commit" not in cluster.network.delivered


def test_bytes_that_changed_at_the_producer_fail_the_fetch(cluster: FakeCluster) -> None:
    """A block that was reused without a word: the commit alone would be granted."""
    read(cluster)
    cluster.producer.write_kv(ANOTHER, (THERE,), range(TOKENS), 0)
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.DIGEST_MISMATCH


def test_equal_bytes_are_not_used_without_the_commit(cluster: FakeCluster) -> None:
    source = read(cluster)
    cluster.consumer.turn()
    cluster.network.deliver_kind("check")
    cluster.network.deliver_kind("examine")
    cluster.network.deliver_kind("examined")
    cluster.network.connect(cluster.producer.address, lambda frames: None).send(
        framing.encode(
            wire.Cancel(source.handoff_id), new_incarnation(), cluster.producer.identity.incarnation
        )
    )
    cluster.network.deliver_kind("cancel")
    cluster.settle()
    assert "checked" in cluster.network.delivered
    assert cluster.consumer.outcome("c") is Reason.CANCELLED


def test_after_a_preemption_the_bytes_of_the_new_blocks_are_compared(cluster: FakeCluster) -> None:
    read(cluster)
    cluster.consumer.turn()
    cluster.network.deliver_kind("check")
    cluster.producer.preempt("p")
    cluster.producer.write_kv(ANOTHER, (THERE,), range(TOKENS), 0)
    cluster.settle()
    assert not cluster.consumer.is_reported("c")
    compute(cluster, range(TOKENS), ELSEWHERE)
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.holds_kv(PROMPT, (HERE,), TOKENS)


def test_nothing_is_vouched_for_before_the_bytes_were_compared(cluster: FakeCluster) -> None:
    source = cluster.producer.begin("p", TOKENS)
    cluster.consumer.fetch("c", source, HERE, TOKENS)
    cluster.settle()
    compute(cluster, range(8))
    cluster.consumer.transport.finish_reads()
    cluster.pass_time(1.0)
    assert "commit" not in cluster.network.delivered
    assert cluster.consumer.plane.turn() is not None
    assert cluster.consumer.plane.turn() != 0.0


def test_a_check_that_is_not_answered_ends_in_time(cluster: FakeCluster) -> None:
    read(cluster)
    cluster.consumer.turn()
    cluster.network.deliver_kind("check")
    assert cluster.network.lose("examine") == 1
    cluster.pass_time(6.0)
    assert cluster.consumer.outcome("c") is Reason.PEER_UNREACHABLE


def test_a_check_is_refused_while_the_worker_is_not_known(cluster: FakeCluster) -> None:
    source = cluster.producer.produce("p", THERE, TOKENS)
    cluster.consumer.fetch("c", source, HERE, TOKENS)
    cluster.settle()
    cluster.consumer.transport.finish_reads()
    cluster.settle()
    assert cluster.consumer.outcome("c") is Reason.INTERNAL


@pytest.mark.parametrize(
    ("rank", "num_tokens"), [(0, TOKENS), (1, TOKENS), (0, TOKENS + 1)], ids=repr
)
def test_a_check_of_what_is_not_final_is_refused(
    cluster: FakeCluster, rank: int, num_tokens: int
) -> None:
    source = cluster.producer.begin("p", TOKENS)
    compute(cluster, range(8 if num_tokens == TOKENS and rank == 0 else TOKENS))
    answer = cluster.producer.control._answering.check(
        wire.Check(source.handoff_id, 0, rank, rank, 0, num_tokens)
    )
    assert answer == wire.Refuse(source.handoff_id, Reason.MISSING_BLOCKS)


# --- the digest itself -----------------------------------------------------------------------

GROUPS = [full_group("a", "b"), sliding_group(5, "c")]
TABLES = ([3, 4, 5, 6], [0, 0, 8, 9])


def caches(kind: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand((20, 2, 4), generator=generator).to(kind) for _ in range(3)]


def digest(of: Sequence[torch.Tensor], first_token: int = 0) -> bytes:
    return kv_digest(GROUPS, of, TABLES, first_token, TOKENS)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_digest_depends_on_every_byte_that_is_needed_and_on_no_other(kind: torch.dtype) -> None:
    expected = digest(caches(kind))
    assert len(expected) == 8 * len(GROUPS)
    for layer in range(3):
        for block in range(20):
            changed = caches(kind)
            changed[layer][block].view(torch.uint8)[-1, -1] ^= 1
            needed = block in (TABLES[0] if layer < 2 else TABLES[1][2:])
            assert (digest(changed) != expected) == needed


def test_a_digest_leaves_out_what_the_consumer_has_already() -> None:
    changed = caches()
    changed[0][[3, 4]] += 1
    assert digest(changed, first_token=8) == digest(caches(), first_token=8)
    assert digest(changed, first_token=7) != digest(caches(), first_token=7)


def test_a_digest_depends_on_the_order_of_blocks_and_layers() -> None:
    swapped = caches()
    swapped[0][[3, 4]] = swapped[0][[4, 3]].clone()
    assert digest(swapped) != digest(caches())
    first, second, third = caches()
    assert digest([second, first, third]) != digest(caches())


def test_a_digest_is_that_of_the_bytes_wherever_they_lie() -> None:
    strided = [torch.zeros((20, 3, 4))[:, :2] for _ in range(3)]
    for cache, original in zip(strided, caches(), strict=True):
        cache.copy_(original)
    assert digest(strided) == digest(caches())

from __future__ import annotations

from vllm_pd_plugin.protocol.lease import Lease


def test_a_lease_runs_out_its_duration_after_it_was_renewed() -> None:
    lease = Lease(duration_s=30.0, renewed_at=100.0)
    assert lease.deadline == 130.0
    assert not lease.has_expired(129.999)
    assert lease.has_expired(130.0)


def test_a_renewed_lease_runs_on_from_there() -> None:
    lease = Lease(30.0, 100.0).renewed(129.0)
    assert lease.deadline == 159.0
    assert lease.duration_s == 30.0


def test_lease_outlives_a_slow_reader() -> None:
    lease, now = Lease(30.0, 0.0), 0.0
    while now < 600.0:
        now += 29.0
        assert not lease.has_expired(now)
        lease = lease.renewed(now)
    assert lease.has_expired(now + 30.0)


def test_a_clock_that_steps_back_never_shortens_a_lease() -> None:
    assert Lease(30.0, 100.0).renewed(50.0) == Lease(30.0, 100.0)


def test_renewing_leaves_the_old_lease_as_it_was() -> None:
    lease = Lease(30.0, 100.0)
    lease.renewed(120.0)
    assert lease.deadline == 130.0

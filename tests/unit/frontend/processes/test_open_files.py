"""How many files a frontend may have open."""

from __future__ import annotations

import logging
import resource
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.processes.open_files import raise_open_files, shortage


def test_a_frontend_may_have_as_many_files_open_as_it_is_allowed_to() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        raise_open_files(0)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_needed_is_said_where_it_is_not_allowed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert shortage(5024, 1000) == ""
    assert shortage(resource.RLIM_INFINITY, 10**9) == ""
    problem = shortage(5023, 1000)
    assert "5024" in problem
    assert "\n" not in problem
    with caplog.at_level(logging.WARNING):
        raise_open_files(10**9)
    assert "1000000000 engines need" in caplog.text

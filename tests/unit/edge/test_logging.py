"""Where our log records go in an engine."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.edge import hooks


class Notes(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def theirs() -> Iterator[logging.Logger]:
    """vLLM's logger; all is as it was afterwards."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("vllm_pd_plugin")
    level, parent = theirs.level, ours.parent
    yield theirs
    theirs.setLevel(level)
    ours.parent = parent


def test_records_go_where_vllm_s_go_at_the_level_that_it_has_then(theirs: logging.Logger) -> None:
    """It is raised while plug-ins are loaded; a fork of that process goes on with what it finds."""
    theirs.setLevel(logging.WARNING)
    hooks.log_like_vllm()
    notes = Notes()
    theirs.addHandler(notes)
    ours = logging.getLogger("vllm_pd_plugin.edge.scheduler")
    ours.info("too early")
    theirs.setLevel(logging.INFO)
    ours.info("told")
    theirs.removeHandler(notes)
    assert notes.texts == ["told"]

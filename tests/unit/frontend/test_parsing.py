"""What the help of ``vllm-pd serve`` and ``vllm-pd up`` shows, and what is refused at once."""

from __future__ import annotations

import re
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_pd_plugin.frontend import commands

MAX_LINES = 60


def shown(command: str, word: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        getattr(commands, command)([word], {})
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _nothing_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", None)


@pytest.mark.parametrize("command", ["serve", "up"])
@pytest.mark.parametrize("columns", ["40", "200"])
def test_help_is_short_and_begins_with_examples(
    command: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = shown(command, "--help", capsys)
    lines = text.splitlines()
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= 100
    assert text.index(f"  vllm-pd {command} MODEL") < text.index("vllm-pd engines:")
    assert "--help=all" in lines[-2] + lines[-1]


@pytest.mark.parametrize(
    ("command", "own"), [("serve", "--prefill"), ("up", "--engine-port-base"), ("up", "--slo")]
)
def test_help_shows_what_vllm_does_not_have_and_nothing_else(
    command: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = re.findall(r"^  (--[a-z-]+)", shown(command, "--help", capsys), re.MULTILINE)
    assert own in options
    assert "--workers" in options
    assert not {"--dtype", "--gpu-memory-utilization", "--chat-template"} & set(options)


def test_vllms_own_options_are_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    everything = shown("up", "--help=all", capsys)
    assert "--gpu-memory-utilization" in everything
    assert "--local-below" in everything
    assert "--max-model-len" in shown("up", "--help=max-model-len", capsys)


def test_a_mistake_does_not_bring_a_screen_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        commands.serve(["M", "--colour", "red"], {})
    assert caught.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: vllm-pd serve MODEL ..."
    assert error == "vllm-pd serve: error: unrecognized arguments: --colour red"

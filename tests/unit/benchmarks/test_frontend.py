"""What the frontend's benchmark is asked for."""

from __future__ import annotations

import argparse
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # transformers', not ours
    from benchmarks.frontend.arguments import ARMS, EXAMPLES, parse_arguments

HERE = "."


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> argparse.Namespace:
    monkeypatch.setattr("sys.argv", ["frontend", *words])
    return parse_arguments("What it costs.")


def test_what_is_not_given_is_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    args = asked(monkeypatch)
    assert (args.arms, args.concurrency, args.seconds) == (list(ARMS), [1, 16, 64, 256], 8.0)
    assert (args.repeat, args.requests, args.path_concurrency, args.workers) == (5, 400, 8, 1)
    assert (args.streams, args.soak, args.engines, args.answers) == (0, 0, None, None)


def test_quick_is_small_but_for_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    args = asked(monkeypatch, "--quick", "--repeat", "2")
    assert (args.concurrency, args.seconds, args.repeat, args.requests) == ([1, 8], 2.0, 2, 40)


@pytest.mark.parametrize(
    "words",
    [
        "--streams 1000 --soak 20000 --json results/frontend.json",
        "--arms canned --workers 2 --concurrency 64,256",
        f"--answers 100 --against {HERE} --repeat 15 --json FILE",
        f"--answers 40 --against {HERE} --repeat 24 --arms canned",
        "--engines 1000 --streams 10000 --json FILE",
    ],
)
def test_what_the_examples_show_is_allowed(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    asked(monkeypatch, *words.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--repeat 0", "numbers 1 or more"),
        ("--seconds 0", "times must be above 0"),
        ("--answers 1 --idle-seconds 0", "times must be above 0"),
        ("--prompt-tokens 2001", "2000 or less"),
        ("--answers 0", "--answers must be"),
        (f"--against {HERE}", "goes with --answers"),
        ("--answers 1 --against /no/such/folder", "names a folder"),
        ("--engines 1 --streams 1", "2 or more"),
        ("--engines 2", "--streams 1 or more with it"),
        ("--soak 9", "10 or more"),
        ("--streams 1 --step-ms 1", "raise --step-ms"),
        ("--concurrency 5000", "from 1 to 4096"),
        ("--arms other", "allowed are"),
    ],
)
def test_what_cannot_be_measured_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    with pytest.raises(SystemExit):
        asked(monkeypatch, *words.split())
    assert said in capsys.readouterr().err


def test_help_shows_examples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        asked(monkeypatch, "--help")
    assert EXAMPLES.strip() in capsys.readouterr().out

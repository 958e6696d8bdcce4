"""Options by their names, and as the words of a command line."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from vllm_pd_plugin.errors import ConfigError

Options = dict[str, Any]
"""Options of ``vllm serve`` by their names, with or without dashes: ``max-model-len: 4096``."""


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Return options as a command line has them.

    True is a flag, False its ``--no-`` form, None leaves an option out, a list is several values,
    a mapping is JSON.
    """
    words: list[str] = []
    for name, value in dashed(options).items():
        match value:
            case None:
                continue
            case True:
                words.append(f"--{name}")
            case False:
                words.append(f"--no-{name}")
            case dict():
                words += [f"--{name}", json.dumps(value)]
            case list() | tuple():
                words += [f"--{name}", *map(str, value)]
            case _:
                words += [f"--{name}", str(value)]
    return words


def nested(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as a command line gives them (``decode.replicas=2``) as a tree; what is said
    with a dotted name is YAML.

    Raises:
        ConfigError: one is said twice, as a value and as a tree.
    """
    tree: dict[str, Any] = {}
    for name, value in arguments.items():
        *path, last = name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"{name}: {part} has a value already")
        if last in branch:
            raise ConfigError(f"{name} is said twice")
        branch[last] = _yaml(value) if path and isinstance(value, str) else value
    return tree


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def dashed(options: Mapping[str, Any]) -> Options:
    """Return options by their names with dashes; what comes after a dot is as it is."""
    return {_dashed(name): value for name, value in options.items()}


def _dashed(name: str) -> str:
    option, dot, part = name.partition(".")
    return f"{option.replace('_', '-')}{dot}{part}"


def seconds(text: str) -> float:
    """Read a time, as an ``argparse`` type: 0 or more."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give seconds, 0 or more")
    return value


def some_seconds(text: str) -> float:
    """Read a time that may not be 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give seconds, more than 0")
    return value


def at_least(least: int) -> Callable[[str], int]:
    """Return an ``argparse`` type: whole numbers from a least one on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return value

    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

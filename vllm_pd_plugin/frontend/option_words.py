"""Options by their names, and as the words of a command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    """Return options by their names with dashes."""
    return {name.replace("_", "-"): value for name, value in options.items()}

"""A command line as it was typed: which words are an option with its values, and which are none.

Engines and workers are started with some of the words of ``vllm-pd``. What belongs together is
decided as argparse does it.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.option_words import dashed, words_of

_NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")


@dataclasses.dataclass(frozen=True, slots=True)
class Typed:
    """An option and its values, or one positional.

    options: all names of the option; none of a positional.
    """

    words: tuple[str, ...]
    options: frozenset[str] = frozenset()


class TypedWords:
    """Reads command lines for a parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._actions: Mapping[str, argparse.Action] = parser._option_string_actions

    def read(self, words: Sequence[str]) -> list[Typed]:
        """Divide a command line that the parser accepts."""
        typed: list[Typed] = []
        left = list(words)
        while left:
            word = left.pop(0)
            if word == "--":
                return [*typed, *(Typed((each,)) for each in left)]
            if not self._is_option(word):
                typed.append(Typed((word,)))
                continue
            values = [] if "=" in word else self._take_values(word, left)
            action = self._find(word)
            names = action.option_strings if action else [word.partition("=")[0]]
            typed.append(Typed((word, *values), frozenset(names)))
        return typed

    def without(self, words: Sequence[str], dropped: Collection[str]) -> list[str]:
        """Return the options of a command line, but for some, and none of its positionals."""
        return [
            word
            for each in self.read(words)
            if each.options and each.options.isdisjoint(dropped)
            for word in each.words
        ]

    def with_config_file(self, words: Sequence[str]) -> list[str]:
        """Put what the file of ``--config`` says before what was typed, which counts more.

        Raises:
            ConfigError: it cannot be read, or says something that is no option here.
        """
        typed = self.read(words)
        files = [each for each in typed if "--config" in each.options]
        if not files:
            return list(words)
        if len(files) > 1:
            raise ConfigError("--config is given twice; one file says all")
        path = Path(_value_of(files[0]))
        content = _read_file(path)
        models = [word for each in typed if not each.options for word in each.words]
        model = content.pop("model", None)
        return [
            *(models or ([] if model is None else [str(model)])),
            *(word for name, value in content.items() for word in self._words(path, name, value)),
            *self.without(words, {"--config"}),
        ]

    def _words(self, path: Path, name: str, value: Any) -> list[str]:
        action = self._actions.get(f"--{name.partition('.')[0]}")
        if action is None or "--config" in action.option_strings:
            raise ConfigError(f"{path}: {name!r} is no option of this command; see --help=all")
        if value is False and f"--no-{name}" not in self._actions:
            return []  # of a flag that can only be set
        if isinstance(value, list) and action.nargs is None:
            return [word for each in value for word in words_of({name: each})]
        return words_of({name: value})

    def _take_values(self, word: str, left: list[str]) -> list[str]:
        """Take what belongs to an option off the words that follow it."""
        action = self._find(word)
        if "." in word:  # vLLM's own form, for one key of an option: one value
            return [left.pop(0)] if left else []
        nargs = 0 if action is None else action.nargs
        if nargs is None:
            nargs = 1
        if isinstance(nargs, int):
            most = nargs
        else:
            is_value = [not self._is_option(each) and each != "--" for each in left]
            following = is_value.index(False) if False in is_value else len(left)
            most = min(following, 1) if nargs == "?" else following
        values, left[:] = left[:most], left[most:]
        return values

    def _is_option(self, word: str) -> bool:
        if not word.startswith("-") or word == "-":
            return False
        if self._find(word) is not None:
            return True
        return not _NEGATIVE_NUMBER.fullmatch(word) and " " not in word

    def _find(self, word: str) -> argparse.Action | None:
        """Return the option that a word names, in full or by so much of it that it is the only
        one."""
        name = word.partition("=")[0]
        if name == "-O":  # vLLM's short name of it, which argparse does not know
            name = "--optimization-level"
        if name in self._actions:
            return self._actions[name]
        if not name.startswith("--"):
            return self._actions.get(name.partition(".")[0])
        name = name.partition(".")[0].replace("_", "-")
        if name in self._actions:
            return self._actions[name]
        found = {id(a): a for option, a in self._actions.items() if option.startswith(name)}
        return next(iter(found.values())) if len(found) == 1 else None


def _value_of(typed: Typed) -> str:
    """Return the value of an option that has one. Raises ConfigError where it is missing."""
    name, _, value = typed.words[0].partition("=")
    value = value or " ".join(typed.words[1:])
    if not value:
        raise ConfigError(f"{name} needs a value")
    return value


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"--config {path} is no YAML: {why}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"--config {path} is no list of options with their values")
    return dashed(content)

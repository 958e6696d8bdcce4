"""What the package uses of vLLM is there, in every release line: read from sources, not imported.

The lists of names are made from wheels by `python -m tests.vllm_names`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from tests.vllm_names.found import Sources
from tests.vllm_names.lists import every_wanted, listed
from tests.vllm_names.wanted import Name, wanted
from vllm_pd_plugin.compat import MOVED, SUPPORTED_VLLM, Minor, home_of, minor_of

READ_FROM: Minor = (0, 32)
"""The release line that the package is written against."""
NEXT: Minor = (0, 33)
"""One that is known from its wheel only: nothing runs on it here."""
OF_SOME_CLASSES = {
    ("vllm.v1.kv_cache_interface", f"KVCacheSpec.{name}")
    for name in ("head_size", "head_size_v", "sliding_window")
}
"""What the classes have that the package looks for, and not what it calls them all by."""
NOT_ASKED_BEFORE: dict[Minor, set[Name]] = {
    (0, 31): {
        (
            "vllm.distributed.kv_transfer.kv_connector.v1.base",
            "KVConnectorBase_V1.get_loaded_kv_cache_group_ids",
        )
    },
}
"""Methods that vLLM calls in later release lines only."""


def installed() -> Sources:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Sources(Path(spec.origin).parents[1])


def installed_minor() -> Minor:
    found = minor_of(importlib.metadata.version("vllm"))
    assert found is not None
    return found


def test_the_installed_vllm_has_every_name_that_the_package_uses() -> None:
    sources = installed()
    used, _ = wanted()
    missing = {
        name
        for name in used - OF_SOME_CLASSES
        if not sources.has(name) and not (is_member(name) and sources.is_open(name))
    }
    assert not missing


@pytest.mark.parametrize("minor", [*SUPPORTED_VLLM, NEXT])
def test_every_release_line_has_what_is_used_of_the_one_the_package_is_written_against(
    minor: Minor,
) -> None:
    homes = {(module, name) for name, home in MOVED.items() for module in home.values()}
    expected = listed(READ_FROM) - homes - NOT_ASKED_BEFORE.get(minor, set())
    assert not expected - listed(minor), "missing there, or the list is older than the code"


@pytest.mark.parametrize("minor", [*SUPPORTED_VLLM, NEXT])
@pytest.mark.parametrize("name", MOVED)
def test_what_has_moved_is_where_the_table_says(minor: Minor, name: str) -> None:
    there = {module for module, listed_name in listed(minor) if listed_name == name}
    home = home_of(name, minor)
    assert there == ({home} if home else set())


def test_nothing_that_has_moved_is_imported_past_the_table() -> None:
    used, _ = wanted()
    assert not {name for _, name in used} & MOVED.keys()


def test_the_list_is_as_new_as_the_code() -> None:
    """A name that came into use since is in no list, and would be looked for nowhere."""
    sources = installed()
    there = {name for name in every_wanted() if sources.has(name)}
    assert there == listed(installed_minor()), "run python -m tests.vllm_names on a wheel of each"


def is_member(name: Name) -> bool:
    return "." in name[1]


# --- the reading itself ----------------------------------------------------------------------


def package(folder: Path, **modules: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder


def test_a_use_is_an_import_a_parameter_or_what_an_object_of_a_known_class_is_asked_for(
    tmp_path: Path,
) -> None:
    source = (
        "from vllm.core import Core as C, start, Config\n"
        "old = C.step\n"
        "C.ours = old\n"
        "start(port=1)\n"
        "def ask(config: Config): return config.size\n"
        "def change(it):\n"
        "    config: Config = it.config\n"
        "    return dataclasses.replace(config, depth=config.width)\n"
        "class Mine(C):\n"
        "    def extended(self): ...\n"
    )
    used, overridden = wanted(package(tmp_path / "ours", module=source))
    names = {"Core", "start", "Config", "Core.step", "start.port"}
    names |= {"Config.size", "Config.depth", "Config.width"}
    assert used == {("vllm.core", name) for name in names}
    assert overridden == {("vllm.core", "Core.extended")}


@pytest.mark.parametrize(
    ("name", "is_there"),
    [
        ("Core", True), ("Core.step", True), ("Core.state", True), ("Core.inherited", True),
        ("Core.timeout", True), ("Core.gone", False), ("start.port", True), ("start.host", False),
        ("passed_on", True), ("all_passed_on", True), ("inside", True), ("Gone", False),
    ],
)  # fmt: skip
def test_a_name_is_found_where_it_is_defined_inherited_set_or_passed_on(
    tmp_path: Path, name: str, is_there: bool
) -> None:
    core = (
        "from .base import Base, passed_on\n"
        "from vllm.more import *\n"
        "if True:\n"
        "    inside = 1\n"
        "def start(port): ...\n"
        "class Core(Base):\n"
        "    def __init__(self, timeout): self.state = 1\n"
        "    def step(self): ...\n"
    )
    base = "passed_on = 1\nclass Base:\n    inherited: int = 0\n"
    package(tmp_path / "vllm", core=core, base=base, more="all_passed_on = 1\n")
    assert Sources(tmp_path).has(("vllm.core", name)) is is_there

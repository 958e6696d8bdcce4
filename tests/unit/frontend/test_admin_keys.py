"""Where a frontend leaves the admin key that it made, and who finds it there."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.admin_keys import AdminKey, find, private_folder, published


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """A machine with a runtime directory, and one for temporary files."""
    (tmp_path / "run").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return {"XDG_RUNTIME_DIR": str(tmp_path / "run")}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_key_is_made_where_none_is_given_and_each_time_another() -> None:
    made = AdminKey.read({})
    assert made.is_made
    assert len(made.text) >= 32
    assert made.text not in repr(made)
    assert AdminKey.read({}) != made


def test_the_operators_key_counts(tmp_path: Path) -> None:
    assert AdminKey.read({"VLLM_PD_ADMIN_KEY": "given"}) == AdminKey("given", is_made=False)
    path = tmp_path / "key"
    path.write_text("from a file\n")
    environ = {"VLLM_PD_ADMIN_KEY_FILE": str(path)}
    assert AdminKey.read(environ) == AdminKey("from a file", is_made=False)


def test_a_key_is_found_by_its_port_while_the_frontend_runs(environ: Mapping[str, str]) -> None:
    key = AdminKey("secret", is_made=True)
    with published(key, 8000, environ) as path:
        assert path == Path(environ["XDG_RUNTIME_DIR"]) / "vllm-pd" / "8000.key"
        assert (mode(path), mode(path.parent)) == (0o600, 0o700)
        assert find(8000, environ) == "secret"
        assert find(8001, environ) is None
        assert list(path.parent.iterdir()) == [path]
    assert find(8000, environ) is None


@pytest.mark.parametrize("runtime", [None, "", "/no/such/folder", "relative"])
def test_without_a_runtime_directory_it_is_among_temporary_files(
    environ: Mapping[str, str], runtime: str | None
) -> None:
    other = {} if runtime is None else {"XDG_RUNTIME_DIR": runtime}
    with published(AdminKey("secret", is_made=True), 8000, other) as path:
        assert path.parent == Path(tempfile.gettempdir()) / f"vllm-pd-{os.geteuid()}"
        assert mode(path.parent) == 0o700
        assert find(8000, other) == "secret"
        assert find(8000, environ) == "secret"  # of a frontend that had no such directory


def test_the_key_of_one_that_died_is_replaced(environ: Mapping[str, str]) -> None:
    old, new = AdminKey("old", is_made=True), AdminKey("new", is_made=True)
    with published(old, 8000, environ) as path:
        path.chmod(0o644)
        with published(new, 8000, environ):
            assert find(8000, environ) == "new"
            assert mode(path) == 0o600


def test_somebody_elses_key_is_left_alone_at_the_end(environ: Mapping[str, str]) -> None:
    with published(AdminKey("old", is_made=True), 8000, environ) as path:
        path.write_text("new")
    assert find(8000, environ) == "new"


def test_a_folder_that_others_could_look_into_is_closed(environ: Mapping[str, str]) -> None:
    folder = Path(environ["XDG_RUNTIME_DIR"]) / "vllm-pd"
    folder.mkdir(mode=0o755)
    private_folder(folder)
    assert mode(folder) == 0o700


def test_a_link_in_the_place_of_the_folder_is_refused(
    environ: Mapping[str, str], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "8000.key").write_text("planted")
    folder = Path(environ["XDG_RUNTIME_DIR"]) / "vllm-pd"
    folder.symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(ConfigError, match="is not a folder"),
        published(AdminKey("secret", is_made=True), 8000, environ),
    ):
        pass
    with pytest.raises(ConfigError, match="is not a folder"):
        find(8000, environ)


def test_a_folder_of_somebody_else_is_refused(
    environ: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(environ["XDG_RUNTIME_DIR"]) / "vllm-pd"
    folder.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match="is somebody else's"):
        private_folder(folder)
    with pytest.raises(ConfigError, match="is somebody else's"):
        find(8000, environ)


def test_a_link_in_the_place_of_a_key_is_not_followed(
    environ: Mapping[str, str], tmp_path: Path
) -> None:
    (tmp_path / "planted").write_text("planted")
    folder = private_folder(Path(environ["XDG_RUNTIME_DIR"]) / "vllm-pd")
    (folder / "8000.key").symlink_to(tmp_path / "planted")
    with pytest.raises(ConfigError, match=r"8000\.key cannot be read"):
        find(8000, environ)
    with published(AdminKey("secret", is_made=True), 8000, environ):
        assert (tmp_path / "planted").read_text() == "planted"

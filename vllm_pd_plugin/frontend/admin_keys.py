"""The key of a frontend's admin API: given by the operator, or made at the start and left where
``vllm-pd`` of the same user finds it.

A key that was made lies in ``$XDG_RUNTIME_DIR/vllm-pd/PORT.key``, or in a folder of the user's own
for temporary files where there is no such directory, for as long as the frontend runs.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_pd_plugin.config import ADMIN_KEY_VARIABLE, read_secret
from vllm_pd_plugin.errors import ConfigError

RUNTIME_VARIABLE = "XDG_RUNTIME_DIR"
_NAME = "vllm-pd"
_MAX_BYTES = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class AdminKey:
    """is_made: nobody has given it, so it is to be left where it can be found."""

    text: str = dataclasses.field(repr=False)
    is_made: bool

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> AdminKey:
        """Return the operator's key, or a new one. Raises ConfigError; see ``read_secret``."""
        given = read_secret(environ, ADMIN_KEY_VARIABLE)
        return cls(given or secrets.token_urlsafe(32), given is None)


def private_folder(path: Path) -> Path:
    """Make a folder that is this user's alone, unless it is there.

    Raises:
        ConfigError: it is somebody else's, or a link to elsewhere, or cannot be made.
    """
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        _check_owner(path)
        if stat.S_IMODE(path.lstat().st_mode) != 0o700:
            path.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{path} cannot be used: {error.strerror}") from error
    return path


@contextmanager
def published(key: AdminKey, port: int, environ: Mapping[str, str]) -> Iterator[Path]:
    """Leave a key where ``find`` looks for the frontend on this port, and take it away at the end.

    Raises:
        ConfigError: there is no place where nobody else can read it.
    """
    folder = private_folder(_folders(environ)[0])
    path, draft = folder / f"{port}.key", folder / f"{port}.{os.getpid()}"
    try:
        draft.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(draft, flags, 0o600), "w") as file:
            file.write(key.text)
        draft.replace(path)  # whoever has left one there is gone: the port is ours
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield path
    finally:
        with suppress(OSError):
            if path.read_text() == key.text:
                path.unlink()


def find(port: int, environ: Mapping[str, str]) -> str | None:
    """Return the key that a frontend of this user on this machine has left; None without.

    Raises:
        ConfigError: it is in a place where somebody else could have put it.
    """
    for folder in _folders(environ):
        try:
            _check_owner(folder)
            with os.fdopen(os.open(folder / f"{port}.key", os.O_RDONLY | os.O_NOFOLLOW)) as file:
                return file.read(_MAX_BYTES)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"{folder}/{port}.key cannot be read: {error.strerror}") from error
    return None


def _folders(environ: Mapping[str, str]) -> list[Path]:
    """Return where keys are, the folder that is to be written to first."""
    temporary = Path(tempfile.gettempdir()) / f"{_NAME}-{os.geteuid()}"
    runtime = Path(environ.get(RUNTIME_VARIABLE) or "/nowhere")
    is_there = runtime.is_absolute() and os.access(runtime, os.W_OK | os.X_OK)
    return [runtime / _NAME, temporary] if is_there else [temporary]


def _check_owner(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{folder} is not a folder; remove it, or set {RUNTIME_VARIABLE}")
    if status.st_uid != os.geteuid():
        raise ConfigError(f"{folder} is somebody else's; remove it, or set {RUNTIME_VARIABLE}")

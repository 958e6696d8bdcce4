"""vLLM's tests, out of the source distribution of the installed version. It is not built."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from importlib import metadata
from pathlib import Path, PurePosixPath

KEPT = ("tests", "examples", "pyproject.toml")
"""What is unpacked. Not ``vllm``: beside the tests it would be imported instead of the build."""

TEST_PACKAGES = ("pytest-asyncio", "tblib")
"""What vLLM's tests import and the project's own do not need."""

_TIMEOUT_S = 120.0


class SourceError(RuntimeError):
    """vLLM's tests cannot be had; the message says what is missing, and where it was sought."""


def installed_version() -> str:
    """Return vLLM's version without the build's mark: 0.32.0, not 0.32.0+cpu."""
    return metadata.version("vllm").partition("+")[0]


def archive_name(version: str) -> str:
    return f"vllm-{version}.tar.gz"


def link_in(listing: str, version: str) -> str | None:
    """Find the address of the source distribution in what ``pip index versions -vv`` says."""
    found = re.search(rf"Found link (\S+/{re.escape(archive_name(version))})\S* ", listing)
    return found[1] if found else None


def is_kept(member: str, root: str) -> bool:
    """Whether a file of the archive is unpacked. root: the archive's only folder."""
    parts = PurePosixPath(member).parts
    return len(parts) > 1 and parts[0] == root and parts[1] in KEPT


def fetch(folder: Path, version: str) -> Path:
    """Return where vLLM's tests are, below ``folder``; the first call downloads 45 MB.

    pip is asked for the address, and so its index, proxies and certificates are those of this
    machine; `pip download` would build the package to learn what it depends on.

    Raises:
        SourceError: the index has no source distribution, or it has no tests.
    """
    root = f"vllm-{version}"
    made = folder / root
    if made.is_dir():
        return made
    ask = [sys.executable, "-m", "pip", "index", "versions", "vllm", "-vv"]
    told = subprocess.run(ask, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    link = link_in(told.stdout, version)
    if link is None:
        raise SourceError(f"pip finds no {archive_name(version)}: {told.stderr.strip()[-500:]}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        archive = Path(part) / archive_name(version)
        with urllib.request.urlopen(link, timeout=_TIMEOUT_S) as answer, archive.open("wb") as file:
            shutil.copyfileobj(answer, file)
        with tarfile.open(archive) as tar:
            members = [member for member in tar if is_kept(member.name, root)]
            tar.extractall(part, members, filter="data")
        if not (Path(part) / root / "tests" / "utils.py").is_file():
            raise SourceError(f"{archive.name} has no tests")
        (Path(part) / root).rename(made)
    return made


def install_test_packages(folder: Path) -> Path:
    """Return a folder with ``TEST_PACKAGES``, to be added to the module path."""
    site = folder / "site"
    if not site.is_dir():
        into = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(site)]
        done = subprocess.run([*into, *TEST_PACKAGES], check=False, timeout=_TIMEOUT_S)
        if done.returncode:
            shutil.rmtree(site, ignore_errors=True)
            raise SourceError(f"pip cannot install {' and '.join(TEST_PACKAGES)}")
    return site

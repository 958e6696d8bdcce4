"""No module is so long that its reader loses the thread."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_LINES = 400


def test_no_module_is_longer_than_it_may_be() -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in names.split("\0") if name]
    assert Path(__file__) in paths
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in paths
        if path.exists()  # one that was removed is known until that is committed
    }
    too_long = [f"{name} has {size} lines" for name, size in sizes.items() if size > MAX_LINES]
    assert not too_long, f"split these, at most {MAX_LINES} are allowed: {', '.join(too_long)}"

"""Write the lists of names: `python -m tests.vllm_names WHEEL...`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.vllm_names.found import Sources
from tests.vllm_names.lists import every_wanted, path_of


def main(wheels: Sequence[str]) -> int:
    if not wheels:
        print("give the path of at least one wheel of vLLM", file=sys.stderr)
        return 2
    for wheel in map(Path, wheels):
        version = re.match(r"vllm(?:_cpu)?-(\d+)\.(\d+)\.", wheel.name)
        if version is None:
            print(f"{wheel.name} is not named as a wheel of vLLM is", file=sys.stderr)
            return 2
        sources = Sources.of_wheel(wheel)
        there = sorted(name for name in every_wanted() if sources.has(name))
        path = path_of((int(version[1]), int(version[2])))
        path.write_text("".join(f"{module} {name}\n" for module, name in there))
        print(f"{path.name}: {len(there)} names")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

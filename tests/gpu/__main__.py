"""Check this project's device code on a machine with one NVIDIA GPU, in five minutes at the most.

    python -m tests.gpu --out build/gpu-results
    python -m tests.gpu --out build/gpu-results --device cpu    # a rehearsal without a GPU

Needs PyTorch and nvcc (a rehearsal: PyTorch and a C++ compiler). Writes gpu.json, gpu.md and
gpu.log. The exit status is 1 if a required stage has failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

from tests.gpu import runner
from tests.gpu.results import Results
from tests.gpu.site import site_for

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "gpu"
SITE = site_for(f"{sys.version_info.major}.{sys.version_info.minor}")


def main() -> int:
    args = _parse()
    if any(stage.name == "build" for stage in args.stages):
        shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *_unpacked(args.site)]
    if before := os.environ.get("PYTHONPATH"):
        paths.append(before)
    results = Results(args.out, args.device)
    log = args.out / "gpu.log"
    log.unlink(missing_ok=True)

    def launch(stage: runner.Stage) -> list[str]:
        words = [sys.executable, "-m", "tests.gpu.stage", stage.name]
        return [*words, "--device", args.device, "--work", str(WORK)]

    def on_found(stage: runner.Stage, found: dict[str, Any]) -> None:
        results.add(stage, found)
        why = f": {found['reason']}" if "reason" in found else ""
        print(f"{stage.name:10} {found['outcome']}, {found['seconds']} s{why}", flush=True)
        for text in found.get("failures", []):
            print(f"           {text}", flush=True)

    environ = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    around = runner.Surroundings(WORK, log, environ)
    is_well = runner.run(args.stages, launch, around, on_found)
    print(f"{'no required stage has failed' if is_well else 'FAILED'}; see {args.out}/gpu.md")
    return 0 if is_well else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--site",
        type=Path,
        default=SITE if SITE.exists() else None,
        help=f"packages for the handoff, see `make gpu-site` ({SITE.name} if it is there)",
    )
    parser.add_argument(
        "--stages",
        default=",".join(stage.name for stage in runner.STAGES),
        type=_stages,
        help="which to run (%(default)s)",
    )
    args = parser.parse_args()
    args.out = args.out.resolve()
    return args


def _stages(names: str) -> list[runner.Stage]:
    known = {stage.name: stage for stage in runner.STAGES}
    if unknown := set(names.split(",")) - known.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(known)}")
    return [known[name] for name in names.split(",")]


def _unpacked(site: Path | None) -> list[str]:
    """Unpack a site of packages; return the folders to import from."""
    if site is None:
        return []
    with zipfile.ZipFile(site) as archive:
        archive.extractall(WORK / "site")
    return [str(WORK / "site")]


if __name__ == "__main__":
    sys.exit(main())

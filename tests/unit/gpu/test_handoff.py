"""A handoff between two processes of the stand-in, and what judges it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import handoff, site
from tests.gpu.fake_cache import LAYOUT, NUM_TOKENS, FakeCache, expected_after, tables
from tests.gpu.notes import Notes, NotTriedError
from tests.gpu.runner import STAGES
from tests.gpu.transports import SharedFiles
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.memory.regions import region_of

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[3]
HERE, THERE = tables(1), tables(2)
LIMIT_S = 120


def stage(work: Path, hidden: tuple[str, ...]) -> tuple[int, dict[str, Any]]:
    """Run the stage on the stand-in, as if some packages were not installed; return its exit status
    and what it has found."""
    program = work / "handoff.py"
    program.write_text(
        "import sys\n"
        f"sys.modules |= dict.fromkeys({hidden!r})\n"  # none of them can be imported
        "from tests.gpu import stage\n"
        f"sys.argv[1:] = ['handoff', '--device', 'cpu', '--work', {str(work)!r}]\n"
        "if __name__ == '__main__':\n"  # processes that are spawned read this, too
        "    sys.exit(stage.main())\n"
    )
    told = subprocess.run(
        [sys.executable, str(program)], cwd=ROOT, timeout=LIMIT_S, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    print(told.stdout, told.stderr)
    return told.returncode, json.loads((work / "handoff.json").read_text())


def test_kv_arrives_raw_packed_and_as_int8_while_it_is_computed(work: Path) -> None:
    status, found = stage(work, hidden=("nixl", "vllm"))
    assert (status, found["outcome"], found["failures"]) == (0, "passed", [])
    assert list(found["facts"]) == [
        f"{way} over opened memory" for way in ("raw", "packed", "int8")
    ]
    assert found["not_tried"] == {"handoffs over NIXL": "nixl is not there"}


def test_without_its_packages_a_handoff_is_not_tried(
    work: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "zmq" else name)
    with pytest.raises(NotTriedError, match=r"no zmq: `python -m tests\.gpu\.site --python 3"):
        handoff.run(notes)


# --- what judges it --------------------------------------------------------------------------


def test_one_wrong_element_anywhere_is_found() -> None:
    expected = expected_after(1, Codec.RAW, HERE, THERE, (0.0, 1.0))
    for layer in LAYOUT.layers:
        cache = expected_after(1, Codec.RAW, HERE, THERE, (0.0, 1.0))
        assert cache.differences(expected) == []
        cache.caches[layer][3, ..., 2, 5] += 1.0
        (found,) = cache.differences(expected)
        assert layer in found


def test_raw_blocks_come_as_they_are_and_decoded_tokens_alone() -> None:
    """What lies behind the last token is the producer's, or stays."""
    raw, int8 = (
        expected_after(1, codec, HERE, THERE, (0.5, 1.5)) for codec in (Codec.RAW, Codec.INT8)
    )
    for group, table in zip(LAYOUT.groups, HERE, strict=True):
        last, counted = table[-1], (NUM_TOKENS - 1) % group.block_tokens + 1
        for layer in group.layers:
            behind = [each.caches[layer][last][..., counted:, :] for each in (raw, int8)]
            assert [float(part.unique()) for part in behind] == [1.5, 0.5]
            kept = [float(each.caches[layer][0].unique()) for each in (raw, int8)]
            assert kept == [0.5, 0.5]


def test_the_fake_caches_are_what_their_layout_says(tmp_path: Path) -> None:
    caches = FakeCache.allocate(SharedFiles(tmp_path).allocate).caches
    for group in LAYOUT.groups:
        assert group.is_encodable
        for layer in group.layers:
            assert tuple(caches[layer].shape[1:]) == group.block_shape
            assert caches[layer].stride()[1:] == group.block_strides
            assert region_of(layer, caches[layer]).is_dense


# --- packages that are brought along ---------------------------------------------------------


def test_a_site_has_what_is_in_wheels_but_for_what_nobody_needs(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("zmq/__init__.py", "")
        archive.writestr("nixl_ep_cu13/big.so", "")
    size = site.collect([wheel], tmp_path / "site.zip")
    assert size == (tmp_path / "site.zip").stat().st_size
    assert zipfile.ZipFile(tmp_path / "site.zip").namelist() == ["zmq/__init__.py"]


NEEDLESS = {"vllm", "msgspec", "zmq", "nixl", "ray", "pytest", "hypothesis", "pydantic", "aiohttp"}


def test_the_other_stages_need_pytorch_alone() -> None:
    names = ", ".join(f"tests.gpu.{one.name}" for one in STAGES)
    code = f"import sys, {names}; print(*sorted({NEEDLESS!r} & sys.modules.keys()))"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == ""

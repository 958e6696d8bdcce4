"""Where vLLM's CPU attention kernels keep keys and values: as our layout of them says."""

from __future__ import annotations

import pytest
import torch

from vllm_pd_plugin.codecs.codec import FLOATS
from vllm_pd_plugin.codecs.cpu_layout import parts_of_cpu_kernel
from vllm_pd_plugin.codecs.ops import part_of

CASES = [
    ("vec", torch.float32, 128, 64),
    ("vec", torch.bfloat16, 32, 128),
    ("vec16", torch.float32, 16, 80),
    ("vec16", torch.bfloat16, 48, 64),
    ("amx", torch.bfloat16, 128, 64),
    ("amx", torch.bfloat16, 32, 128),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
@pytest.mark.parametrize(("kernel", "dtype", "tokens", "width"), CASES)
def test_a_token_s_key_and_value_lie_where_the_kernel_has_put_them(
    kernel: str, dtype: torch.dtype, tokens: int, width: int
) -> None:
    if kernel == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX")
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    heads, count = 2, tokens // 2 + 3
    key, value = torch.randn(2, count, heads, width).to(dtype)
    cache = torch.zeros(3, heads, tokens, 2 * width, dtype=dtype)
    # As vLLM's backend calls it (v1/attention/backends/cpu_attn.py).
    halves = cache.view(3, heads, 2 * tokens, width).chunk(2, dim=2)
    slots = tokens + torch.randperm(tokens)[:count]  # all in block 1
    _custom_ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, kernel)
    for part, written in zip(parts_of_cpu_kernel(kernel, tokens, width), (key, value), strict=True):
        rows = part_of(cache, part).reshape(3, heads, tokens, width)
        assert torch.equal(rows[1][:, slots - tokens], written.transpose(0, 1))
        assert not rows[0].any()
        assert not rows[2].any()


@pytest.mark.parametrize(("kernel", "tokens", "width"), [("vec", 128, 64), ("amx", 32, 128)])
def test_keys_and_values_fill_a_block_and_do_not_overlap(
    kernel: str, tokens: int, width: int
) -> None:
    cache = torch.zeros(1, 1, tokens, 2 * width)
    for part in parts_of_cpu_kernel(kernel, tokens, width):
        part_of(cache, part).add_(1)
    assert torch.equal(cache, torch.ones_like(cache))


def test_of_an_unknown_kernel_nothing_is_known() -> None:
    assert parts_of_cpu_kernel("neon", 128, 64) == ()
    assert "float8_e4m3fn" not in FLOATS
